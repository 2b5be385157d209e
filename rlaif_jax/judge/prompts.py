"""Judge prompts: what a template file says, rendered to what all prompts of a job share and what follows for a pair."""

import dataclasses
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import xxhash
import yaml
from etils import epath
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data.encoding import chat_text, goes_on_after_roles, texts_to_tokens
from rlaif_jax.data.tokenizers import beginning, special_tokens
from rlaif_jax.errors import UserError

METHODS = ("pairwise", "axes", "rating")
TEMPLATES = epath.Path(__file__).parent / "templates"
_PAIR = {"prompt", "response_1", "response_2"}
_ITEM = {"prompt", "response"}


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """What the judge is asked, and how."""

    template: str  # a name in rlaif_jax/judge/templates, or the path of a YAML file
    preamble: str  # a name under `preambles` there, e.g. "base" or "detailed"
    shots: int  # worked examples before the pair
    exemplars: str  # a YAML file of them; "" for those of the template
    method: str  # "pairwise", "axes" (a pairwise question each) or "rating" (each response by itself)
    chain_of_thought: bool  # the judge explains itself before it answers
    chat: bool  # through the chat template of an instruction-tuned judge; False is plain text, as for a base model


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt."""

    prompt: str
    response_a: str
    response_b: str
    principle: str | None = None  # the id of that of a constitution under which they are compared
    principle_text: str | None = None  # its text for comparisons


@dataclasses.dataclass(frozen=True)
class Reasoning:
    """Chain of thought in two steps: the judge writes a rationale, then answers (arXiv 2309.00267, section 2.1.2)."""

    cue: str  # what follows the pair and begins the rationale
    stop: tuple[str, ...]  # texts that end a rationale


class Prompt(NamedTuple):
    """A prompt in the parts that are split into tokens apart. Only `opening` and `turn` may hold role tokens."""

    opening: str
    message: str
    turn: str
    reply: str

    @property
    def text(self) -> str:
        """The whole prompt."""
        return "".join(self)


class Frame(NamedTuple):
    """What a chat template puts before the user's message, and between it and the reply."""

    opening: str = ""  # up to the last role token
    before: str = ""
    after: str = ""
    turn: str = ""  # from the first role token to the last one; "" where a template writes roles as text ("[/INST]")
    reply: str = ""


PLAIN = Frame()  # for a base model: the text by itself


@dataclasses.dataclass(frozen=True)
class Template:
    """A judge prompt in the four parts of Lee et al. (arXiv 2309.00267, section 2.1), for one method.

    A prompt is `preamble` (instruction and worked examples, the same for every pair), `item` filled in (the pair in
    one order, or one response), and a question, or before it the cue to a rationale. The judge answers every question
    with one of `choices`.
    """

    name: str
    method: str
    preamble: str
    item: str
    questions: tuple[str, ...]  # one, or for the method "axes" one an axis
    axes: tuple[str, ...]  # the names of the questions
    choices: tuple[str, ...]
    inverted: bool  # the judge names the worse response
    by_principle: bool = False  # `item` has a place for the principle of a pair
    reasoning: Reasoning | None = None
    frame: Frame = PLAIN

    def prompts(self, pair: Pair) -> tuple[str, str]:
        """What is judged, as text: a pair with response a and with response b in slot 1, or response a and b."""
        both = pair.response_a, pair.response_b
        if self.method == "rating":
            return tuple(self.item.format(prompt=pair.prompt, response=response) for response in both)
        if self.by_principle and pair.principle_text is None:
            raise UserError(f"judge template {self.name} asks for the principle of a pair, and this one has none")
        return tuple(
            self.item.format(prompt=pair.prompt, response_1=first, response_2=second, principle=pair.principle_text)
            for first, second in (both, both[::-1])
        )

    def asked(self, pair: Pair) -> list[Prompt]:
        """The prompts of a pair: for each of `prompts` every question, or the cue to a rationale."""
        endings = (self.reasoning.cue,) if self.reasoning else self.questions
        return [self._prompt(text, ending) for text in self.prompts(pair) for ending in endings]

    def rated(self, prompt: str, response: str) -> Prompt:
        """The prompt by which one response is rated, for the method "rating"."""
        return self._prompt(self.item.format(prompt=prompt, response=response), self.questions[0])

    def _prompt(self, text: str, ending: str) -> Prompt:
        frame = self.frame
        if (
            frame != PLAIN
        ):  # the ending begins the reply, and has blank lines before it where it follows the text itself
            ending = ending.lstrip()
        message = frame.before + self.preamble + text + frame.after
        if not frame.turn:
            return Prompt(frame.opening, message + ending, "", "")
        return Prompt(frame.opening, message, frame.turn, frame.reply + ending)

    @property
    def digest(self) -> str:
        """A hash of everything that the template puts before the judge, and of what its answers mean."""
        reasoning = (self.reasoning.cue, *self.reasoning.stop) if self.reasoning else ()
        parts = (self.method, self.preamble, self.item, *self.questions, *self.choices, str(self.inverted))
        return text_hash("\x00".join((*parts, *reasoning, *self.frame)))


