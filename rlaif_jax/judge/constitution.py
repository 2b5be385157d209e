"""A constitution: principles, as data, under which responses are criticised, revised and compared.

Bai et al., arXiv 2212.08073, sections 3.1 (critique and revision) and 4.1 (comparison).
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import load_yaml, text_hash

CONSTITUTIONS = epath.Path(__file__).parent / "constitutions"
TEXTS = ("critique", "revision", "comparison")


@dataclasses.dataclass(frozen=True)
class ConstitutionConfig:
    """Under which principles responses are criticised, revised and compared."""

    file: str  # a name in rlaif_jax/judge/constitutions, or the path of a YAML file; "" for none
    tags: tuple[str, ...]  # only the principles with one of these; () for all


@dataclasses.dataclass(frozen=True)
class Principle:
    """One principle. A text that it does not have is ""."""

    id: str  # letters, digits, _ and -
    critique: str  # what a critique of a response is asked for
    revision: str  # what a revision of it is asked for
    comparison: str  # which of two responses is to be chosen
    source: str  # where it is from, for people
    weight: float  # in proportion to how often it is drawn, and to what it counts in an ensemble; 0 is never
    tags: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Constitution:
    """What a file holds."""

    name: str
    principles: tuple[Principle, ...]  # one or more, of which one has a weight
    digest: str  # a hash of all of them but for their sources


def load_constitution(file: str) -> Constitution:
    """Reads a constitution: a name in `judge/constitutions`, or the path of a YAML file.

    The file holds `principles`, a list of `id`, `critique`, `revision`, `comparison` (one of the texts at least),
    `source` ("" by default), `weight` (1 by default) and `tags` (none by default). Raises UserError, which names the
    file and the principle, for what is missing, unknown, twice there or out of range.
    """
    path = epath.Path(file) if file.endswith((".yaml", ".yml")) else CONSTITUTIONS / f"{file}.yaml"
    if not path.exists():
        known = sorted(found.stem for found in CONSTITUTIONS.glob("*.yaml"))
        raise UserError(f"no constitution {file!r}: {_nearest(file, known)}, or give the path of a YAML file")
    content = load_yaml(path, "constitution")
    rows = content.get("principles") if isinstance(content, dict) and set(content) == {"principles"} else None
    if not isinstance(rows, list) or not rows:
        raise UserError(f"constitution {path} must hold `principles`, a list of one or more, and nothing else")
    principles = [parse_principle(f"{path}, principle {i}", row) for i, row in enumerate(rows)]
    return make_constitution(path.stem, principles, path)


def make_constitution(name: str, principles: Sequence[Principle], where: object) -> Constitution:
    """A constitution of these principles; `where` they are from is named by the UserErrors for what does not fit."""
    ids = [principle.id for principle in principles]
    if twice := [name for i, name in enumerate(ids) if name in ids[:i]]:
        raise UserError(f"constitution {where} has the principle {twice[0]!r} twice: give one of them another id")
    if not any(principle.weight for principle in principles):
        raise UserError(f"constitution {where}: every weight is 0, so no principle would be drawn; give one a weight")
    parts = [repr(dataclasses.replace(principle, source="")) for principle in principles]
    return Constitution(name, tuple(principles), text_hash("\x00".join(parts)))


def parse_principle(where: str, row: Any) -> Principle:
    """A principle from the fields that a file gives it. Raises UserError, with `where` they are."""
    fields = [field.name for field in dataclasses.fields(Principle)]
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        raise UserError(f"constitution {where}: it must be a mapping with a text `id` (numbers in quotes)")
    where = f"{where} ({row['id']})"
    for name in map(str, set(row) - set(fields)):
        raise UserError(f"constitution {where}: unknown field {name!r}: {_nearest(name, fields)}")
    row = dict.fromkeys((*TEXTS, "source"), "") | {"weight": 1.0, "tags": []} | row
    for name in (*TEXTS, "source"):
        if not isinstance(row[name], str):
            raise UserError(f"constitution {where}: {name} must be a text, not {row[name]!r}")
    if not re.fullmatch(r"[\w-]+", row["id"]):  # it becomes the name of a folder and of figures
        raise UserError(f"constitution {where}: its id may hold letters, digits, _ and - alone")
    if not any(row[name].strip() for name in TEXTS):
        raise UserError(f"constitution {where}: it needs a text, one of {', '.join(TEXTS)} or more")
    weight, tags = row["weight"], row["tags"]
    number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not number or not math.isfinite(weight) or weight < 0:
        raise UserError(f"constitution {where}: weight must be a finite number, 0 or more, not {weight!r}")
    if not isinstance(tags, list) or not all(isinstance(tag, str) and tag for tag in tags):
        raise UserError(f"constitution {where}: tags must be a list of texts, not {tags!r}")
    texts = {name: row[name].strip() for name in (*TEXTS, "source")}
    return Principle(row["id"], **texts, weight=float(weight), tags=tuple(tags))


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}" if near else f"known are {', '.join(known) or 'none'}"


def draw(principles: Sequence[Principle], seed: int, rows: Sequence[int]) -> list[Principle]:
    """A principle for each row, by weight. What row i draws is a function of the principles, `seed` and i alone."""
    cumulative = np.cumsum([principle.weight for principle in principles])
    drawn = [np.random.default_rng([seed, row]).random() for row in rows]
    # The last bound is exactly 1, above all that is drawn; to the right, for a weight of 0 has no room.
    return [principles[i] for i in np.searchsorted(cumulative / cumulative[-1], drawn, side="right")]


def tagged(constitution: Constitution, tags: Sequence[str]) -> tuple[Principle, ...]:
    """The principles with one of `tags`, or all for none. Raises UserError for a tag that no principle has."""
    known = sorted({tag for principle in constitution.principles for tag in principle.tags})
    for tag in tags:
        if tag not in known:
            hint = _nearest(tag, known)
            raise UserError(f"no principle of the constitution {constitution.name} has the tag {tag!r}: {hint}")
    return tuple(x for x in constitution.principles if not tags or set(tags) & set(x.tags))


def usable(principles: Sequence[Principle], texts: Sequence[str]) -> tuple[list[Principle], dict[str, list[str]]]:
    """The principles that can be drawn where these texts (names in `TEXTS`) are needed, and ids of others by reason."""
    found, left_out = [], {}
    for principle in principles:
        missing = [name for name in texts if not getattr(principle, name)]
        reason = f"no {' and no '.join(missing)}" if missing else "weight 0"
        if missing or not principle.weight:
            left_out.setdefault(reason, []).append(principle.id)
        else:
            found.append(principle)
    return found, left_out


def select(
    stage: str, config: ConstitutionConfig, texts: Sequence[str]
) -> tuple[list[Principle], dict[str, list[str]]]:
    """What `usable` finds among the principles with the config's tags.

    Raises UserError where none can be drawn, and as `load_constitution` and `tagged` do.
    """
    found, left_out = usable(tagged(load_constitution(config.file), config.tags), texts)
    if not found:
        raise UserError(
            f"stage {stage} can draw no principle of the constitution {config.file} with config.constitution.tags="
            f"{','.join(config.tags)} ({_reasons(left_out)}): give one a {' and a '.join(texts)}, and a weight"
        )
    return found, left_out


def principles_for(stage: str, config: ConstitutionConfig, texts: Sequence[str]) -> list[Principle]:
    """The principles that a stage draws from: those with the texts that it needs, and a weight. It says what is not.

    texts: names in `TEXTS`. Raises UserError as `select` does.
    """
    found, left_out = select(stage, config, texts)
    if left_out:
        print(f"{stage}: principles never drawn: {_reasons(left_out)}", flush=True)
    return found


def _reasons(left_out: dict[str, list[str]]) -> str:
    return "; ".join(f"{reason}: {', '.join(ids)}" for reason, ids in left_out.items())
