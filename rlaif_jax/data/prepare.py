"""The data of a run: read from their sources, checked, fitted to the policy's context, and kept as Parquet.

Every row that can't be used is counted by its reason; too many of them stop the run.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
from etils import epath
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data import embedded
from rlaif_jax.data.embedded import EmbeddedConfig
from rlaif_jax.data.encoding import prompt_tokens, response_tokens
from rlaif_jax.data.layouts import LAYOUTS, Draft, is_unicode, split_dialogues
from rlaif_jax.data.sources import Malformed, SourceConfig, read
from rlaif_jax.errors import UserError
from rlaif_jax.files import write_json, write_parquet
from rlaif_jax.progress import progress


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What a run learns from and is evaluated on."""

    root: str  # folder of relative paths
    layout: str  # how a row becomes a prompt: "request", "tldr", "abstract" or "dialogue" (data/layouts.py)
    demonstrations: SourceConfig  # prompt fields and `reply`
    train_prompts: SourceConfig  # prompt fields
    red_team_prompts: SourceConfig  # prompt fields: asks for what the policy is to decline (stage critique)
    evaluation_prompts: SourceConfig  # prompt fields
    comparisons: SourceConfig  # human preferences: prompt fields, `response_a`, `response_b`; perhaps `choice`, ABOUT
    evaluation_comparisons: SourceConfig
    max_malformed_rate: float  # a larger share of malformed rows stops the run
    embedded: EmbeddedConfig  # of sources of kind "embedded"


@dataclasses.dataclass(frozen=True)
class Row:
    """One usable row before its prompt is fitted. `values` are its other columns."""

    draft: Draft
    values: dict[str, Any]


# What may be known of a comparison, "" where it is not: where it is from, how sure people were, who wrote what.
ABOUT = ("group", "human_confidence", "generator_a", "generator_b")
# The columns beside `prompt` of each set.
COLUMNS = {
    "demonstrations": ("reply",),
    "train_prompts": (),
    "red_team_prompts": (),
    "evaluation_prompts": ("group",),
    "comparisons": ("response_a", "response_b", "prob_a", *ABOUT),
    "evaluation_comparisons": ("response_a", "response_b", "prob_a", *ABOUT),
}


def load(config: DataConfig, role: str, seed: int) -> tuple[list[Row], collections.Counter]:
    """The usable rows of a set, and how many others there are by reason."""
    source: SourceConfig = getattr(config, role)
    rows, reasons = [], collections.Counter()
    for raw in _raw_rows(config, role, source, seed):
        row = raw if isinstance(raw, Malformed) else _row(raw, role, config.layout)
        if isinstance(row, Malformed):
            reasons[row.reason] += 1
        else:
            rows.append(row)
    return rows, reasons


def _raw_rows(config: DataConfig, role: str, source: SourceConfig, seed: int) -> Iterator[Mapping | Malformed]:
    if not source.kind:
        return iter(())
    if source.kind == "embedded":
        return embedded.rows(config.embedded, seed, role)
    return read(source, config.root)


def _row(raw: Mapping[str, Any], role: str, layout: str) -> Row | Malformed:
    if layout == "dialogue":
        raw = split_dialogues(raw)
    draft = LAYOUTS[layout](raw)
    if isinstance(draft, Malformed):
        return draft
    values: dict[str, Any] = {}
    for name in COLUMNS[role]:
        value = _VALUES[name](raw, name)
        if isinstance(value, Malformed):
            return value
        values[name] = value
    if "response_a" in values and values["response_a"] == values["response_b"]:
        return Malformed("both responses are the same")
    return Row(draft, values)


def _reply(raw: Mapping[str, Any], name: str) -> str | Malformed:
    """A response, up to where the human speaks again. Of several references the first counts."""
    value = raw.get(name)
    if isinstance(value, (list, tuple)) and value:
        value = value[0]
    if not isinstance(value, str):
        return Malformed(f"no text in {name}")
    if not is_unicode(value):
        return Malformed(f"{name} is not valid Unicode")
    return value.split("\n\nHuman:")[0].strip() or Malformed(f"{name} is empty")


