"""Loading a llama-family GGUF file: its configuration and its dequantised weights."""

import functools
import importlib.util
import re
from collections.abc import Mapping

import gguf
import numpy as np
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.files import file_hash
from rlaif_jax.models.transformer import ModelConfig

# Our name of a layer's weight -> GGUF's.
_LAYER_NAMES = {
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "output": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attention_norm": "attn_norm",
    "mlp_norm": "ffn_norm",
}


_KNOWN_TENSOR = re.compile(rf"(token_embd|output_norm|output|blk\.\d+\.({'|'.join(_LAYER_NAMES.values())}))\.weight")


SHAPE = "shape:"  # begins what names a shape without weights, see models/shapes.py


def resolve(path: str) -> epath.Path:
    """The file that `path` names; `package:NAME` is the one GGUF file inside an installed Python package.

    Raises UserError where there is none.
    """
    if path.startswith(SHAPE):
        raise UserError(f"{path} has no weights, and only python -m rlaif_jax.plan takes a shape: name a GGUF file")
    if path.startswith("package:"):
        package = path.removeprefix("package:")
        try:
            spec = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            spec = None
        if spec is None:
            raise UserError(f"the model package {package!r} is not installed: run bash launch/install.sh")
        folders = spec.submodule_search_locations or []
        files = sorted(file for folder in folders for file in epath.Path(folder).glob("*.gguf"))
        if len(files) != 1:
            raise UserError(f"package {package!r} holds {len(files)} GGUF files, expected one")
        return files[0]
    file = epath.Path(path)
    if not file.is_file():
        raise UserError(f"no GGUF file at {path}")
    return file


@functools.cache
def weights_hash(path: str) -> str:
    """xxh3 of the GGUF file that `path` names (`resolve`)."""
    return file_hash(resolve(path))


@functools.cache  # parsing the vocabulary takes seconds, and several stages and cells of a sweep open the same file
def open_gguf(path: str) -> gguf.GGUFReader:
    """Opens a GGUF file (`resolve`). Raises UserError where it is missing, damaged or of another family."""
    file = resolve(path)
    try:
        reader = gguf.GGUFReader(str(file))
        architecture = reader.fields["general.architecture"].contents()
        if architecture == "llama":
            model_config(reader)
    except Exception as error:  # gguf raises whatever its parser stumbles over
        raise UserError(f"{file} is not a readable GGUF file: {error!r}".replace("\n", " ")) from error
    if architecture != "llama":
        raise UserError(f"{file} holds a model of family {architecture!r}; only 'llama' is supported")
    unknown = [tensor.name for tensor in reader.tensors if not _KNOWN_TENSOR.fullmatch(tensor.name)]
    if unknown:
        raise UserError(f"{file} has weights that the decoder does not: {', '.join(unknown[:3])}")
    return reader


def model_config(reader: gguf.GGUFReader) -> ModelConfig:
    """The decoder's shape from the metadata of a GGUF file."""

    def field(name):
        return reader.fields[f"llama.{name}"].contents()

    tensors = {tensor.name: tensor for tensor in reader.tensors}
    return ModelConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=field("attention.head_count"),
        num_key_value_heads=field("attention.head_count_kv"),
        head_dim=int(tensors["blk.0.attn_q.weight"].shape[1]) // field("attention.head_count"),
        max_position_embeddings=field("context_length"),
        rope_theta=float(field("rope.freq_base")),
        rms_norm_eps=float(field("attention.layer_norm_rms_epsilon")),
        tie_word_embeddings="output.weight" not in tensors,
    )


def load_parameters(reader: gguf.GGUFReader, shuffle_seed: int | None = None) -> dict:
    """The parameters of a LanguageModel as float32 NumPy arrays, layers stacked.

    `shuffle_seed` permutes the entries of every matrix: a judge that has the same statistics and knows nothing
    (negative control).
    """
    config = model_config(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    rng = None if shuffle_seed is None else np.random.default_rng(shuffle_seed)

    def load(name: str) -> np.ndarray:
        tensor = tensors[name]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        if rng is not None and weight.ndim > 1:
            weight = rng.permuted(weight.ravel()).reshape(weight.shape)
        return weight

    def stacked(name: str) -> np.ndarray:
        layers = (f"blk.{i}.{_LAYER_NAMES[name]}.weight" for i in range(config.num_hidden_layers))
        return np.stack([_to_kernel(name, load(layer), config) for layer in layers])

    layers: dict = {}
    for name in _LAYER_NAMES:
        layers[name] = {"scale": stacked(name)} if name.endswith("norm") else stacked(name)
    decoder = {
        "embedding": load("token_embd.weight"),
        "layers": layers,
        "final_norm": {"scale": load("output_norm.weight")},
    }
    parameters: dict = {"decoder": decoder}
    if not config.tie_word_embeddings:
        parameters["lm_head"] = load("output.weight").T
    return parameters


def _to_kernel(name: str, weight: np.ndarray, config: ModelConfig) -> np.ndarray:
    """One layer's GGUF matrix [out, in] in the layout of our `Block`."""
    width, head_dim = config.hidden_size, config.head_dim
    if name in ("query", "key"):
        # GGUF stores the rows of q and k as interleaved rotary pairs; `rotate` works on halves.
        weight = weight.reshape(-1, head_dim // 2, 2, width).swapaxes(1, 2)
        return weight.reshape(-1, head_dim, width).transpose(2, 0, 1)
    if name == "value":
        return weight.reshape(-1, head_dim, width).transpose(2, 0, 1)
    if name == "output":
        return weight.reshape(width, -1, head_dim).transpose(1, 2, 0)
    return weight.T if weight.ndim == 2 else weight


def metadata(reader: gguf.GGUFReader, prefix: str) -> Mapping[str, object]:
    """The metadata fields whose name starts with `prefix`, by the rest of their name."""
    fields = reader.fields.items()
    return {name.removeprefix(prefix): field.contents() for name, field in fields if name.startswith(prefix)}
