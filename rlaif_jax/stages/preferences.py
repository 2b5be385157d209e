"""Labels as they are learned from: which order, soft or hard, calibrated, noisy; the judge's, people's, or both."""

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
from etils import epath
from flax import struct

from rlaif_jax.config import PreferencesConfig
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.calibration import fit_temperature, scale
from rlaif_jax.evaluation.panel import trust
from rlaif_jax.evaluation.principles import FOLDER as PRINCIPLES
from rlaif_jax.files import read_parquet
from rlaif_jax.stages.reading import Reader
from rlaif_jax.stages.run import Run
from rlaif_jax.training.sequences import Sequences


class Comparisons(struct.PyTreeNode):
    """A batch of labelled pairs."""

    a: Sequences
    b: Sequences
    prob_a: np.ndarray  # [batch] float32
    weight: np.ndarray  # [batch] float32, how much each counts; 0 for a pair without a label


_COLUMNS = ("pair", "prompt", "response_a", "response_b", "ended_a", "ended_b", "prob_a", "weight", "principle")


def read_preferences(run: Run) -> dict[str, list]:
    """Columns `pair`, `prompt`, `response_a`, `response_b`, `ended_a`, `ended_b`, `prob_a`, `weight` and `principle` of
    all labelled pairs; with `reward_model.by_principle` those of an ensemble are a row for each of its principles.

    pair: its number, which rises from row to row; rows of one pair stand together, and are not independent. weight:
    how much each counts in training, from 0 to 1; less than 1 where a panel disagrees, if the config says so.
    Where there are labels of the judge and of people, they are mixed. Raises UserError where the label file is missing.
    """
    folder, config = run.folder("label"), run.config.preferences
    columns = _labelled(folder, PRINCIPLES if _each_principle(run) else "")
    if run.config.label.source != "human":
        columns["prob_a"] = _judged(run, columns)
        columns = _trusted(run, columns)
    if run.config.label.source == "both":
        people, judged = _labelled(folder / "people"), max(columns["pair"], default=-1) + 1
        people["pair"] = [judged + pair for pair in people["pair"]]
        columns = {name: [*columns[name], *people[name]] for name in _COLUMNS}
    rng = np.random.default_rng(run.order_seed("preferences"))
    columns["prob_a"] = learned_labels(np.array(columns["prob_a"], float), config, rng).tolist()
    if run.config.label.source == "both":
        columns = _mixed(columns, rng)
    return {name: columns[name] for name in _COLUMNS}


def over_pairs(values: np.ndarray, pairs: Sequence[int]) -> np.ndarray:
    """The mean of the values [rows] of each pair: [pairs] float64. pairs: the number of each row's pair, rising."""
    _, places, counts = np.unique(pairs, return_inverse=True, return_counts=True)
    return np.bincount(places, values) / counts


def clamped(prob_a: np.ndarray, width: float) -> np.ndarray:
    """Labels [pairs] held within `width` of 1/2, or as they are for 0.

    After a chain of thought a judge is nearly sure of whatever it has argued for, and labels from 0.4 to 0.6 led to
    better behaviour than its own (Bai et al., arXiv 2212.08073, section 4.1).
    """
    return 0.5 + np.clip(prob_a - 0.5, -width, width) if width else prob_a


def learned_labels(prob_a: np.ndarray, config: PreferencesConfig, rng: np.random.Generator) -> np.ndarray:
    """Labels [pairs] made hard, smoothed, and turned round at the rate of noise, as the config asks for."""
    if config.hard:
        prob_a = np.where(prob_a == 0.5, 0.5, prob_a > 0.5)
    prob_a = (1 - config.smoothing) * prob_a + config.smoothing * (1 - prob_a)
    turned = rng.random(len(prob_a)) < config.noise_rate
    return np.where(turned, 1 - prob_a, prob_a)


