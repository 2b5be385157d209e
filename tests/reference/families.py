"""Tiny models of every family of decoders, as Hugging Face folders, and what PyTorch computes with them.

families/CASE.json holds what transformers and PEFT write beside the weights of a case, and the names and shapes of the
weights; families/CASE.npz holds the outputs. make_families_reference.py makes both. The weights themselves are on no
disk: weight() is a function of a tensor's name and shape. Nothing here imports PyTorch or transformers.
"""

import json
import pathlib
import zlib

import numpy as np
from safetensors.numpy import save_file

FOLDER = pathlib.Path(__file__).parent / "families"
CASES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
ADAPTED = ("gpt2", "gpt_neox", "llama3")  # the cases with a LoRA adapter, too


def weight(name, shape, scale_mean=1.0):
    """The float32 tensor of this name and shape: matrices ~ N(0, 1.5^2 / shape[-1]), biases and norms' scales far
    enough from their usual 0 and 1 that leaving one out shows. scale_mean is 0 for Gemma, whose norms add 1.
    """
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        mean, deviation = 0.0, 1.5 * shape[-1] ** -0.5
    else:
        mean, deviation = (0.0, 0.1) if name.endswith(".bias") else (scale_mean, 0.2)
    return rng.normal(mean, deviation, shape).astype(np.float32)


def norm_mean(model_type):
    """What the norms' scales of a family spread around: Gemma multiplies by 1 + scale."""
    return 0.0 if model_type.startswith("gemma") else 1.0


def read(case):
    """Of families/CASE.json and .npz: (files, arrays).

    files has "lm", "score" (AutoModelForSequenceClassification with one label) and, for a case of ADAPTED, "adapter".
    Each has "config" (config.json or adapter_config.json) and "tensors" (the shapes by the names saved); "lm" also has
    "generation_config".

    arrays has of "lm": tokens [2, 14] int32, logits [2, 14, vocabulary], the loss (the sum of -log p of every token
    that follows one, both rows) and its gradients as "gradient.NAME" for the input embedding and an attention weight of
    layer 1. Of "score": score_tokens [2, 14], padded on the right with config's pad_token_id, and score_logits [2, 1].
    Of "adapter": adapter_logits [2, 14, vocabulary] for tokens. All but the tokens float32.
    """
    with np.load(FOLDER / f"{case}.npz") as arrays:
        return json.loads((FOLDER / f"{case}.json").read_text()), dict(arrays)


def weights(case, part="lm"):
    """The float32 arrays of "lm", "score" or "adapter" by the names saved; shapes as saved."""
    files, _ = read(case)
    mean = norm_mean(files["lm"]["config"]["model_type"])
    return {name: weight(name, tuple(shape), mean) for name, shape in files[part]["tensors"].items()}


def write_folder(case, folder, part="lm", shards=1):
    """Writes the Hugging Face folder of "lm" or "score"; with shards > 1, that many files and their index."""
    folder, (files, _) = pathlib.Path(folder), read(case)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config", "generation_config"):
        if name in files[part]:
            (folder / f"{name}.json").write_text(json.dumps(files[part][name], indent=2) + "\n")
    tensors = weights(case, part)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i, names in enumerate(np.array_split(list(tensors), shards), start=1):
        file = f"model-{i:05d}-of-{shards:05d}.safetensors"
        save_file({str(name): tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= {str(name): file for name in names}
    total = {"total_size": sum(tensor.nbytes for tensor in tensors.values())}
    index = json.dumps({"metadata": total, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(index + "\n")


def write_adapter(case, folder):
    """Writes the folder of a case's LoRA adapter as PEFT does."""
    folder, (files, _) = pathlib.Path(folder), read(case)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(files["adapter"]["config"], indent=2) + "\n")
    save_file(weights(case, "adapter"), folder / "adapter_model.safetensors", metadata={"format": "pt"})
