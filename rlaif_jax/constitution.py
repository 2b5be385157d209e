"""Checks a constitution, or converts a published one: python -m rlaif_jax.constitution --file=NAME | --convert=JSON"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import yaml
from absl import flags
from etils import epath
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlaif_jax.commands import parse_plain, run_command
from rlaif_jax.errors import UserError
from rlaif_jax.files import write_text
from rlaif_jax.judge.constitution import (
    TEXTS,
    Constitution,
    load_constitution,
    make_constitution,
    parse_principle,
    usable,
)

_USAGE = "usage: python -m rlaif_jax.constitution --file=NAME | --convert=FILE.json[,FILE.json] --out=FILE.yaml"
_HELP = """  --file=NAME      a name in rlaif_jax/judge/constitutions, or the path of a YAML file: checks it, and
                   prints how likely each stage draws each principle, and what keeps one from being drawn
  --convert=FILE   a JSON file of critique and revision requests (a mapping from names, or a list), or of comparisons
                   (a list of texts), as the authors of arXiv 2212.08073 published them; several with commas
  --out=FILE.yaml  where to write them as one constitution"""
# What each stage needs of a principle.
_STAGES = {"critique": ("critique", "revision"), "label": ("comparison",)}
# The names of a text in published files, and the words around it there, which its place in a prompt gives it anyway.
_NAMES = {
    "critique": ("critique_request", "critique request", "critique", "prompt"),
    "revision": ("revision_request", "revision request", "revision", "edit_request"),
    "comparison": ("comparison", "comparison_request"),
}
_PUBLISHED = ("prompt", "edit_request")  # the authors' worked examples have such names as well, but not the words
_AROUND = {
    "critique": ("CritiqueRequest:", "Critique:"),
    "revision": ("RevisionRequest:", "Revision:"),
    "comparison": ("", "Options:"),
}


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    flags.DEFINE_string("file", None, "", flag_values=values)
    flags.DEFINE_string("out", None, "", flag_values=values)
    flags.DEFINE_list("convert", [], "", flag_values=values)
    options = parse_plain(argv, _USAGE, values)
    if bool(options.file) == bool(options.convert) or bool(options.out) != bool(options.convert):
        raise UserError(_USAGE)
    if options.convert:
        if not options.out.endswith((".yaml", ".yml")):
            raise UserError(f"--out={options.out} must end with .yaml")
        write_text(epath.Path(options.out), _yaml(convert([epath.Path(file) for file in options.convert])))
    _print(load_constitution(options.out or options.file))
    return 0


def convert(files: Sequence[epath.Path]) -> Constitution:
    """The principles of all files as one constitution.

    A file holds a mapping from names to principles, a list of principles, or a list of comparisons. A principle is a
    mapping from the names of its texts (`_NAMES`) to a text, or to a list of it alone. Principles of a list are named
    by the file and their number. Raises UserError for what is missing, damaged, unknown or twice there.
    """
    rows = []
    for file in files:
        content = _read(file)
        if isinstance(content, list):
            content = {f"{file.stem}-{i}": item for i, item in enumerate(content)}
        if not isinstance(content, dict) or not content:
            raise UserError(f"--convert={file} must hold a mapping from names to principles, or a list of them")
        rows += [(f"{file}, {name}", _row(file, name, item)) for name, item in content.items()]
    return make_constitution(files[0].stem, [parse_principle(*row) for row in rows], ", ".join(map(str, files)))


def _read(file: epath.Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise UserError(f"--convert={file} has the name {twice[0]!r} twice: rename one of them")
        return dict(pairs)

    if not file.exists() or file.is_dir():
        raise UserError(f"--convert={file} {'is a folder: name a file' if file.is_dir() else 'does not exist'}")
    try:
        return json.loads(file.read_text(), object_pairs_hook=unique)
    except ValueError as error:
        raise UserError(f"--convert={file} is not JSON: {error}") from error


def _row(file: epath.Path, name: str, item: Any) -> dict[str, str]:
    fields = {"comparison": item} if isinstance(item, str) else item
    if not isinstance(fields, dict):
        raise UserError(f"--convert={file}: {name} must be a text or a mapping from names to texts, not {item!r}")
    row = {"id": name, "source": file.name}
    for key, value in fields.items():
        text = next((text for text, names in _NAMES.items() if key.lower() in names), None)
        if text is None:
            known = ", ".join(name for names in _NAMES.values() for name in names)
            raise UserError(f"--convert={file}: {name} has an unknown text {key!r}; known are {known}")
        found = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(found, str):
            raise UserError(f"--convert={file}: {name}: {key} must be one text, not {value!r}")
        if text in row:
            raise UserError(f"--convert={file}: {name} has two texts for a {text}: leave one out")
        before, after = _AROUND[text]
        remedy = "name a file of requests or comparisons, not of worked examples"
        if "\n\nHuman:" in found:
            raise UserError(f"--convert={file}: {name}: {key} has the turns of a dialogue: {remedy}")
        if key.lower() in _PUBLISHED and not found.strip().startswith(before):
            raise UserError(f"--convert={file}: {name}: {key} does not begin with {before!r}: {remedy}")
        row[text] = found.strip().removeprefix(before).removesuffix(after).strip()
    return row


def _yaml(constitution: Constitution) -> str:
    names = ("id", *TEXTS, "source")
    rows = [{name: getattr(x, name) for name in names if getattr(x, name)} for x in constitution.principles]
    return yaml.safe_dump({"principles": rows}, sort_keys=False, allow_unicode=True, width=1_000_000)


def _print(constitution: Constitution) -> None:
    """The principles, the probability with which each stage draws each, and whatever can't be drawn."""
    table = Table(title=f"constitution {escape(constitution.name)}", title_justify="left")
    for column in ("principle", "tags", *(f"P, {stage}" for stage in _STAGES)):
        table.add_column(column)
    shares, notes = {}, []
    for stage, texts in _STAGES.items():
        found, left_out = usable(constitution.principles, texts)
        total = sum(principle.weight for principle in found)
        shares[stage] = {principle.id: f"{principle.weight / total:.3f}" for principle in found}
        notes += [f"{stage} never draws, {why}: {', '.join(ids)}" for why, ids in left_out.items()]
    for principle in constitution.principles:
        cells = [shares[stage].get(principle.id, "-") for stage in _STAGES]
        table.add_row(escape(principle.id), escape(", ".join(principle.tags)), *cells)
    Console(width=120).print(table)
    print("\n".join(notes or ["every stage draws from all of them"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv))
