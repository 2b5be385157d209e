"""Continuous against static batching on replies of heavy-tailed lengths, both ours.

    python benchmarks/continuous_batching.py

Static batching decodes a batch until its longest reply ends; continuous batching refills each slot as its reply ends.
Both give the same replies. Their lengths follow a geometric distribution: a random 1 / --mean of the vocabulary ends a
reply, and tokens are drawn at a high temperature.
"""

import jax
import jax.numpy as jnp
import numpy as np
from harness import alternate, load, parser, report, watch

from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.sampling.continuous import Sampler, SamplerConfig, sample
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import Stopping


def main() -> None:
    """Prints the JSON line."""
    flags = parser(__doc__)
    flags.add_argument("--replies", type=int, default=64)
    flags.add_argument("--slots", type=int, default=16)
    flags.add_argument("--prompt", type=int, default=32)
    flags.add_argument("--mean", type=int, default=24, help="of the replies' lengths")
    flags.add_argument("--limit", type=int, default=192)
    options = flags.parse_args()
    stacked, parameters, placement = load(options.shape, options.dtype)
    model, parameters = decoding_model(stacked), decoding_parameters(stacked, parameters, placement)
    rng, vocab = np.random.default_rng(0), model.config.vocab_size
    ends = tuple(np.sort(rng.choice(vocab, vocab // options.mean, replace=False)).tolist())
    stopping = Stopping(ends, (), jnp.zeros((0, 0), jnp.uint8), jnp.zeros(0, jnp.int32))
    prompts = rng.integers(3, vocab, (options.replies, options.prompt)).astype(np.int32)
    sampling = SamplingConfig(temperature=5.0, top_k=0, top_p=1.0, min_p=0.0)
    key = jax.random.key(0)
    config = SamplerConfig(options.slots, max(options.slots // 4, 1), 8, 1, 1, options.dtype)
    sampler = Sampler(model, parameters, placement, stopping, sampling, options.limit, config)
    rows = np.arange(options.replies, dtype=np.int32)

    def continuous():
        return dict(sample(sampler, prompts.tolist(), key, range(options.replies)))

    def static():
        lengths = []
        for start in range(0, options.replies, options.slots):
            chosen = prompts[start : start + options.slots]
            replies = generate(
                model,
                parameters,
                chosen,
                np.ones_like(chosen),
                key,
                rows[start : start + options.slots],
                stopping,
                max_new_tokens=options.limit,
                sampling=sampling,
                cache_dtype=options.dtype,
            )
            lengths += jax.device_get(replies.length).tolist()
        return lengths

    replies, lengths = continuous(), static()
    assert [len(replies[row].tokens) for row in range(options.replies)] == lengths, "the replies differ"
    with watch() as watched:
        continuous_seconds, static_seconds = alternate(options.runs, continuous, static)
    more = {"peer_is": "our own static batches", "mean_length": float(np.mean(lengths)), "longest": max(lengths)}
    name = f"continuous batching, {options.replies} replies in {options.slots} slots, {options.shape} {options.dtype}"
    report(name, "tokens", sum(lengths), continuous_seconds, static_seconds, watched, **more)


if __name__ == "__main__":
    main()
