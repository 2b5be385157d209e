"""Text to padded token arrays and back."""

import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data.layouts import messages
from rlaif_jax.data.tokenizers import continuation, end_tokens, special_tokens
from rlaif_jax.errors import UserError

# The day of a prompt must be the same whenever a run goes on: that of Llama 3's template where it can't ask the clock.
_DAY = "26 Jul 2024"
_NO_CLOCK = "{% macro strftime_now(format) %}" + _DAY + "{% endmacro %}"


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts through the chat template, as token lists that end where a reply begins.

    Role tokens that a prompt spells out are read as text. Raises UserError as `chat_text`.
    """
    role = re.compile("(" + "|".join(map(re.escape, special_tokens(tokenizer).values())) + ")")
    layouts = [role.split(_marked(tokenizer, turns)) for turns in map(messages, prompts)]  # every other one is a role
    contents = [[turn["content"] for turn in messages(prompt)] for prompt in prompts]
    pieces = [
        [_filled(text, content) for text in layout[::2]] for layout, content in zip(layouts, contents, strict=True)
    ]
    first = iter(texts_to_tokens(tokenizer, [texts[0] for texts in pieces]))
    later = [text for texts in pieces for text in texts[1:]]
    later = iter(texts_to_tokens(tokenizer, later, continuing=goes_on_after_roles(tokenizer)))
    roles = {token: index for index, token in special_tokens(tokenizer).items()}
    return [
        [*next(first), *(token for role in layout[1::2] for token in (roles[role], *next(later)))] for layout in layouts
    ]


def chat_text(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Mapping[str, str]], answered: bool = False) -> str:
    """The turns (`role`, `content`) through the chat template, up to where a reply begins, or `answered` by the last.

    Raises UserError for a tokenizer without chat template, and for turns that the template refuses.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template: use the weights of an instruction-tuned model, give its "
            "tokenizer_config.json a chat_template, or for a judge that is none set judge.prompt.chat=False"
        )
    template = tokenizer.get_chat_template()
    template = _NO_CLOCK + template if "strftime_now" in template else template
    # Neither a policy's reply nor a judge's answer begins with thoughts (Qwen 3, SmolLM3); other templates do not ask.
    asked = {"date_string": _DAY, "enable_thinking": False, "add_generation_prompt": not answered}
    try:
        return tokenizer.apply_chat_template(turns, chat_template=template, tokenize=False, **asked)
    except Exception as error:  # a template is a program, and comes with the model
        roles = ", ".join(turn["role"] for turn in turns)
        message = f"the tokenizer's chat template can't lay out the turns {roles}: {error}"
        raise UserError(message.replace("\n", " ")) from error


def _marked(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Mapping[str, str]]) -> str:
    """The chat template around marks in the places of the turns' contents."""
    return chat_text(tokenizer, [{"role": turn["role"], "content": f"\0{i}\0"} for i, turn in enumerate(turns)])


def _filled(text: str, contents: Sequence[str]) -> str:
    return re.sub("\0(\\d+)\0", lambda mark: contents[int(mark[1])], text)


def texts_to_tokens(
    tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], continuing: bool = False
) -> list[list[int]]:
    """The tokens of each text, none of them a role token. continuing: each goes on from a text, and begins none."""
    if not texts:
        return []
    if continuing and (twin := continuation(tokenizer)):
        return [found.ids for found in twin.encode_batch(list(texts), add_special_tokens=False)]
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


