"""Best of n without bias, and the laws of over-optimisation: found where they hold, not claimed where they do not."""

import itertools

import numpy as np
import pytest

from rlaif_jax.evaluation import overoptimisation as over

RNG = np.random.default_rng(0)
DISTANCES = np.sqrt([over.best_of_n_kl(n) for n in (2, 4, 8, 16, 32, 64)])


def enumerated(proxy, values, n):
    """The mean over all n-subsets of the value of its best reply; of its best ones, where several tie."""
    means = []
    for subset in itertools.combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        means.append(np.mean([values[i] for i in subset if proxy[i] == best]))
    return np.mean(means)


@pytest.mark.parametrize("n", range(1, 8))
@pytest.mark.parametrize("ties", [False, True])
def test_best_of_n_is_the_mean_over_all_subsets(n, ties):
    proxy = RNG.integers(0, 3, (5, 7)).astype(float) if ties else RNG.normal(size=(5, 7))
    values = RNG.normal(size=(5, 7))
    expected = [enumerated(*row, n) for row in zip(proxy, values, strict=True)]
    np.testing.assert_allclose(over.best_of_n(proxy, values, n), expected, rtol=1e-12)


def test_best_of_n_of_many_samples_neither_overflows_nor_loses_weight():
    proxy = RNG.normal(size=(1, 12_500))
    for n in (1, 1000, 6250, 12_500):
        assert over.best_of_n(proxy, np.ones_like(proxy), n) == pytest.approx(1, abs=1e-9)
    assert over.best_of_n(proxy, proxy, 12_500) == pytest.approx(proxy.max())
    assert over.best_of_n(proxy, proxy, 1) == pytest.approx(proxy.mean())


def test_the_kl_of_best_of_n_is_that_of_the_paper():
    expected = {1: 0, 2: 0.193, 4: 0.636, 8: 1.204, 16: 1.835, 64: 3.174, 1000: 5.909, 60000: 10.002}
    for n, kl in expected.items():
        assert over.best_of_n_kl(n) == pytest.approx(kl, abs=1e-3)


def test_the_kl_of_best_of_n_is_exact_for_replies_that_never_repeat():
    # The best of n of uniform ranks has density n u^(n-1).
    u = (np.arange(200_000) + 0.5) / 200_000
    for n in (2, 5, 16):
        density = n * u ** (n - 1)
        assert np.mean(density * np.log(density)) == pytest.approx(over.best_of_n_kl(n), abs=1e-4)


def best_of_n_gains(alpha, beta, noise, prompts=200, seed=0):
    law = DISTANCES * (alpha - beta * DISTANCES)
    rng = np.random.default_rng(seed)
    # Prompts differ in how much there is to gain, which moves all points of a prompt together.
    return law * (1 + noise * rng.normal(size=(prompts, 1))) + noise * rng.normal(size=(prompts, len(law)))


def rl_gains(alpha, beta, noise, iterations=120, offset=0.0, seed=0):
    distances = np.linspace(0, 3, iterations)
    logs = np.log(np.maximum(distances, 1e-300))
    noises = noise * np.random.default_rng(seed).normal(size=iterations)
    return distances, offset + distances * (alpha - beta * logs) + noises


def test_laws_without_noise_are_found_exactly():
    fit = over.fit_best_of_n(DISTANCES, best_of_n_gains(0.6, 0.25, 0.0), 50, 0)
    assert (fit["alpha"]["mean"], fit["beta"]["mean"]) == pytest.approx((0.6, 0.25))
    assert fit["peak"]["mean"] == pytest.approx(1.2) and fit["peak_reason"] is None and fit["r_squared"] > 1 - 1e-9
    np.testing.assert_allclose(over.curve_best_of_n(DISTANCES, fit), DISTANCES * (0.6 - 0.25 * DISTANCES))
    distances, gains = rl_gains(0.4, 0.3, 0.0, offset=-0.1)
    fit = over.fit_rl(distances, gains, 50, 0)
    assert [fit[name]["mean"] for name in ("alpha", "beta", "offset")] == pytest.approx([0.4, 0.3, -0.1])
    assert fit["peak"]["mean"] == pytest.approx(np.exp(0.4 / 0.3 - 1)) and fit["r_squared"] > 1 - 1e-9
    np.testing.assert_allclose(over.curve_rl(distances, fit), gains)
    stop = over.early_stop(distances**2, fit)["early_stop"]
    assert distances[stop - 1] < fit["peak"]["mean"] <= distances[stop]


@pytest.mark.parametrize("law", ["best of n", "rl"])
def test_intervals_cover_the_truth_about_as_often_as_they_say(law):
    alpha, beta, covered = 0.6, 0.3, []
    for seed in range(100):
        if law == "best of n":
            fit = over.fit_best_of_n(DISTANCES, best_of_n_gains(alpha, beta, 0.5, seed=seed), 300, seed)
        else:
            fit = over.fit_rl(*rl_gains(alpha, beta, 0.1, seed=seed), 300, seed)
        intervals = fit["alpha"]["ci95"], fit["beta"]["ci95"]
        covered.append([low <= true <= high for true, (low, high) in zip((alpha, beta), intervals, strict=True)])
    assert (np.mean(covered, axis=0) > 0.85).all() and (np.mean(covered, axis=0) < 1).all()


def test_what_rl_misses_in_a_row_widens_its_intervals():
    distances, gains = rl_gains(0.4, 0.3, 0.0, iterations=200)
    rng = np.random.default_rng(1)
    alone = rng.normal(size=200)
    in_a_row = np.convolve(rng.normal(size=209), np.ones(10) / 10**0.5, "valid")  # of the same variance
    widths = [np.ptp(over.fit_rl(distances, gains + 0.1 * x, 500, 0)["beta"]["ci95"]) for x in (alone, in_a_row)]
    assert widths[1] > 1.5 * widths[0]


def test_no_peak_is_named_where_none_is_shown():
    rising = over.fit_best_of_n(DISTANCES, best_of_n_gains(0.5, 0.0, 0.5), 300, 0)
    assert rising["peak"]["mean"] is None and "interval of beta" in rising["peak_reason"]
    beyond = over.fit_best_of_n(DISTANCES, best_of_n_gains(0.5, 0.05, 0.0), 300, 0)
    assert beyond["peak"]["mean"] is None and "5, is beyond" in beyond["peak_reason"]
    falling = over.fit_best_of_n(DISTANCES, best_of_n_gains(-0.5, 0.1, 0.0), 300, 0)
    assert falling["peak"]["mean"] is None and "before" in falling["peak_reason"]
    still = over.fit_rl(np.zeros(20), RNG.normal(size=20), 300, 0)
    assert still["alpha"] == {"mean": None, "ci95": [None, None], "n": 20} and "too few" in still["peak_reason"]
    assert over.fit_rl(np.zeros(0), np.zeros(0), 300, 0)["beta"]["n"] == 0
    stop = over.early_stop(np.zeros(20), still)
    assert stop["early_stop"] is None and "too few different distances" in stop["early_stop_reason"]


def test_the_interval_of_a_peak_holds_it_and_ends_where_distances_do():
    fit = over.fit_best_of_n(DISTANCES, best_of_n_gains(0.6, 0.2, 1.0, prompts=2000), 500, 0)
    low, high = fit["peak"]["ci95"]
    assert low < fit["peak"]["mean"] < high <= DISTANCES.max()
