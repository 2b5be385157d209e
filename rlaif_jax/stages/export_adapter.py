"""A policy's adapters as one in the format of PEFT, to the model that was last trained whole."""

import numpy as np
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.files import new_folder
from rlaif_jax.models.lora import LoraConfig
from rlaif_jax.models.peft import write_adapter
from rlaif_jax.parallel import processes
from rlaif_jax.stages.folders import in_round, name_in_round
from rlaif_jax.stages.run import Run

_CARD = """---
license: {license}
library_name: peft
tags: [rlaif]
---

# {name}

The LoRA adapter of stage `{stage}` of a run of rlaif_jax, to `{base}`: name that model, or the folder of its export.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "DIR")
```
"""


def check_adapter(run: Run, name: str) -> None:
    """Raises UserError where a stage, which has trained a model, has trained no adapter of a policy."""
    stage, number = in_round(name)
    if stage == "reward_model":
        raise UserError("--adapter is for policies: export the reward model as it is, its adapter merged")
    if run.in_round(number).lora(stage) is None:
        raise UserError(f"stage {name} has trained all weights (config.lora), and no adapter: leave --adapter out")


def export_adapter(run: Run, name: str, out: epath.Path, license_id: str, title: str) -> None:
    """Writes the adapter of a stage to `out`, whole or not at all.

    Where the stages before it have trained adapters, too, it is all of theirs side by side: their products add up.
    Raises UserError where the folder is there or can't be written, and for what PEFT has no adapter for.
    """
    stage, number = in_round(name)
    adapters, before = [], (run.in_round(number), stage)
    while before and before[0].lora(before[1]):
        adapters.append(processes.to_host(before[0].trained(before[1], run.language_model())))
        before = before[0].before(before[1])
    lora, base = run.config.lora, _base(run, before)
    rank = len(adapters) * lora.rank
    whole = LoraConfig(rank, lora.scale * rank, lora.targets, ())
    matrices = [adapter["decoder"]["layers"]["lora"] for adapter in adapters]
    joined = {
        target: {
            "a": np.concatenate([each[target]["a"] for each in matrices], axis=-1),
            "b": np.concatenate([each[target]["b"] for each in matrices], axis=1),
        }
        for target in lora.targets
    }

    def write() -> None:
        write_adapter(joined, run.language_model().config, whole, base, folder)
        (folder / "README.md").write_text(_CARD.format(name=title, stage=name, base=base, license=license_id))

    with new_folder(out) as folder:
        processes.agree(write)


def _base(run: Run, before: tuple[Run, str] | None) -> str:
    """The model that is adapted: the policy's weights, or a stage that has trained all of its own."""
    if before:
        return f"{run.workdir.name}, stage {name_in_round(before[1], before[0].round)}"
    if run.config.policy.adapter:
        raise UserError("the policy began with an adapter of its own (policy.adapter): export it without --adapter")
    return run.config.policy.weights
