"""Judge prompts: a template file, few-shot examples included, rendered to a shared preamble and a suffix a pair."""

import dataclasses
import string

import xxhash
import yaml
from etils import epath

from rlaif_jax.errors import UserError

_FIELDS = {"instruction", "comparison", "verdict", "choices", "reasoning", "examples"}
_PLACEHOLDERS = {"prompt", "response_1", "response_2"}
TEMPLATES = epath.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """Chain of thought in two steps: the judge writes a rationale, then names its choice.

    (Lee et al., arXiv 2309.00267, section 2.1.2.)
    """

    verdict: str  # what follows the rationale, up to where the judge names its choice
    stop: tuple[str, ...]  # texts that end a rationale


@dataclasses.dataclass(frozen=True)
class Template:
    """A pairwise judge prompt in the four parts of Lee et al. (arXiv 2309.00267, section 2.1).

    `preamble` holds the instruction and the worked examples and is the same for every pair; `comparison`
    shows one pair and ends where the judge names its choice or, with `reasoning`, where it begins to explain it;
    `choices` are the two answers, for the response in slot 1 and in slot 2.
    """

    name: str
    preamble: str
    comparison: str
    choices: tuple[str, str]
    reasoning: Reasoning | None = None

    def suffix(self, prompt: str, response_1: str, response_2: str) -> str:
        """What follows the preamble for one pair in one order."""
        return self.comparison.format(prompt=prompt, response_1=response_1, response_2=response_2)

    @property
    def digest(self) -> str:
        """A hash of everything that the template puts before the judge."""
        parts = (self.preamble, self.comparison, *self.choices)
        if self.reasoning:
            parts += (self.reasoning.verdict, *self.reasoning.stop)
        return text_hash("\x00".join(parts))


def text_hash(text: str) -> str:
    """xxh3 of a text, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def load_template(name: str, chain_of_thought: bool) -> Template:
    """Reads a template: a name in `judge/templates`, or the path of a YAML file.

    The file holds `instruction`, `comparison`, `verdict` (what leads from the comparison to the choice), `choices`
    (two) and `examples`, a list of `prompt`, `response_1`, `response_2` and `choice` (1 or 2). For a chain of thought
    it has a `reasoning` of `cue` (what leads from the comparison to the rationale) and `stop` (a list of texts that end
    it), and a `rationale` in each example. Raises UserError for a missing file, field or placeholder.
    """
    path = epath.Path(name) if name.endswith((".yaml", ".yml")) else TEMPLATES / f"{name}.yaml"
    if not path.exists():
        known = sorted(file.stem for file in TEMPLATES.glob("*.yaml"))
        raise UserError(f"no judge template {name!r}; there are {', '.join(known)}, or give the path of a YAML file")
    try:
        fields = yaml.safe_load(path.read_text())
        if not isinstance(fields, dict):
            raise TypeError("it must be a mapping of fields")
        if unknown := sorted(set(fields) - _FIELDS):
            raise ValueError(f"unknown field {unknown[0]}; the fields are {', '.join(sorted(_FIELDS))}")
        comparison, choices, examples = fields["comparison"], tuple(fields["choices"]), fields["examples"]
        instruction, verdict = fields["instruction"], fields["verdict"]
        cue, stop = _reasoning(path, fields) if chain_of_thought else ("", ())
        parts = (instruction, comparison, verdict, *choices, cue, *stop)
        if not isinstance(examples, list) or not all(isinstance(part, str) for part in parts):
            raise TypeError(
                "instruction, comparison, verdict, cue and every one of choices and stop must be texts (numbers in "
                "quotes), examples a list"
            )
        found = {
            field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
            for _, field, form, conversion in string.Formatter().parse(comparison)
            if field is not None
        }
    except yaml.YAMLError as error:
        raise UserError(f"judge template {path} is not YAML: {error}".replace("\n", " ")) from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"judge template {path} is malformed: {error!r}".replace("\n", " ")) from error
    if found != _PLACEHOLDERS:
        raise UserError(f"judge template {path} must use {sorted(_PLACEHOLDERS)} in comparison, not {sorted(found)}")
    if len(choices) != 2 or any(one.startswith(other) for one, other in (choices, choices[::-1])):
        raise UserError(f"judge template {path} must have two choices, none the beginning of the other: {choices}")
    # What stands between a comparison and the choice is no format: braces in it are themselves.
    literal = (cue if chain_of_thought else verdict).replace("{", "{{").replace("}", "}}")
    reasoning = Reasoning(verdict, stop) if chain_of_thought else None
    template = Template(path.stem, "", comparison + literal, choices, reasoning)
    shots = []
    for index, example in enumerate(examples):
        try:
            shots.append(_shot(template, example))
        except (KeyError, TypeError) as error:
            raise UserError(f"judge template {path}, example {index}: missing or wrong {error}") from error
    preamble = "".join(part + "\n\n" for part in ([instruction] if instruction else []) + shots)
    return dataclasses.replace(template, preamble=preamble)


def _reasoning(path: epath.Path, fields: dict) -> tuple[str, tuple[str, ...]]:
    """The cue, and what stops a rationale."""
    if "reasoning" not in fields:
        raise UserError(f"judge template {path} has no reasoning: set judge.chain_of_thought=False, or give it one")
    if not isinstance(fields["reasoning"]["stop"], list):
        raise TypeError("stop must be a list of texts")
    return fields["reasoning"]["cue"], tuple(fields["reasoning"]["stop"])


def _shot(template: Template, example: dict) -> str:
    """A worked example, with its choice and, before it, its rationale."""
    shot = template.suffix(example["prompt"], example["response_1"], example["response_2"])
    if template.reasoning:
        shot += example["rationale"] + template.reasoning.verdict
    if example["choice"] not in (1, 2):
        raise TypeError(f"choice: {example['choice']!r} is neither 1 nor 2")
    return shot + template.choices[example["choice"] - 1]
