"""A stage's trained model as a Hugging Face folder, with tokenizer, generation settings and a card."""

import copy
import difflib
from typing import NamedTuple

import yaml
from etils import epath
from transformers import GenerationConfig, PreTrainedTokenizerFast

from rlaif_jax.config import Config
from rlaif_jax.data.encoding import end_of_reply
from rlaif_jax.data.tokenizers import end_tokens, special_tokens
from rlaif_jax.errors import UserError, blame
from rlaif_jax.files import file_hash, new_folder, read_json
from rlaif_jax.models.huggingface_export import huggingface_config, write_weights
from rlaif_jax.models.transformer import ModelConfig
from rlaif_jax.models.weights import weights_hash
from rlaif_jax.parallel import processes
from rlaif_jax.stages.folders import all_stages, in_round, record_file
from rlaif_jax.stages.pipeline import is_done
from rlaif_jax.stages.reading import reward_reader
from rlaif_jax.stages.reward_model import load_reward_model, one_member
from rlaif_jax.stages.run import Run

_MODELS = ("sft", "sl_cai", "reward_model", "best_of_n", "preference", "rl")  # the stages that train one
_POLICY = """The policy after stage `{stage}` of a run of rlaif_jax.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")
turns = [{{"role": "user", "content": "..."}}]
inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
reply = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(reply, skip_special_tokens=True))
```
"""
_REWARD_MODEL = """The reward model after stage `{stage}` of a run of rlaif_jax{member}.

The score is read at the last token that is not padding, which is to be the `{eos}` that ends a response. The run's
reward is `score + reward_offset`, with `reward_offset` = {offset:.6g} in config.json: the architecture has no place for
a constant, and only differences of rewards mean something. {pad}{unknowing}

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model, tokenizer = AutoModelForSequenceClassification.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")
turns = [{{"role": "user", "content": "..."}}]
text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + "..." + "{eos}"
inputs = tokenizer([text], add_special_tokens=False, return_tensors="pt")
reward = model(**inputs).logits[:, 0] + model.config.reward_offset
```
"""


class _Exported(NamedTuple):
    """What is written of a stage."""

    config: ModelConfig
    parameters: dict
    tokenizer: PreTrainedTokenizerFast
    fields: dict  # of config.json
    text: str  # of the card
    generation: GenerationConfig | None = None


def check_stage(run: Run, name: str, member: int | None) -> None:
    """Raises UserError where no stage of this name has trained a model to its end, or it has no such member."""
    stages = all_stages(run.config.stages, run.config.rounds)
    models = [stage for stage in stages if in_round(stage)[0] in _MODELS]
    if name not in models:
        those = f"the stages of {run.workdir} that train one are {', '.join(models)}"
        near = difflib.get_close_matches(name, models, n=1)
        hint = f": did you mean {near[0]}?" if near else ";"
        what = "trains no model;" if name in stages else f"is unknown{hint}"
        raise UserError(f"--stage={name} {what} {those}; labels can be exported, too")
    if not is_done(run, name):
        raise UserError(f"stage {name} has not finished in {run.workdir}: run --stages={name} to its end")
    _check_beginnings(run, name)
    if in_round(name)[0] != "reward_model":
        if member is not None:
            raise UserError(f"--member={member} is for reward models; stage {name} trains one policy")
        return
    config = run.config.reward_model
    count = 1 if config.combine == "weights" else config.members
    if member is None and count > 1:
        raise UserError(
            f"the reward model has {count} members (combine={config.combine!r}), which no one model of transformers "
            f"can be: name one of them, --member=0 to --member={count - 1}"
        )
    if member is not None and member >= count:
        raise UserError(f"--member={member}: the reward model has {count} to export, --member=0 to {count - 1}")


def _check_beginnings(run: Run, name: str) -> None:
    """Raises UserError where the weights that a run began with are gone, or others by now."""
    recorded = read_json(run.record(name))["config"]
    for field, config in (("policy", run.config.policy), ("reward_model", run.config.reward_model)):
        known = recorded.get(f"{field}.weights_hash")
        if not config.weights or known is None:
            continue
        with blame(f"{field}.weights"):
            if weights_hash(config.weights) != known:
                raise UserError(f"{config.weights} holds other weights than those that stage {name} began with")


