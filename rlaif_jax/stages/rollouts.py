"""Responses of the policy that is being trained, and the prompts that they reply to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.data.encoding import encode_prompts
from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.parallel.mesh import constrain, shard_batch
from rlaif_jax.sampling.buckets import bucket_of, length_buckets
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import make_stopping
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.training.rollout import Sampled
from rlaif_jax.training.sequences import Sequences


class Rollouts:
    """The prompts of each step, and responses to them."""

    def __init__(
        self, run: Run, stage: str, prompts: int, copies: int, sampling: SamplingConfig, what: str, one_shape: bool
    ):
        """prompts: of a step, each replied to `copies` times. what: the fields that say how many.

        one_shape: prompts are padded to the longest that the config allows, not to the step's bucket.
        """
        policy, sampler = run.config.policy, run.config.sampler
        self._run, self._model, self._copies, self._sampling = run, run.language_model(), copies, sampling
        self._texts = run.data("train_prompts")["prompt"]
        self._tokens, self._mask = encode_prompts(run.tokenizer(), self._texts, policy.max_prompt_length)
        self._lengths = self._mask.sum(axis=1)
        self._buckets = length_buckets(self._lengths, sampler.prompt_buckets, sampler.bucket_multiple)
        if one_shape:
            self._buckets = [policy.max_prompt_length]
        self._batches = shuffled_batches(range(len(self._texts)), prompts, run.order_seed(stage), what)
        self._stopping = make_stopping(run.tokenizer())

    def prompts(self, step: int) -> list[str]:
        """The prompt of each row of a step."""
        return [self._texts[row] for row in self._batches[step] for _ in range(self._copies)]

    def sample(self, params, step: int) -> Sampled:
        """The responses of a step, drawn from these parameters, each prompt read once for its copies."""
        run, policy = self._run, self._run.config.policy
        rows = np.asarray(self._batches[step])
        padding = max(policy.max_prompt_length - bucket_of(self._lengths[rows].max(), self._buckets), 0)
        ids = np.arange(len(rows) * self._copies, dtype=np.int32)
        arrays = (self._tokens[rows, padding:], self._mask[rows, padding:], ids)
        prompts, prompt_mask, row_ids = shard_batch(arrays, run.placement.mesh)
        replies = generate(
            decoding_model(self._model),
            decoding_parameters(self._model, params, run.placement),
            prompts,
            prompt_mask,
            run.key("rollout", step),
            row_ids,
            self._stopping,
            max_new_tokens=policy.max_response_length,
            sampling=self._sampling,
            cache_dtype=run.config.sampler.cache_dtype or self._model.config.dtype,
        )
        return joined(prompts, prompt_mask, replies.samples, replies.ended, copies=self._copies)


@functools.partial(jax.jit, static_argnames="copies")
def joined(prompts, prompt_mask, samples, ended, *, copies: int) -> Sampled:
    """Prompts [rows, prompt_length] with their replies [rows * copies, length], those to one prompt side by side.

    Split along the rows, as what is read from a checkpoint: another layout would be added up in another order.
    """
    prompts, prompt_mask = (jnp.repeat(x, copies, axis=0) for x in (prompts, prompt_mask))
    sampled = Sampled(Sequences(prompts, prompt_mask, samples.tokens, samples.mask), samples.logprobs, ended)
    return jax.tree.map(lambda x: constrain(x, "batch", *[None] * (x.ndim - 1)), sampled)