_CHOICES = {0: 1.0, 1: 0.0, "a": 1.0, "b": 0.0, "tie": 0.5}


def _prob_a(raw: Mapping[str, Any], name: str) -> float | Malformed:
    """1 where people chose response a, 0 where b, 0.5 for a tie; without a field `choice`, a is the chosen one."""
    choice = raw.get("choice", 0)
    return _CHOICES[choice] if choice in _CHOICES else Malformed("choice is none of 0, 1, a, b and tie")


_VALUES: dict[str, Callable] = {
    "reply": _reply,
    "response_a": _reply,
    "response_b": _reply,
    "prob_a": _prob_a,
    **dict.fromkeys(ABOUT, lambda raw, name: str(raw.get(name, ""))),
}


def prepare(
    config: DataConfig,
    seed: int,
    tokenizer: PreTrainedTokenizerFast,
    max_prompt_length: int,
    max_response_length: int,
    folder: epath.Path,
) -> None:
    """Writes each set as `folder`/NAME.parquet, and `report.json` with the rows kept and dropped by reason.

    A prompt is shortened as its layout allows; one that stays too long is dropped, as is a demonstration whose reply
    is too long, and a training row whose prompt is evaluated on. Raises UserError where more than
    `max_malformed_rate` of a set's rows are malformed, and where a set that is configured ends up empty.
    """

    def tokens(prompt: str) -> int:
        return len(prompt_tokens(tokenizer, [prompt])[0])

    report, held_out = {}, set()
    # Evaluation sets first: what they hold is kept out of the others.
    for role in sorted(COLUMNS, key=lambda role: not role.startswith("evaluation")):
        rows, malformed = load(config, role, seed)
        dropped: collections.Counter = collections.Counter()
        kept = []
        for row in progress(rows, role[:14], total=len(rows), unit="row"):
            prompt = row.draft.fitted(tokens, max_prompt_length)
            reply = response_tokens(tokenizer, [row.values["reply"]])[0] if "reply" in row.values else []
            if prompt is None:
                dropped["prompt too long"] += 1
            elif len(reply) >= max_response_length:
                dropped["reply too long"] += 1
            elif prompt in held_out and not role.startswith("evaluation"):
                dropped["evaluated on"] += 1
            else:
                kept.append({"prompt": prompt} | row.values)
        if role.startswith("evaluation"):
            held_out |= {row["prompt"] for row in kept}
        report[role] = {"rows": len(kept), "malformed": dict(malformed), "dropped": dict(dropped)}
        _check(config, role, report[role])
        write_parquet(folder / f"{role}.parquet", pa.Table.from_pylist(kept, _schema(role)))
        left_out = ", ".join(f"{reason}: {count}" for reason, count in (malformed + dropped).items())
        if left_out:
            print(f"data: {role}: {len(kept)} rows kept; left out: {left_out}", flush=True)
    write_json(folder / "report.json", report)


def _schema(role: str) -> pa.Schema:
    types = {"prob_a": pa.float64()}
    return pa.schema([(name, types.get(name, pa.string())) for name in ("prompt", *COLUMNS[role])])


def _check(config: DataConfig, role: str, report: Mapping[str, Any]) -> None:
    malformed, dropped = report["malformed"], report["dropped"]
    total = report["rows"] + sum(malformed.values()) + sum(dropped.values())
    if total and sum(malformed.values()) > config.max_malformed_rate * total:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in malformed.items())
        raise UserError(
            f"{sum(malformed.values())} of {total} rows of config.data.{role} are malformed ({reasons}), more than "
            f"config.data.max_malformed_rate={config.max_malformed_rate}"
        )
    if getattr(config, role).kind and not report["rows"]:
        reasons = ", ".join(f"{reason}: {count}" for reason, count in dropped.items())
        split = getattr(config, role).split
        nothing = f"none is of split {split!r}" if split else "it is empty"
        raise UserError(f"config.data.{role} has no usable row ({reasons or nothing})")


def training_texts(rows: Sequence[Row]) -> Iterator[str]:
    """The texts of demonstrations that a policy's tokenizer learns from."""
    for row in rows:
        yield f"{row.draft.versions[0]} {row.values['reply']}"