def export_model(
    run: Run, name: str, out: epath.Path, dtype: str, member: int | None, license_id: str, title: str
) -> None:
    """Writes what `from_pretrained` loads to `out`, whole or not at all; `check_stage` has found nothing wrong.

    dtype: a name in `huggingface_export.DTYPES`. Raises UserError where the folder is there or can't be written, and
    where transformers has no such model.
    """
    stage, number = in_round(name)
    scalar, of_round = stage == "reward_model", run.in_round(number)
    exported = _reward_model(of_round, name, member or 0) if scalar else _policy(of_round, name)
    config, tokenizer = exported.config, exported.tokenizer
    tokens = {f"{role}_token_id": getattr(tokenizer, f"{role}_token_id") for role in ("bos", "eos", "pad")}
    described = huggingface_config(config, dtype, scalar, **tokens, **exported.fields)
    card = _card(run, name, dtype, license_id, title, exported.text)

    def write_rest() -> None:
        described.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        if exported.generation:
            exported.generation.save_pretrained(str(folder))
        (folder / "README.md").write_text(card)

    with new_folder(out) as folder:
        write_weights(folder, config, exported.parameters, dtype)
        processes.agree(write_rest)


def _policy(run: Run, name: str) -> _Exported:
    stage, model, tokenizer = in_round(name)[0], run.language_model(), run.tokenizer()
    generation = _generation(run.config, stage, tokenizer)
    parameters, text = run.trained_params(stage, model), _POLICY.format(stage=name)
    return _Exported(model.config, parameters, tokenizer, {}, text, generation)


def _generation(config: Config, stage: str, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """How the stage samples or, where it does not, the evaluation of its policy."""
    sampling = getattr(getattr(config, stage), "sampling", config.evaluation.sampling)
    drawn = {"do_sample": False}
    if sampling.temperature:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k}
        drawn |= {name: getattr(sampling, name) for name in ("top_p", "min_p") if getattr(sampling, name)}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(end_tokens(tokenizer)),
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=config.policy.max_response_length,
        **drawn,
    )


def _reward_model(run: Run, name: str, member: int) -> _Exported:
    reward_model, tokenizer = load_reward_model(run), copy.deepcopy(reward_reader(run).tokenizer)
    parameters = one_member(reward_model, member)
    offset = float(processes.to_host(parameters["bias"])[0])
    pad, unknowing = _pad(tokenizer), ""
    if not processes.to_host(reward_model.scale):
        unknowing = " It predicted held-out labels no better than chance, so all its rewards are 0."
    config = run.config.reward_model
    which = f": member {member} of {config.members}" if config.members > 1 else ""
    which = f": the average of {config.members} members" if config.combine == "weights" else which
    eos = tokenizer.convert_ids_to_tokens(end_of_reply(tokenizer))
    text = _REWARD_MODEL.format(stage=name, member=which, eos=eos, offset=offset + 0.0, pad=pad, unknowing=unknowing)
    return _Exported(run.reward_model().config, parameters, tokenizer, {"reward_offset": offset}, text)


def _pad(tokenizer: PreTrainedTokenizerFast) -> str:
    """Gives the tokenizer a padding token that ends no response, and says which.

    Where padding begins is known by its token alone, and a response's end is what the score is read at.
    """
    tokenizer.padding_side = "right"
    ends = end_tokens(tokenizer)
    if tokenizer.pad_token_id not in (None, *ends):
        return f"Pad with `{tokenizer.pad_token}`."
    template = tokenizer.chat_template or ""
    free = [token for index, token in special_tokens(tokenizer).items() if index not in ends]
    free.sort(key=lambda token: (token in template, token == tokenizer.bos_token))
    before = f"`{tokenizer.pad_token}` ends responses, too" if tokenizer.pad_token else "The run's tokenizer has none"
    tokenizer.pad_token = free[0] if free else None
    if not free:
        return "There is no token to pad with that ends no response: score one text at a time."
    return f"Pad with `{tokenizer.pad_token}`. ({before}.)"


def _card(run: Run, name: str, dtype: str, license_id: str, title: str, text: str) -> str:
    stage, _ = in_round(name)
    record, begin = record_file(run.workdir), "policy"
    if stage == "reward_model" and run.config.reward_model.weights:
        begin = "reward_model"
    weights = getattr(run.config, begin).weights
    digest = read_json(run.record(name))["config"].get(f"{begin}.weights_hash", "unknown")
    facts = {
        "run": run.workdir.name,
        "stage": name,
        "step": getattr(run.config, stage).steps,
        "seed": run.config.seed,
        "config.json of the run": f"xxh3 {file_hash(record)}",
        "git commit": read_json(record).get("git_commit") or "unknown",
        "began with": f"`{epath.Path(weights).name}` (xxh3 {digest})" if weights else "random weights",
        "saved as": dtype,
    }
    front = {
        "license": license_id,
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if stage == "reward_model" else "text-generation",
        "tags": ["rlaif"],
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {title}\n\n{text}\n| | |\n|---|---|\n{table}"
