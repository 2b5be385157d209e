"""Text to padded token arrays and back."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data.layouts import messages
from rlaif_jax.data.tokenizers import special_tokens
from rlaif_jax.errors import UserError

# The day of a prompt must be the same whenever a run goes on: that of Llama 3's template where it can't ask the clock.
_DAY = "26 Jul 2024"
_NO_CLOCK = "{% macro strftime_now(format) %}" + _DAY + "{% endmacro %}"


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts through the chat template, as token lists that end where a reply begins.

    Role tokens that a prompt spells out are read as text. Raises UserError as `chat_text`.
    """
    role = re.compile("(" + "|".join(map(re.escape, special_tokens(tokenizer).values())) + ")")
    pieces = [role.split(_marked(tokenizer, turns)) for turns in map(messages, prompts)]  # every other one is a role
    contents = [[turn["content"] for turn in messages(prompt)] for prompt in prompts]
    texts = [_filled(text, content) for parts, content in zip(pieces, contents, strict=True) for text in parts[::2]]
    tokens = iter(texts_to_tokens(tokenizer, texts))
    roles = {token: index for index, token in special_tokens(tokenizer).items()}
    return [[x for i, part in enumerate(parts) for x in ([roles[part]] if i % 2 else next(tokens))] for parts in pieces]


def chat_text(tokenizer: PreTrainedTokenizerFast, turns: Sequence[Mapping[str, str]]) -> str:
    """The turns (`role`, `content`) through the chat template, up to where a reply begins.

    Raises UserError for a tokenizer without chat template, and for turns that the template refuses.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "the tokenizer has no chat template: use the weights of an instruction-tuned model, or for a judge that "
            "is none judge.prompt.chat=False"
        )
    template = tokenizer.get_chat_template()
    template = _NO_CLOCK + template if "strftime_now" in template else template
    # Neither a policy's reply nor a judge's answer begins with thoughts (Qwen 3, SmolLM3); other templates do not ask.
    asked = {"date_string": _DAY, "enable_thinking": False, "add_generation_prompt": True}
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


def texts_to_tokens(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of each text, none of them a role token."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, split_special_tokens=True)["input_ids"]


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
    rows = texts_to_tokens(tokenizer, responses)
    ends = [True] * len(rows) if ended is None else ended
    rows = [[*row, tokenizer.eos_token_id] if end else row for row, end in zip(rows, ends, strict=True)]
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