def text_hash(text: str) -> str:
    """xxh3 of a text, 16 hexadecimal digits."""
    return xxhash.xxh3_64_hexdigest(text.encode())


def encode(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], continuing: bool = False) -> list[list[int]]:
    """The tokens of prompts that all have the same opening, or none and then what the tokenizer begins a text with.

    Role tokens that a post or a response spells out are read as text, not as roles. continuing: the prompts are the
    rest of ones of which all before has been read.
    """
    roles = {text: tokenizer(text, add_special_tokens=False)["input_ids"] for p in prompts for text in (p[0], p[2])}
    begin = [] if continuing else beginning(tokenizer)
    after_role = goes_on_after_roles(tokenizer)
    opened = any(prompt.opening for prompt in prompts)
    messages = texts_to_tokens(tokenizer, [prompt.message for prompt in prompts], after_role if opened else continuing)
    replies = texts_to_tokens(tokenizer, [prompt.reply for prompt in prompts], after_role)
    return [
        [*(roles[prompt.opening] or begin), *message, *roles[prompt.turn], *reply]
        for prompt, message, reply in zip(prompts, messages, replies, strict=True)
    ]


def chat_frame(tokenizer: PreTrainedTokenizerFast) -> Frame:
    """The frame of a tokenizer's chat template. Raises UserError where it has none."""
    message = "MESSAGE"
    before, after = chat_text(tokenizer, [{"role": "user", "content": message}]).split(message)
    role = re.compile("|".join(map(re.escape, special_tokens(tokenizer).values())))
    opened, closed = list(role.finditer(before)), list(role.finditer(after))
    begin = opened[-1].end() if opened else 0
    first, last = (closed[0].start(), closed[-1].end()) if closed else (len(after), len(after))
    return Frame(before[:begin], before[begin:], after[:first], after[first:last], after[last:])


def load_template(config: PromptConfig) -> Template:
    """Reads a template: a name in `judge/templates`, or the path of a YAML file; without the frame of a chat.

    The file holds `preambles` (name -> instruction), `comparison`, `verdict` (what leads to the answer), `choices`
    (two) and `examples`: a list of `prompt`, `response_1`, `response_2` and `choice` (1 or 2). `comparison` may have a
    place for the {principle} of a pair, and each example then a `principle`; after the responses, a pair under several
    principles is read once. The file may hold `inverted` (the choice names the worse response); for a chain of thought
    `reasoning`, of `cue` (what begins the rationale) and `stop` (a list of texts that end it), and a `rationale` in
    each example; `axes` (name -> question); and `rating`, of `preamble`, `item`, `verdict` and `scores`, the lowest
    first. Raises UserError for a missing file, field or placeholder.
    """
    path = template_file(config.template, TEMPLATES, "judge template")
    fields = _read(path)
    try:
        template = _template(config, path, _File(**fields))
        return dataclasses.replace(template, preamble=template.preamble + _shots(config, path, template, fields))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"judge template {path} is malformed: {error}".replace("\n", " ")) from error


def template_file(name: str, folder: epath.Path, what: str) -> epath.Path:
    """The YAML file of a name in `folder`, or of a path. Raises UserError where it is not there."""
    path = epath.Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.exists():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise UserError(f"no {what} {name!r}; there are {', '.join(known)}, or give the path of a YAML file")
    return path


@dataclasses.dataclass(frozen=True)
class _File:
    """The fields of a template file."""

    preambles: dict
    comparison: str
    verdict: str
    choices: list
    examples: list
    inverted: bool = False
    reasoning: dict = dataclasses.field(default_factory=dict)
    axes: dict = dataclasses.field(default_factory=dict)
    rating: dict = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not isinstance(getattr(self, field.name), field.type):
                raise TypeError(f"{field.name} must be a {field.type.__name__}")
        texts = [*self.preambles.values(), *self.choices, *self.axes.values()]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("every preamble, choice and axis must be a text (numbers in quotes)")


def _read(path: epath.Path) -> dict[str, Any]:
    fields = load_yaml(path, "judge template")
    if not isinstance(fields, dict):
        raise UserError(f"judge template {path} must be a mapping of fields")
    known = [field.name for field in dataclasses.fields(_File)]
    if unknown := sorted(map(str, set(fields) - set(known))):
        raise UserError(f"judge template {path} has an unknown field {unknown[0]}; the fields are {', '.join(known)}")
    return fields


def load_yaml(path: epath.Path, what: str) -> Any:
    """What a YAML file holds. Raises UserError, which calls it `what`, where it is no YAML or has a key twice."""
    try:
        return yaml.load(path.read_text(), _UniqueKeys)
    except _Twice as error:
        raise UserError(f"{what} {path} {error}: leave one of them out") from error
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} {path} is not YAML: {error}".replace("\n", " ")) from error


class _Twice(Exception):
    """Which key a mapping has twice, and where."""


