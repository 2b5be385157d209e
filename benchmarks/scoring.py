"""Scoring 8 x 256 tokens: one forward pass and the log-probs at the last position, against transformers.

python benchmarks/scoring.py
"""

import jax
import numpy as np
from harness import alternate, compute_bound, load, matrix_products, parser, report, start_peer, watch

from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.models.transformer import next_token_logits


def main() -> None:
    """Prints the JSON line."""
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--length", type=int, default=256)
    options = flags.parse_args()
    stacked, parameters, placement = load(options.shape, options.dtype)
    model, parameters = decoding_model(stacked), decoding_parameters(stacked, parameters, placement)
    config = model.config
    tokens = np.random.default_rng(0).integers(3, config.vocab_size, (options.batch, options.length)).astype(np.int32)

    @jax.jit
    def forward(parameters):
        hidden, _ = model.apply({"params": parameters}, tokens, np.ones_like(tokens))
        logits = next_token_logits(model, parameters, hidden[:, -1])
        return jax.nn.log_softmax(logits)

    def ours():
        return jax.block_until_ready(forward(parameters))

    ours()
    peer = start_peer(options, {"task": "score", "tokens": tokens.tolist()})
    products, product_flops = matrix_products(options.dtype)
    with watch(peer) as watched:
        ours_seconds, peer_seconds, product_seconds = alternate(options.runs, ours, peer, products)
    work = options.batch * options.length
    weights = sum(x.size for x in jax.tree.leaves(parameters)) - config.vocab_size * config.hidden_size
    # Two FLOPs a weight and token, attention to the tokens before (half of them on average), and the last logits.
    flops = 2 * weights * work + 2 * work * options.length * config.num_hidden_layers * (
        config.num_attention_heads * config.head_dim
    )
    more = compute_bound(flops, ours_seconds, product_flops, product_seconds)
    if peer:
        found = np.asarray(forward(parameters))[:, :100]
        more["max_logprob_difference"] = float(np.abs(found - np.array(peer.answer["logprobs"])).max())
        peer.close()
    name = f"scoring {options.batch} x {options.length}, {options.shape} {options.dtype}"
    report(name, "tokens", work, ours_seconds, peer_seconds, watched, **more)


if __name__ == "__main__":
    main()
