"""Text to padded token arrays and back."""

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data.layouts import messages
from rlaif_jax.errors import UserError


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[list[int]]:
    """Prompts through the chat template, as token lists that end where a reply begins.

    Raises UserError for a tokenizer without chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError("the policy's tokenizer has no chat template: use the weights of an instruction-tuned model")
    texts = [
        tokenizer.apply_chat_template(messages(prompt), add_generation_prompt=True, tokenize=False)
        for prompt in prompts
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts through the chat template, padded on the left.

    Returns (tokens [n, length] int32, mask [n, length] bool). Raises UserError for a prompt longer than that, and
    as `prompt_tokens`.
    """
    rows = prompt_tokens(tokenizer, prompts)
    for index, row in enumerate(rows):
        if len(row) > length:
            raise UserError(
                f"prompt {index} has {len(row)} tokens, more than policy.max_prompt_length={length}: "
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
    rows = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
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