class _UniqueKeys(yaml.SafeLoader):
    """Of two values under one key the last would win in silence."""

    def compose_mapping_node(self, anchor):
        node, lines = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            name, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if name in lines:
                raise _Twice(f"has the key {key.value!r} twice, in the lines {lines[name]} and {line}")
            lines[name] = line
        return node


def _template(config: PromptConfig, path: epath.Path, file: _File) -> Template:
    """The template without worked examples."""
    reasoning = _reasoning(file.reasoning) if config.chain_of_thought else None
    rating = config.method == "rating"
    if rating:
        preamble, item = _texts("rating", file.rating, "preamble", "item")
        axes, questions, choices = ("",), _texts("rating", file.rating, "verdict"), tuple(file.rating["scores"])
        if len(choices) < 2 or not all(isinstance(score, str) and score for score in choices):
            raise TypeError("rating.scores must be two texts or more (numbers in quotes), the lowest first")
    else:
        if config.preamble not in file.preambles:
            raise KeyError(f"no preamble {config.preamble!r}, only {', '.join(file.preambles)}")
        preamble, item, choices = file.preambles[config.preamble], file.comparison, tuple(file.choices)
        asked = file.axes if config.method == "axes" else {"": file.verdict}
        axes, questions = tuple(asked), tuple(asked.values())
        if not asked:
            raise KeyError("it has no axes to ask for")
        if len(choices) != 2 or any(one.startswith(other) for one, other in (choices, choices[::-1])):
            raise ValueError(f"it must have two choices, none the beginning of the other: {choices}")
    if reasoning and not all(questions):
        raise ValueError("after a rationale it needs a verdict to lead to the answer")
    placeholders = _placeholders(item)
    wanted = _ITEM if rating else _PAIR
    if not wanted <= placeholders <= (wanted if rating else wanted | {"principle"}):
        raise ValueError(f"it must use {sorted(wanted)}, not {sorted(placeholders)}: {item!r}")
    if config.shots and config.method != "pairwise":
        raise ValueError(f"its examples are for pairwise questions: judge.prompt.method={config.method} needs shots=0")
    name = f"{path.stem}:{config.method if rating else config.preamble},{config.shots}-shot"
    name += (",axes" if config.method == "axes" else "") + (",cot" if reasoning else "")
    preamble += "\n\n" if preamble else ""
    inverted = file.inverted and not rating
    by_principle = "principle" in placeholders
    return Template(name, config.method, preamble, item, questions, axes, choices, inverted, by_principle, reasoning)


def _texts(group: str, fields: Mapping, *names: str) -> tuple[str, ...]:
    if not isinstance(fields, Mapping):
        raise TypeError(f"{group} must be a mapping of fields")
    for name in names:
        if not isinstance(fields.get(name), str):
            raise TypeError(f"it needs a text {group}.{name}")
    return tuple(fields[name] for name in names)


def _reasoning(fields: Mapping) -> Reasoning:
    (cue,) = _texts("reasoning", fields, "cue")
    stop = fields.get("stop")
    if not isinstance(stop, list) or not all(isinstance(text, str) and text and "\0" not in text for text in stop):
        raise TypeError("reasoning.stop must be a list of texts, none of them empty")
    return Reasoning(cue, tuple(stop))


def _placeholders(item: str) -> set[str]:
    return {
        field + (f"!{conversion}" if conversion else "") + (f":{form}" if form else "")
        for _, field, form, conversion in string.Formatter().parse(item)
        if field is not None
    }


def _shots(config: PromptConfig, path: epath.Path, template: Template, fields: Mapping) -> str:
    """`config.shots` worked examples, each with its answer and, before it, its rationale."""
    examples = fields["examples"]
    if config.exemplars:
        path = epath.Path(config.exemplars)
        if not path.exists():
            raise UserError(f"judge.prompt.exemplars={path} does not exist")
        examples = load_yaml(path, "file of examples")
    if not isinstance(examples, list) or len(examples) < config.shots:
        count = len(examples) if isinstance(examples, list) else "no list of"
        raise UserError(f"judge.prompt.shots={config.shots}, but {path} has {count} examples")
    shots = []
    for index, example in enumerate(examples[: config.shots]):
        try:
            pair = Pair(*_texts("example", example, "prompt", "response_1", "response_2"))
            if template.by_principle:
                (text,) = _texts("example", example, "principle")
                pair = dataclasses.replace(pair, principle_text=text)
            reasoning = template.reasoning.cue + example["rationale"] if template.reasoning else ""
            if example["choice"] not in (1, 2):
                raise TypeError(f"choice: {example['choice']!r} is neither 1 nor 2")
            answer = template.questions[0] + template.choices[example["choice"] - 1]
            shots.append(f"{template.prompts(pair)[0]}{reasoning}{answer}\n\n")
        except (KeyError, TypeError) as error:
            raise UserError(f"judge template {path}, example {index}: missing or wrong {error}") from error
    return "".join(shots)
