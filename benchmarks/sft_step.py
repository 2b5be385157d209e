"""An SFT step on 4 x 256 tokens: forward, backward and AdamW on all parameters, against transformers.

python benchmarks/sft_step.py
"""

import functools

import jax
import numpy as np
import optax
from harness import alternate, compute_bound, load, matrix_products, parser, report, start_peer, watch

from rlaif_jax.data.packing import PackedRows
from rlaif_jax.stages.sft import sft_loss
from rlaif_jax.training.state import init_state
from rlaif_jax.training.step import train_step


def main() -> None:
    """Prints the JSON line."""
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=4)
    flags.add_argument("--length", type=int, default=256)
    options = flags.parse_args()
    model, parameters, placement = load(options.shape, options.dtype)
    config, optimizer = model.config, optax.adamw(1e-5)
    state = init_state(model, parameters, optimizer, placement)
    del parameters
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (options.batch, options.length)).astype(np.int32)
    batch = PackedRows(tokens, np.ones_like(tokens), np.ones_like(tokens))
    loss = functools.partial(sft_loss, model=model)
    step = jax.jit(functools.partial(train_step, loss=loss, optimizer=optimizer), donate_argnums=0)
    losses = []

    def ours():
        nonlocal state
        state, metrics = step(state, batch)
        losses.append(float(jax.block_until_ready((state, metrics))[1]["loss"]))

    ours()
    peer = start_peer(options, {"task": "sft", "tokens": tokens.tolist()})
    products, product_flops = matrix_products(options.dtype)
    with watch(peer) as watched:
        ours_seconds, peer_seconds, product_seconds = alternate(options.runs, ours, peer, products)
    work = options.batch * options.length
    size = sum(x.size for x in jax.tree.leaves(state.params))
    # Six FLOPs a weight and token (the tied embedding counts once, as the output), and causal attention thrice.
    attention = 2 * options.length * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    more = compute_bound((6 * size + 3 * attention) * work, ours_seconds, product_flops, product_seconds)
    if peer:
        more |= {"first_loss": losses[0], "peer_first_loss": peer.ready["warm_up"]["loss"]}
        peer.close()
    name = f"sft step {options.batch} x {options.length}, {options.shape} {options.dtype}"
    report(name, "tokens", work, ours_seconds, peer_seconds, watched, **more)


if __name__ == "__main__":
    main()
