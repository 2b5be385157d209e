"""Published shapes of open models, for plans of runs whose weights are elsewhere."""

from rlaif_jax.errors import UserError
from rlaif_jax.models.transformer import ModelConfig
from rlaif_jax.models.weights import SHAPE, open_weights


def _llama(width: int, mlp: int, layers: int, heads: int, head_dim: int, tied: bool) -> ModelConfig:
    """What all Llamas of version 3.1 and 3.2 have in common (Grattafiori et al., arXiv 2407.21783, table 3)."""
    return ModelConfig(
        vocab_size=128_256,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=head_dim,
        max_position_embeddings=131_072,
        rope_theta=500_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )


SHAPES = {
    "llama-3.2-1b": _llama(2_048, 8_192, 16, 32, 64, tied=True),
    "llama-3.1-8b": _llama(4_096, 14_336, 32, 32, 128, tied=False),
    "llama-3.1-70b": _llama(8_192, 28_672, 80, 64, 128, tied=False),
}


def model_config(weights: str) -> ModelConfig:
    """The shape of what `weights` names: a model, or shape:NAME. Raises UserError where there is no such thing."""
    if not weights.startswith(SHAPE):
        return open_weights(weights).config
    name = weights.removeprefix(SHAPE)
    if name not in SHAPES:
        raise UserError(f"unknown shape {name!r}; the shapes are {', '.join(SHAPES)}")
    return SHAPES[name]
