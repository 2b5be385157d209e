"""How far the refusal detector agrees with people, on the half of the XSTest completions that it was not made on.

    python benchmarks/refusals.py --data=DIR/xstest_completions_human.jsonl.gz

Prints a JSON line a rater and task (three classes, and refusal against the rest): accuracy and Cohen's kappa with 95 %
intervals that resample prompts. The final label of people is the truth, for people their two first labels of each
other. Beside the detector: people, GPT-4, and TF-IDF with logistic regression trained on the other half.
"""

import argparse
import collections
import gzip
import itertools
import json
import re

import harness  # noqa: F401  (finds the package)
import numpy as np
from scipy import optimize, sparse

from rlaif_jax.evaluation.refusals import CLASSES, refusal
from rlaif_jax.evaluation.statistics import bootstrap_ci, cohen_kappa

_LABELS = {"1_full_compliance": "compliance", "2_full_refusal": "refusal", "3_partial_refusal": "partial"}
_STRENGTH = 10.0  # of the likelihood against the prior on the weights: better than 100 in 5 folds of one half


def halves(rows: list[dict], seed: int) -> tuple[list[dict], list[dict]]:
    """Rows to make a detector on and rows to measure it on, each prompt with all its completions in one of them."""
    prompts = np.random.default_rng(seed).permutation(sorted({row["id"] for row in rows})).tolist()
    first = set(prompts[: len(prompts) // 2])
    ordered = sorted(rows, key=lambda row: (row["id"], row["model"]))
    return [row for row in ordered if row["id"] in first], [row for row in ordered if row["id"] not in first]


def codes(rows: list[dict], name: str) -> np.ndarray:
    """The labels of a rater as places in `CLASSES`, -1 for what is no label: [rows]."""
    return np.array([CLASSES.index(_LABELS[row[name]]) if row[name] in _LABELS else -1 for row in rows])


def learned(train: list[dict], test: list[dict]) -> np.ndarray:
    """What TF-IDF of words and word pairs with a logistic regression says of `test`: [rows] places in `CLASSES`."""
    counts = [[_counts(row["completion"]) for row in rows] for rows in (train, test)]
    frequency = collections.Counter(gram for found in counts[0] for gram in found)
    grams = sorted(gram for gram, number in frequency.items() if number >= 2)
    place = {gram: i for i, gram in enumerate(grams)}
    rarity = np.log((1 + len(train)) / (1 + np.array([frequency[gram] for gram in grams]))) + 1
    x, unseen = (_features(found, place, rarity) for found in counts)
    y, shape = np.eye(len(CLASSES))[codes(train, "human_final")], (len(grams) + 1, len(CLASSES))

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(shape)
        logits = x @ weights[:-1] + weights[-1]
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        error = np.exp(logprobs) - y
        gradient = np.vstack([_STRENGTH * (x.T @ error) + weights[:-1], _STRENGTH * error.sum(axis=0)])
        return float(0.5 * np.sum(weights[:-1] ** 2) - _STRENGTH * np.sum(y * logprobs)), gradient.ravel()

    weights = optimize.minimize(loss, np.zeros(shape).ravel(), jac=True, method="L-BFGS-B").x.reshape(shape)
    return np.argmax(unseen @ weights[:-1] + weights[-1], axis=1)


def _counts(text: str) -> collections.Counter:
    words = re.findall(r"[a-z']+", text.lower())
    return collections.Counter([*words, *map(" ".join, itertools.pairwise(words))])


def _features(counts: list[collections.Counter], place: dict[str, int], rarity: np.ndarray) -> sparse.csr_array:
    """[rows, grams] of length 1: 1 + log of the count, times the inverse document frequency."""
    cells = [(i, place[gram], 1 + np.log(n)) for i, found in enumerate(counts) for gram, n in found.items()
             if gram in place]  # fmt: skip
    rows, columns, values = map(np.array, zip(*cells, strict=True))
    matrix = sparse.csr_array((values * rarity[columns], (rows, columns)), (len(counts), len(place)))
    length = np.sqrt(matrix.multiply(matrix).sum(axis=1))
    return sparse.diags_array(1 / np.maximum(length, 1e-12)) @ matrix


def main() -> None:
    """Prints the lines."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", required=True, help="the file of completions")
    flags.add_argument("--seed", type=int, default=0, help="of the split into halves")
    flags.add_argument("--resamples", type=int, default=2000)
    flags.add_argument("--no-peer", action="store_true", help="without the learned detector")
    options = flags.parse_args()
    with gzip.open(options.data, "rt") as file:
        made_on, held_out = halves(list(map(json.loads, file)), options.seed)
    truth = codes(held_out, "human_final")
    detected = np.array([CLASSES.index(refusal(row["completion"])) for row in held_out])
    raters = {"detector": (detected, truth), "people": (codes(held_out, "human_1"), codes(held_out, "human_2"))}
    raters["gpt4"] = codes(held_out, "gpt4_label"), truth
    if not options.no_peer:
        raters["tf_idf"] = learned(made_on, held_out), truth
    prompts = len({row["id"] for row in held_out})
    for task, of_task in (("three classes", lambda label: label), ("refusal", lambda label: label == 2)):
        for rater, labels in raters.items():
            # A prompt's completions are one observation: models answer alike.
            said, right = (of_task(x).reshape(prompts, -1) for x in labels)
            figures = {
                name: bootstrap_ci((said, right), statistic, options.resamples, 0)
                for name, statistic in (("accuracy", lambda a, b: np.mean(a == b)), ("kappa", cohen_kappa))
            }
            print(json.dumps({"task": task, "rater": rater, "completions": said.size} | figures), flush=True)
    kinds = range(len(CLASSES))
    confusion = [[int(np.sum((truth == i) & (detected == j))) for j in kinds] for i in kinds]
    print(json.dumps({"task": "confusion", "classes": CLASSES, "people_by_detector": confusion}))


if __name__ == "__main__":
    main()
