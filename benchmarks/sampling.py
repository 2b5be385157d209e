"""Sampling 16 x (64 -> 64) tokens at temperature 1 with a KV cache, against transformers.

    python benchmarks/sampling.py

The log-probs that the sampler returns are compared with those of a full forward pass over what it sampled.
"""

import jax
import jax.numpy as jnp
import numpy as np
from harness import SPECIFIED, alternate, load, parser, report, start_peer, watch

from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import Stopping
from rlaif_jax.training.sequences import Sequences, response_logprobs


def main() -> None:
    """Prints the JSON line."""
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=16)
    flags.add_argument("--prompt", type=int, default=64)
    flags.add_argument("--new", type=int, default=64)
    flags.add_argument("--cache-dtype", default="", help="float32, bfloat16 or int8; default: that of the computation")
    options = flags.parse_args()
    stacked, parameters, placement = load(options.shape, options.dtype)
    model, decoding = decoding_model(stacked), decoding_parameters(stacked, parameters, placement)
    shape = (options.batch, options.prompt)
    tokens = np.random.default_rng(0).integers(3, model.config.vocab_size, shape).astype(np.int32)
    nothing_stops = Stopping((), (), jnp.zeros((0, 0), jnp.uint8), jnp.zeros(0, jnp.int32))
    seeds = iter(range(1000))

    def ours():
        replies = generate(
            model,
            decoding,
            tokens,
            np.ones_like(tokens),
            jax.random.key(next(seeds)),
            np.arange(options.batch, dtype=np.int32),
            nothing_stops,
            max_new_tokens=options.new,
            sampling=SamplingConfig(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
            cache_dtype=options.cache_dtype or options.dtype,
        )
        return jax.block_until_ready(replies.samples)

    samples = ours()
    sequences = Sequences(tokens, np.ones_like(tokens), samples.tokens, samples.mask)
    exact = jax.jit(response_logprobs, static_argnums=(0, 3))(stacked, parameters, sequences, 1.0)
    difference = float(jnp.max(jnp.abs(exact - samples.logprobs)))
    bytes_read = sum(x.nbytes for x in jax.tree.leaves(decoding))
    del parameters
    peer = start_peer(options, {"task": "sample", "tokens": tokens.tolist(), "new": options.new})
    with watch(peer) as watched:
        ours_seconds, peer_seconds = alternate(options.runs, ours, peer)
    if peer:
        peer.close()
    work = options.batch * options.new
    name = f"sampling {options.batch} x ({options.prompt} -> {options.new}), {options.shape} {options.dtype}"
    bandwidth = bytes_read * options.new / float(np.median(ours_seconds))
    more = {
        "max_logprob_difference_to_full_forward": difference,
        "gigabytes_of_weights_a_second": bandwidth / 1e9,
        "cache_dtype": options.cache_dtype or options.dtype,
    }
    _, specified = SPECIFIED.get(jax.devices()[0].device_kind, (None, None))
    if specified is not None:
        more["share_of_specified_bandwidth"] = bandwidth / specified
    report(name, "tokens", work, ours_seconds, peer_seconds, watched, **more)


if __name__ == "__main__":
    main()
