"""The loss on packed rows: cross-entropy of the completions, for SFT and beside a reward (PPO-ptx)."""

from rlaif_jax.data.packing import PackedRows
from rlaif_jax.losses.logprobs import token_logprobs
from rlaif_jax.losses.sft import completion_loss
from rlaif_jax.models.transformer import LanguageModel, unembedding


def sft_loss(params, batch: PackedRows, model: LanguageModel):
    """Sum over completion tokens and their number: a `training.step.Loss`."""
    hidden, _ = model.apply({"params": params}, batch.tokens, batch.segment_ids)
    cap = model.config.final_logit_softcapping
    logprobs = token_logprobs(hidden[:, :-1], unembedding(params), batch.tokens[:, 1:], cap=cap)
    return *completion_loss(logprobs, batch.completion_mask[:, 1:]), {}
