"""What would make a program fit that does not."""

from rlaif_jax.planning.estimate import Estimate
from rlaif_jax.planning.machines import Machine
from rlaif_jax.stages.run import Run

_GIB = 1 << 30
# What makes the temporaries of a program smaller.
_SMALLER = {
    "generate": "lower config.rl.batch_size, or set config.sampler.cache_dtype=int8",
    "decode": "lower config.sampler.slots, or set config.sampler.cache_dtype=int8",
    "prefill": "lower config.sampler.refill",
    "rollout": "lower config.rl.batch_size",
    "measure": "lower config.evaluation.batch_size",
    "reward_model": "lower config.evaluation.batch_size",
    "reference": "lower config.preference.batch_size",
}


def advice(estimate: Estimate, run: Run, machine: Machine) -> str:
    """By how much a program is over the limit, what most of it is, and the fields of the config that would help."""
    parts = {name: getattr(estimate, name) for name in ("arguments", "outputs", "temporaries", "beside")}
    largest = max(parts, key=parts.__getitem__)
    over = (estimate.total - machine.memory) / _GIB
    return (
        f"{estimate.program.title} needs {estimate.total / _GIB:.1f} GiB of a device, {over:.1f} GiB more than there "
        f"are; {parts[largest] / _GIB:.1f} GiB are {largest}: {'; '.join(_remedies(estimate, run, largest))}"
    )


def _remedies(estimate: Estimate, run: Run, largest: str) -> list[str]:
    stage, name, mesh = estimate.program.stage, estimate.program.name, run.config.mesh
    waiting = [role for role in ("reference", "reward_model", "judge") if role not in mesh.offload]
    if largest == "beside":
        let = f"let {', '.join(waiting)} wait in host memory (config.mesh.offload)" if waiting else ""
        return list(filter(None, (let, "take more devices, on config.mesh.fsdp or .tensor")))
    if name.removesuffix("_weights").removesuffix("_preamble") not in (*_SMALLER, "decode", "step", "update"):
        helps = ["raise config.mesh.judge.tensor or .fsdp, which split a judge over the devices of a host"]
        return helps + (["lower config.judge.batch_tokens"] if largest == "temporaries" else [])
    if largest == "temporaries" and name in ("step", "update"):
        group, helps = "rl" if name == "update" else stage, []
        if run.config.policy.model.remat not in (True, "full"):
            helps.append('set config.policy.model.remat="full"')
        return [*helps, f"raise config.{group}.micro_batches", "raise config.mesh.tensor"]
    if largest == "temporaries":
        return [_SMALLER[name]]
    if name in ("decode_weights", "prefill", "decode", "generate"):
        return ["raise config.mesh.tensor: while decoding, weights are split over nothing else", _SMALLER["decode"]]
    return ["take more devices, on config.mesh.fsdp or .tensor"]
