"""Prompts for critiques and revisions: what a template file says, filled in with a reply and a principle's requests.

Bai et al., arXiv 2212.08073, section 3.1 and appendix E: worked examples, the conversation, and a request to the end.
"""

import dataclasses
import string
from collections.abc import Mapping
from typing import Any

from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import load_yaml, template_file, text_hash

TEMPLATES = epath.Path(__file__).parent / "critiques"
_EXAMPLE = ("prompt", "response", "critique_request", "critique", "revision_request", "revision")
_OF_CRITIQUES = ("critique_request", "critique")  # what revisions without critiques do without


@dataclasses.dataclass(frozen=True)
class CritiqueTemplate:
    """Prompts of a reviser: `preamble` (worked examples), then a reply with a request that it continues."""

    name: str
    preamble: str
    conversation: str  # {prompt}, {response}
    critique: str  # {request}: asks for a critique; "" revises without one
    revision: str  # {request}
    stop: tuple[str, ...]  # texts that end a critique or a revision

    def critique_prompt(self, prompt: str, response: str, request: str) -> str:
        """What follows the preamble where a critique is asked for."""
        before = "\n\n" if self.preamble else ""
        return (
            before
            + self.conversation.format(prompt=prompt.strip(), response=response)
            + self.critique.format(request=request)
        )

    def revision_prompt(self, before: str, critique: str, request: str) -> str:
        """What follows the preamble where a revision is asked for. `before`: the prompt of its critique."""
        return before + (f" {critique}" if self.critique else "") + self.revision.format(request=request)

    def hash(self, prompt: str) -> str:
        """The hash of a whole prompt, preamble included."""
        return text_hash(self.preamble + prompt)

    @property
    def digest(self) -> str:
        """A hash of everything that the template puts before the reviser."""
        return text_hash("\x00".join((self.preamble, self.conversation, self.critique, self.revision, *self.stop)))


def load_critique_template(name: str, shots: int, revise_only: bool) -> CritiqueTemplate:
    """Reads a template: a name in `judge/critiques`, or the path of a YAML file.

    The file holds `conversation`, `critique`, `revision`, `stop` and `examples`, of which the first `shots` stand
    before each prompt. With `revise_only` neither they nor the prompts have critiques, and the file needs none. Raises
    UserError for a missing file, field or placeholder.
    """
    path = template_file(name, TEMPLATES, "critique template")
    fields = load_yaml(path, "critique template")
    try:
        return _template(path.stem, fields, shots, revise_only)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"critique template {path} is malformed: {error}".replace("\n", " ")) from error


def _template(name: str, fields: Any, shots: int, revise_only: bool) -> CritiqueTemplate:
    wanted = {"conversation", "critique", "revision", "stop", "examples"}
    if isinstance(fields, Mapping) and revise_only:
        fields = {"critique": "{request}"} | fields  # which nothing is asked by
    if not isinstance(fields, Mapping) or set(fields) != wanted:
        raise TypeError(f"it must have the fields {', '.join(sorted(wanted))}, and no others")
    texts = [fields[field] for field in ("conversation", "critique", "revision")]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("conversation, critique and revision must be texts")
    stop, examples = fields["stop"], fields["examples"]
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise TypeError("stop must be a list of texts, none of them empty")
    if not isinstance(examples, list) or len(examples) < shots:
        raise ValueError(f"critique.shots={shots} asks for more examples than it has")
    for text, placeholders in zip(texts, ({"prompt", "response"}, {"request"}, {"request"}), strict=True):
        if {field for _, field, _, _ in string.Formatter().parse(text) if field is not None} != placeholders:
            raise ValueError(f"it must use {sorted(placeholders)} in {text!r}")
    conversation, critique, revision = texts
    template = CritiqueTemplate(name, "", conversation, "" if revise_only else critique, revision, tuple(stop))
    return dataclasses.replace(template, preamble="\n\n".join(_shot(template, example) for example in examples[:shots]))


def _shot(template: CritiqueTemplate, example: Any) -> str:
    if isinstance(example, Mapping) and not template.critique:
        example = dict.fromkeys(_OF_CRITIQUES, "") | example
    if not isinstance(example, Mapping) or not all(isinstance(example.get(field), str) for field in _EXAMPLE):
        raise TypeError(f"each example must have the texts {', '.join(_EXAMPLE)}")
    before = template.critique_prompt(example["prompt"], example["response"], example["critique_request"])
    after = template.revision_prompt(before, example["critique"], example["revision_request"])
    return f"{after} {example['revision']}"