def encode_comparisons(reader: Reader, table: Mapping[str, list]) -> Comparisons:
    """The columns of `read_preferences` as arrays, as a model reads them; says how many responses were too long."""
    prompts = reader.prompts(table["prompt"])
    a, b = (Sequences(*prompts, *reader.responses(table[f"response_{name}"], table[f"ended_{name}"])) for name in "ab")
    cut = np.concatenate([reader.cut(a, table["ended_a"]), reader.cut(b, table["ended_b"])])
    if cut.any():
        print(
            f"{cut.sum()} of {len(cut)} responses have more than config.{reader.group}.max_response_length="
            f"{reader.response_length} tokens: they are read without their end",
            flush=True,
        )
    return Comparisons(a, b, *(np.asarray(table[name], np.float32) for name in ("prob_a", "weight")))


def _mixed(columns: dict[str, list], rng: np.random.Generator) -> dict[str, list]:
    """The pairs in random order, numbered anew; the rows of one stay together."""
    numbers, places = np.unique(columns["pair"], return_inverse=True)
    new_places = np.argsort(rng.permutation(len(numbers)))[places]
    order = np.argsort(new_places, kind="stable")
    columns = {name: [values[i] for i in order] for name, values in columns.items()}
    return columns | {"pair": new_places[order].tolist()}


def _each_principle(run: Run) -> bool:
    return run.config.reward_model.by_principle and run.config.label.principles == "ensemble"


def _labelled(folder: epath.Path, part: str = "") -> dict[str, list]:
    """The labelled rows of the label file, or of that in its folder `part`, which has several rows of each pair."""
    file = folder / part / "preferences.parquet"
    if not file.exists():
        raise UserError(f"{file} is missing: run --stages=label first")
    labels, candidates = read_parquet(file), read_parquet(folder / "candidates.parquet")
    pairs = np.arange(labels.num_rows) // (labels.num_rows // candidates.num_rows)
    for name in ("ended_a", "ended_b"):  # which the texts do not say
        labels = labels.append_column(name, candidates[name].take(pairs))
    labels = labels.append_column("pair", pa.array(pairs))
    columns = labels.filter(np.asarray(labels["status"]) == "ok").to_pydict()
    return columns | {"weight": [1.0] * len(columns["row"])}


def _judged(run: Run, columns: dict[str, list]) -> np.ndarray:
    """The judge's labels in the order, at the temperature and within the bounds that the config asks for: [pairs]."""
    config = run.config.preferences
    name = "prob_a" if config.order == "both" else f"prob_a_{config.order}"
    temperature = _temperature(run, name) if config.calibrate else 1.0
    return clamped(scale(np.array(columns[name], float), temperature), config.clamp)


def _trusted(run: Run, columns: dict[str, list]) -> dict[str, list]:
    """What the disagreement of the panel leaves of its labels, each with its weight; all where a judge labelled."""
    panel = run.config.panel
    if panel.disagreement == "none":
        return columns
    weight = trust(np.array(columns["disagreement"], float), panel.disagreement, panel.max_disagreement)
    columns = columns | {"weight": weight.tolist()}
    if panel.disagreement == "filter":
        kept = np.flatnonzero(weight)
        print(f"labels: {len(weight) - len(kept)} of {len(weight)} left out, the panel disagrees on them", flush=True)
        columns = {name: [values[i] for i in kept] for name, values in columns.items()}
    return columns


def _temperature(run: Run, name: str) -> float:
    """The one under which the judge's labels fit people's choices best (Guo et al., arXiv 1706.04599)."""
    audited = read_parquet(run.folder("label") / "audit" / "audited.parquet").to_pydict()
    rows = [i for i, status in enumerate(audited["status"]) if status == "ok"]
    prob, human = (np.array([audited[column][i] for i in rows], float) for column in (name, "human"))
    temperature = fit_temperature(prob, human)
    print(f"labels: temperature {temperature:.3g}, fitted to {len(rows)} choices of people", flush=True)
    return temperature
