"""Memory and time to load a Hugging Face folder of random bfloat16 weights: ours on 1 and 8 CPU devices, and the peer.

    python benchmarks/load_memory.py
    python benchmarks/load_memory.py --shape=small --no-peer

Each load is a process of its own. Its peak is what was ever resident, pages of mapped files and the interpreter
included, without the parameters that it made: "beyond". That holds where it is at most the largest tensor and 1 GiB.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import harness
import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.parameters import Placement, abstract_parameters, parameter_shapes
from rlaif_jax.models.shapes import SHAPES
from rlaif_jax.models.transformer import LanguageModel, ModelConfig
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.parallel.mesh import AxesConfig, make_mesh
from rlaif_jax.progress import progress

SMALL = ModelConfig(32_768, 1024, 4096, 8, 16, 8, 64, 8192, 500_000.0, 1e-5, tie_word_embeddings=True)
SHARD_BYTES = 10**9
GIB = 2**30


def main() -> None:
    """Prints the JSON lines."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shape", choices=["small", *SHAPES], default="llama-3.2-1b")
    flags.add_argument("--dtype", default="float32", help="of the parameters in memory")
    flags.add_argument("--peer-python", help="a Python with torch and transformers; default: .peer, made once")
    flags.add_argument("--no-peer", action="store_true", help="our side alone")
    flags.add_argument("--load", help=argparse.SUPPRESS)  # the process that loads, and prints what it measured
    flags.add_argument("--devices", type=int, help=argparse.SUPPRESS)
    options = flags.parse_args()
    if options.load:
        return print(json.dumps(measure(options.load, options.devices, options.dtype)))
    with tempfile.TemporaryDirectory() as folder:
        largest, size = write_checkpoint(
            pathlib.Path(folder), SMALL if options.shape == "small" else SHAPES[options.shape]
        )
        peer = None if options.no_peer else harness.Peer(options, "load_peer.py", {"folder": folder})
        if peer:
            peer.close()
        for devices in (1, 8):
            report(options, devices, run(folder, devices, options.dtype), peer and peer.answer, largest, size)
    return None


def write_checkpoint(folder: pathlib.Path, config: ModelConfig) -> tuple[int, int]:
    """Writes config.json and shards; returns the bytes of the largest tensor and of all."""
    tensors, weight_map, shard, sizes, files = named_shapes(config), {}, {}, [], 0
    noise = np.random.default_rng(0).normal(0, 0.02, 2**24).astype(ml_dtypes.bfloat16)

    def write():
        file = f"model-{files:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, shape in progress(tensors.items(), "writing", total=len(tensors), unit="tensor"):
        tensor = np.resize(noise, shape)  # the same again and again: only the bytes count
        if sum(each.nbytes for each in shard.values()) + tensor.nbytes > SHARD_BYTES:
            write()
            files += 1
        shard[name] = tensor
        sizes.append(tensor.nbytes)
    write()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim")
    more = ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")
    hf = {name: getattr(config, name) for name in fields + more}
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    hf |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "rope_parameters": rope}
    (folder / "config.json").write_text(json.dumps(hf))
    return max(sizes), sum(sizes)


def named_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama, [out, in]."""
    family, found = FAMILIES["llama"], {}
    for name, shape in parameter_shapes(LanguageModel(config)).items():
        if name in ("query", "key", "value"):
            shape = (shape[1] * shape[2], shape[0])
        elif name == "output":
            shape = (shape[2], shape[0] * shape[1])
        elif name in ("gate", "up", "down", "lm_head"):
            shape = shape[::-1]
        if name in family.layer:
            beginnings = [family.whole["layers"].format(i) for i in range(config.num_hidden_layers)]
            found |= {beginning + family.layer[name]: shape for beginning in beginnings}
        else:
            found[family.whole[name]] = shape
    return found


def run(folder: str, devices: int, dtype: str) -> dict:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, f"--load={folder}", f"--devices={devices}", f"--dtype={dtype}"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def measure(folder: str, devices: int, dtype: str) -> dict:
    """Loads, split over all devices, and says how much memory was resident at most."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = make_mesh(AxesConfig(data=1, fsdp=-1, tensor=1, sequence=1, replicated=()))
    before, began = resident("VmRSS"), time.perf_counter()
    weights = open_weights(folder)
    params = load_parameters(weights, abstract_parameters(LanguageModel(weights.config), Placement(mesh)), dtype)
    jax.block_until_ready(params)
    arrays = sum(x.nbytes for x in jax.tree.leaves(params))
    return {"seconds": time.perf_counter() - began, "peak": resident("VmHWM"), "before": before, "arrays": arrays}


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most until now (VmHWM)."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])


def report(options, devices: int, ours: dict, peer: dict | None, largest: int, size: int) -> None:
    """Prints a line. The ratio is of what peaks were beyond the parameters."""
    beyond = ours["peak"] - ours["arrays"]
    line = {
        "task": f"memory to load {options.shape} ({size / GIB:.2f} GiB) as {options.dtype} on {devices} devices",
        "unit": "MiB",
        "ours": beyond / 2**20,
        "largest_tensor": largest / 2**20,
        "allowance": (largest + GIB) / 2**20,
        "holds": beyond <= largest + GIB,
        "seconds": ours["seconds"],
        "before_loading": ours["before"] / 2**20,
        "arrays": ours["arrays"] / 2**20,
    }
    if peer:
        theirs = peer["peak"] - peer["arrays"]
        line |= {"peer": theirs / 2**20, "ratio": theirs / beyond, "peer_seconds": peer["seconds"]}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