@functools.lru_cache(maxsize=8)
def goes_on_after_roles(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a text after a role token has no blank of SentencePiece's before it, as the tokenizer splits the whole.

    Llama 2's puts one before every such text, later ones ("prepend_scheme": "first") where the whole begins alone.
    """
    (text,) = texts_to_tokens(tokenizer, ["a"], continuing=True)
    return tokenizer(tokenizer.eos_token + "a", add_special_tokens=False)["input_ids"] == [
        tokenizer.eos_token_id,
        *text,
    ]


def response_tokens(tokenizer: PreTrainedTokenizerFast, responses: Sequence[str]) -> list[list[int]]:
    """The tokens of each response as it follows its prompt (`prompt_tokens`), without an end of sequence."""
    lead, continuing = _before_response(tokenizer)
    return texts_to_tokens(tokenizer, [lead + response for response in responses], continuing)


@functools.lru_cache(maxsize=8)
def _before_response(tokenizer: PreTrainedTokenizerFast) -> tuple[str, bool]:
    """The blanks that a chat template writes between a prompt and its response, and whether that goes on from a text.

    Matters where the tokenizer puts a blank before texts of its own: Llama 2's turns are "[INST] a [/INST]" and " b".
    """
    if continuation(tokenizer) is None or tokenizer.chat_template is None:
        return "", True
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "RESPONSE"}]
    prompt, whole = chat_text(tokenizer, turns[:1]), chat_text(tokenizer, turns, answered=True)
    lead = whole.removeprefix(prompt).partition("RESPONSE")[0]
    lead = lead if lead.isspace() else ""
    return lead, goes_on_after_roles(tokenizer) or not prompt.endswith(tuple(special_tokens(tokenizer).values()))


def tokens_to_text(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[int]) -> str:
    """What tokens add to a text, the blank included that SentencePiece's decoders leave out where a text begins."""
    (before,) = texts_to_tokens(tokenizer, ["a"], continuing=True)
    text = tokenizer.decode([*before, *tokens], skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.removeprefix("a")


def end_of_reply(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that ends a reply: what the chat template puts there, which for Gemma is not the end of sequence."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\0"}]
    try:
        after = chat_text(tokenizer, turns, answered=True).rpartition("\0")[2]
    except UserError:  # the template of a judge that writes no replies
        after = ""
    ends, special = end_tokens(tokenizer), special_tokens(tokenizer)
    found = {after.index(special[index]): index for index in ends if index in special and special[index] in after}
    return found[min(found)] if found else tokenizer.eos_token_id


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], length: int, of: str = "policy"
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts through the chat template, padded on the left. of: the config group that has their length.

    Returns (tokens [n, length] int32, mask [n, length] bool). Raises UserError for a prompt longer than that, and
    as `prompt_tokens`.
    """
    rows = prompt_tokens(tokenizer, prompts)
    for index, row in enumerate(rows):
        if len(row) > length:
            raise UserError(
                f"prompt {index} has {len(row)} tokens, more than {of}.max_prompt_length={length}: "
                f"{prompts[index][:60]!r}"
            )
    return _pad(rows, length, left=True)


def encode_responses(
    tokenizer: PreTrainedTokenizerFast, responses: Sequence[str], length: int, ended: Sequence[bool] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Responses with an end-of-sequence token, padded on the right.

    `ended` says which of a policy's own responses ended: the others reached the limit, and get no end-of-sequence
    token. Should the text of one take more tokens than it was sampled with, its end is cut off.

    Returns (tokens [n, length] int32, mask [n, length] bool). Without `ended` all responses get the token, and one
    that does not fit raises UserError.
    """
    rows = response_tokens(tokenizer, responses)
    ends = [True] * len(rows) if ended is None else ended
    last = end_of_reply(tokenizer)
    rows = [[*row, last] if end else row for row, end in zip(rows, ends, strict=True)]
    for index, row in enumerate(rows):
        if len(row) > length and ended is None:
            raise UserError(
                f"response {index} has {len(row)} tokens, more than policy.max_response_length={length}: "
                f"{responses[index][:60]!r}"
            )
    return _pad([row[:length] for row in rows], length, left=False)


def decode_responses(tokenizer: PreTrainedTokenizerFast, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each response, special tokens and surrounding blanks dropped."""
    rows = [row[valid].tolist() for row, valid in zip(np.asarray(tokens), np.asarray(mask, bool), strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def _pad(rows: list[list[int]], length: int, left: bool) -> tuple[np.ndarray, np.ndarray]:
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), length) if left else slice(0, len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask
