"""Meshes, batches and memory by the size of policy and judge, and by the machine: two words of an arm, e.g.

    python -m rlaif_jax.plan --config=configs/tldr.py:rlaif,8b,v5p --topology=v5p:4x4x4
    python -m rlaif_jax.main --config=configs/tldr.py:rlaif,8b,v5p --workdir=runs/tldr \\
        --config.policy.weights=POLICY.gguf --config.judge.weights=JUDGE.gguf

Sizes: 1b, 8b, 70b, of the shape of Llama 3. Machines: gpu (nodes of 8 with 80 GB each), v5e, v5p, v6e. Every device
that `tensor` leaves is on `fsdp`; several slices are `--config.mesh.slices=N`. A judge is on the chips of one host, so
70b needs those of a GPU node or of v5p.
"""

from collections.abc import Sequence
from typing import NamedTuple

from ml_collections import config_dict

SHAPES = {"1b": "llama-3.2-1b", "8b": "llama-3.1-8b", "70b": "llama-3.1-70b"}
MACHINES = ("gpu", "v5e", "v5p", "v6e")
WORDS = (*SHAPES, *MACHINES)
_WHOLE_SLICE = ("v5e", "v6e")  # their compiler refuses programs on a part of a slice
_WAITING = ("reference", "reward_model", "judge")
_BATCH = 256  # rows of each stage: over 128 devices beside `tensor`, in two parts


class Preset(NamedTuple):
    """What a size needs on a machine."""

    tensor: int  # of the policy; its decoding copy is split over nothing else
    judge_tensor: int  # a judge is split over nothing else
    remat: str
    micro_batches: int
    offload: tuple[str, ...] = ()


PRESETS = {
    ("1b", "gpu"): Preset(1, 1, "products", 1),
    ("1b", "v5e"): Preset(1, 1, "full", 2),
    ("1b", "v5p"): Preset(1, 1, "products", 1),
    ("1b", "v6e"): Preset(1, 1, "full", 1),
    ("8b", "gpu"): Preset(2, 2, "full", 1),
    ("8b", "v5e"): Preset(4, 4, "full", 2, _WAITING),
    ("8b", "v5p"): Preset(2, 2, "full", 1),
    ("8b", "v6e"): Preset(4, 4, "full", 2, _WAITING),
    ("70b", "gpu"): Preset(8, 8, "full", 2, _WAITING),
    ("70b", "v5p"): Preset(4, 4, "full", 2, _WAITING),
}


def preset(config: config_dict.ConfigDict, words: Sequence[str]) -> None:
    """Sets what the words of an arm name: a size and a machine, or neither.

    Raises ValueError where one of them is missing, and for a size that the machine has no room for.
    """
    sizes, machines = [word for word in words if word in SHAPES], [word for word in words if word in MACHINES]
    if not sizes and not machines:
        return
    if len(sizes) != 1 or len(machines) != 1 or "smoke" in words:
        raise ValueError(
            f"a size ({', '.join(SHAPES)}) and a machine ({', '.join(MACHINES)}) go together, without smoke"
        )
    (size,), (machine,) = sizes, machines
    if (size, machine) not in PRESETS:
        fitting = ", ".join(machine for known, machine in PRESETS if known == size)
        raise ValueError(f"a judge of {size} has no room on a host of {machine}: take one of {fitting}")
    chosen, shape = PRESETS[size, machine], f"shape:{SHAPES[size]}"
    config.mesh.data = config.mesh.get_oneway_ref("slices")
    config.mesh.update(fsdp=-1, tensor=chosen.tensor, offload=chosen.offload)
    spans = "all" if machine in _WHOLE_SLICE else "process"
    config.mesh.judge.update(spans=spans, data=-1, tensor=chosen.judge_tensor)
    config.policy.weights = config.judge.weights = shape
    attention = "auto" if machine == "gpu" else "splash"
    config.policy.model.update(remat=chosen.remat, dtype="bfloat16", attention=attention)
    config.judge.update(dtype="bfloat16", attention=attention)
    for stage in (config.sft, config.sl_cai, config.reward_model, config.rl, config.preference, config.best_of_n):
        stage.update(batch_size=_BATCH, micro_batches=chosen.micro_batches)
    config.rl.batch_size = _BATCH * config.rl.minibatches
    config.sampler.slots = config.evaluation.batch_size = config.overoptimisation.batch_size = _BATCH
    config.critique.sampler.slots = config.sft.teacher.sampler.slots = _BATCH
