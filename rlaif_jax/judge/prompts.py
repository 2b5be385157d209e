"""Judge prompts: a template file, few-shot examples included, rendered to a shared preamble and a suffix a pair."""

import dataclasses
import string

import xxhash
import yaml
from etils import epath

from rlaif_jax.errors import UserError

_PLACEHOLDERS = {"prompt", "response_1", "response_2"}
TEMPLATES = epath.Path(__file__).parent / "templates"


@dataclasses.dataclass(frozen=True)
class Template:
    """A pairwise judge prompt in the four parts of Lee et al. (arXiv 2309.00267, section 2.1).

    `preamble` holds the instruction and the worked examples and is the same for every pair; `comparison`
    shows one pair and ends where the judge names its choice; `choices` are the two answers, one token each,
    for the response in slot 1 and in slot 2.
    """

    name: str
    preamble: str
    comparison: str
    choices: tuple[str, str]

    def suffix(self, prompt: str, response_1: str, response_2: str) -> str:
        """What follows the preamble for one pair in one order."""
        return self.comparison.format(prompt=prompt, response_1=response_1, response_2=response_2)

    @property
    def digest(self) -> str:
        """A hash of everything that the template puts before the judge."""
        return text_hash("\x00".join((self.preamble, self.comparison, *self.choices)))


def text_hash(text: str) -> str:
    """xxh3 of a text, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def load_template(name: str) -> Template:
    """Reads a template: a name in `judge/templates`, or the path of a YAML file.

    The file holds `instruction`, `comparison`, `choices` (two) and `examples`, a list of `prompt`,
    `response_1`, `response_2` and `choice` (1 or 2). Raises UserError for a missing file, field or placeholder.
    """
    path = epath.Path(name) if name.endswith((".yaml", ".yml")) else TEMPLATES / f"{name}.yaml"
    if not path.exists():
        known = sorted(file.stem for file in TEMPLATES.glob("*.yaml"))
        raise UserError(f"no judge template {name!r}; there are {', '.join(known)}, or give the path of a YAML file")
    try:
        fields = yaml.safe_load(path.read_text())
        comparison, choices, examples = fields["comparison"], tuple(fields["choices"]), fields["examples"]
        instruction = fields["instruction"]
        parts = (instruction, comparison, *choices)
        if not isinstance(examples, list) or not all(isinstance(part, str) for part in parts):
            raise TypeError("instruction, comparison and choices must be texts, examples a list")
        found = {field for _, field, _, _ in string.Formatter().parse(comparison) if field is not None}
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"judge template {path} is malformed: {error!r}".replace("\n", " ")) from error
    if found != _PLACEHOLDERS:
        raise UserError(f"judge template {path} must use {sorted(_PLACEHOLDERS)} in comparison, not {sorted(found)}")
    if len(choices) != 2:
        raise UserError(f"judge template {path} has {len(choices)} choices, not 2")
    template = Template(path.stem, "", comparison, choices)
    shots = []
    for index, example in enumerate(examples):
        try:
            shot = template.suffix(example["prompt"], example["response_1"], example["response_2"])
            shots.append(shot + choices[(1, 2).index(example["choice"])])
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(f"judge template {path}, example {index}: missing or wrong {error}") from error
    preamble = "".join(part + "\n\n" for part in ([instruction] if instruction else []) + shots)
    return dataclasses.replace(template, preamble=preamble)
