import dataclasses
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from configs import quickstart
from rlaif_jax.config import Config, RLConfig, parse
from rlaif_jax.models.parameters import Placement
from rlaif_jax.models.transformer import LanguageModel, ModelConfig, ScalarModel, unembedding
from rlaif_jax.parallel.mesh import AxesConfig, MeshConfig, make_mesh
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.stopping import Stopping
from rlaif_jax.training.optimizer import OptimizerConfig
from rlaif_jax.training.reward_models import RewardModel
from rlaif_jax.training.sequences import Sequences

EOS = 1
SAMPLING = SamplingConfig(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0)
STOPPING = Stopping((EOS,), (), np.zeros((0, 0), np.uint8), np.zeros(0, np.int32))

TINY = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    rope_theta=100.0,  # low, so that positions matter within a few tokens
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)


def tiny(**changes) -> ModelConfig:
    return dataclasses.replace(TINY, **changes)


def optimizer_config(**changes) -> OptimizerConfig:
    numbers = {"b1": 0.9, "b2": 0.98, "eps": 1e-8, "weight_decay": 0.01, "max_grad_norm": 1.0}
    return dataclasses.replace(OptimizerConfig(1e-3, "constant", 0, **numbers, moment_dtype="float32"), **changes)


def quickstart_config() -> Config:
    return parse(quickstart.get_config().to_dict())


STAGES = quickstart_config().stages  # of the quickstart, in their order


@functools.cache
def _weights(model, seed):
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens, tokens)["params"])
    rng = np.random.default_rng(seed)

    def draw(path, x):
        is_norm = jax.tree_util.keystr(path).endswith("['scale']")
        mean, deviation = (1, 0.2) if is_norm else (0, model.config.hidden_size**-0.5)
        return rng.normal(mean, deviation, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_params(model: LanguageModel | ScalarModel, seed: int = 0) -> dict:
    """Weights by NumPy: nothing to compile."""
    return jax.tree.map(np.copy, _weights(model, seed))


@functools.partial(jax.jit, static_argnums=0, static_argnames="keep_keys")
def apply(model, params, tokens, segment_ids, positions=None, **arguments):
    return model.apply({"params": params}, tokens, segment_ids, positions, **arguments)


def full_logits(model, params, tokens) -> np.ndarray:
    hidden, _ = apply(model, params, tokens, np.ones_like(tokens))
    return np.asarray(hidden) @ np.asarray(unembedding(params))


def random_tokens(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(2, TINY.vocab_size, shape).astype(np.int32)


def random_sequences(seed: int, batch: int, prompt_length: int = 5, response_length: int = 6) -> Sequences:
    """Prompts of random lengths padded on the left, responses of random lengths that end with EOS."""
    rng = np.random.default_rng(seed)
    prompt_mask = np.arange(prompt_length) >= rng.integers(0, prompt_length, (batch, 1))
    lengths = rng.integers(1, response_length + 1, batch)
    response_mask = np.arange(response_length) < lengths[:, None]
    prompts = rng.integers(2, TINY.vocab_size, prompt_mask.shape) * prompt_mask
    responses = rng.integers(2, TINY.vocab_size, response_mask.shape) * response_mask
    responses[np.arange(batch), lengths - 1] = EOS
    return Sequences(prompts.astype(np.int32), prompt_mask, responses.astype(np.int32), response_mask)


def one_device_mesh():
    return make_mesh(axes(), jax.devices()[:1])


def eight_device_mesh():
    return make_mesh(axes(fsdp=4, tensor=2))


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device that nobody has, for meshes that nothing runs on."""

    id: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "none"


def axes(data: int = 1, fsdp: int = 1, tensor: int = 1, sequence: int = 1, replicated=()) -> AxesConfig:
    return AxesConfig(data, fsdp, tensor, sequence, replicated)


def mesh_config(slices: int, **sizes) -> MeshConfig:
    return MeshConfig(**vars(axes(**sizes)), slices=slices, offload=(), judge=axes())


def one_device() -> Placement:
    return Placement(one_device_mesh())


def eight_devices() -> Placement:
    return Placement(eight_device_mesh())


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def rl_config(**changes) -> RLConfig:
    fields = {"batch_size": 8, "minibatches": 2, "epochs": 1, "sampling": SAMPLING}
    return dataclasses.replace(quickstart_config().rl, **(fields | changes))


@dataclasses.dataclass(frozen=True)
class SmallDisk:
    """A disk to fill."""

    folder: Path

    def leave(self, room: int) -> None:
        """Fills it until `room` bytes are left, or frees what this has filled."""
        ballast = self.folder / "ballast"
        ballast.unlink(missing_ok=True)
        ballast.write_bytes(bytes(max(shutil.disk_usage(self.folder).free - room, 0)))


def largest_file(folder):
    return max((path for path in Path(folder).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def central_differences(function, x, step: float = 1e-6) -> np.ndarray:
    """The gradient of a scalar function of a float64 array, entry by entry."""
    x = np.asarray(x, np.float64)
    gradient = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        moved = np.zeros_like(x)
        moved[index] = step
        gradient[index] = (function(x + moved) - function(x - moved)) / (2 * step)
    return gradient


def one_reward_model(params) -> RewardModel:
    """Of one member, whose rewards count as they are."""
    members = jax.tree.map(lambda x: x[None], params)
    return RewardModel(members, jnp.zeros(1), jnp.float32(0), jnp.float32(1), "mean", 0.0)


def stand_in_for_cudnn(monkeypatch) -> list[str]:
    """Without a GPU, XLA stands in for cuDNN behind the same call. Returns the list that each call adds itself to."""
    called, dot_product_attention = [], jax.nn.dot_product_attention

    def by_xla(*args, implementation, **kwargs):
        called.append(implementation)
        return dot_product_attention(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    return called


def start_main(arguments, env: dict[str, str] | None = None) -> subprocess.Popen:
    """The command as a user starts it: the eight devices of the other tests would share its cores."""
    # To optimise the programs takes longer than their few calls gain, where SmolLM2 is in them, too.
    own = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-m", "rlaif_jax.main", *arguments]
    env = os.environ | own | (env or {})
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish_main(arguments) -> str:
    """What it prints."""
    printed, error = (process := start_main(arguments)).communicate()
    assert process.returncode == 0, error
    return printed
