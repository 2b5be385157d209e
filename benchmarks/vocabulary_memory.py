"""Memory of log-probs and their gradient at a vocabulary of 128k: in chunks, against all logits at once.

    python benchmarks/vocabulary_memory.py

Peaks are what the compiler plans beyond arguments and results.
"""

import argparse
import json

import harness  # noqa: F401  (finds the package)
import jax
import jax.numpy as jnp
import numpy as np

from rlaif_jax.losses.logprobs import token_logprobs


def main() -> None:
    """Prints the JSON line."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--batch", type=int, default=4)
    flags.add_argument("--length", type=int, default=512)
    flags.add_argument("--width", type=int, default=256)
    flags.add_argument("--vocab", type=int, default=128_256)
    options = flags.parse_args()
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(options.batch, options.length, options.width)).astype(np.float32)
    unembedding = rng.normal(size=(options.width, options.vocab)).astype(np.float32) / options.width**0.5
    targets = rng.integers(0, options.vocab, (options.batch, options.length)).astype(np.int32)

    def chunked(hidden, unembedding):
        return -jnp.mean(token_logprobs(hidden, unembedding, targets))

    def plain(hidden, unembedding):
        logprobs = jax.nn.log_softmax(hidden @ unembedding)
        return -jnp.mean(jnp.take_along_axis(logprobs, targets[..., None], axis=-1))

    found = {}
    for name, loss in (("chunked", chunked), ("plain", plain)):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, unembedding).compile()
        found[name] = compiled.memory_analysis().temp_size_in_bytes, compiled(hidden, unembedding)
    difference = jax.tree.map(lambda x, y: float(jnp.max(jnp.abs(x - y))), found["chunked"][1], found["plain"][1])
    line = {
        "task": f"memory of cross-entropy {options.batch} x {options.length} x {options.vocab}",
        "unit": "MiB",
        "ours": found["chunked"][0] / 2**20,
        "peer": found["plain"][0] / 2**20,
        "ratio": found["plain"][0] / found["chunked"][0],
        "max_difference": max(jax.tree.leaves(difference)),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
