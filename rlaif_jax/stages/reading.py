"""How a model reads prompts and responses: the policy, and the reward model, whose tokenizer may be another."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import encode_prompts, encode_responses, end_of_reply, prompt_tokens
from rlaif_jax.data.prepare import COLUMNS
from rlaif_jax.errors import UserError, blame
from rlaif_jax.stages.run import Run
from rlaif_jax.training.sequences import Sequences


@dataclasses.dataclass(frozen=True)
class Reader:
    """A tokenizer, and the most tokens of a prompt and of a response."""

    tokenizer: PreTrainedTokenizerFast
    prompt_length: int
    response_length: int
    group: str  # of the config, that has the lengths

    def prompts(self, prompts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_prompts`, each through the chat template."""
        return encode_prompts(self.tokenizer, prompts, self.prompt_length, self.group)

    def responses(self, responses: Sequence[str], ended: Sequence[bool]) -> tuple[np.ndarray, np.ndarray]:
        """As `encode_responses`: of a response that is too long what fits, and an end only where there was one."""
        return encode_responses(self.tokenizer, responses, self.response_length, ended)

    def sequences(self, prompts: Sequence[str], responses: Sequence[str], ended: Sequence[bool]) -> Sequences:
        """Both: [n, length] each. Raises UserError for a prompt that is too long."""
        return Sequences(*self.prompts(prompts), *self.responses(responses, ended))

    def cut(self, sequences: Sequences, ended: Sequence[bool]) -> np.ndarray:
        """[n] bool: which responses that ended were too long, so that their end is missing."""
        full = sequences.response_mask[:, -1] & (sequences.responses[:, -1] != end_of_reply(self.tokenizer))
        return full & np.asarray(ended, bool)


def policy_reader(run: Run) -> Reader:
    """How the policy reads."""
    return Reader(run.tokenizer(), *run.config.policy.lengths, "policy")


def reward_reader(run: Run) -> Reader:
    """How the reward model reads: as the policy, or by the tokenizer and chat template of weights of its own."""
    weights = run.config.reward_model.weights
    if not weights:
        return policy_reader(run)
    return Reader(tokenizers.from_weights(weights), *run.config.reward_lengths, "reward_model")


def check_reward_reader(run: Run) -> None:
    """Raises UserError for weights of a reward model whose tokenizer can't lay out a prompt."""
    weights = run.config.reward_model.weights
    if not weights or "reward_model" not in run.config.stages:
        return
    with blame("reward_model.weights"):
        prompt_tokens(tokenizers.from_weights(weights), ["a"])


def check_prompts(run: Run) -> None:
    """Raises UserError where the data has prompts that a reward model with a tokenizer of its own has no room for.

    They were fitted to the policy; what scores them as RL goes on must not be the first to find one too long.
    """
    if not run.config.reward_model.weights or "reward_model" not in run.config.stages:
        return
    reader = reward_reader(run)
    for name in (name for name in COLUMNS if name != "demonstrations"):
        lengths = [len(tokens) for tokens in prompt_tokens(reader.tokenizer, run.data(name)["prompt"])]
        longer = [length for length in lengths if length > reader.prompt_length]
        if longer:
            raise UserError(
                f"{len(longer)} of the {len(lengths)} prompts of data.{name} have more than "
                f"config.reward_model.max_prompt_length={reader.prompt_length} tokens of reward_model.weights, up to "
                f"{max(longer)}: raise it to that, or lower policy.max_prompt_length"
            )
