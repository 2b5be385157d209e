"""What every stage of a run shares: the config, the folder, the models, the data and the random keys."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import secrets
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain.python as grain
import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from transformers import PreTrainedTokenizerFast

from rlaif_jax.config import Config, flatten, nested, parse
from rlaif_jax.config_checks import check, check_decoder
from rlaif_jax.data import embedded, tokenizers
from rlaif_jax.errors import UserError, blame
from rlaif_jax.evaluation.names import stage_and_iteration
from rlaif_jax.files import read_json, read_parquet, there
from rlaif_jax.judge.score import POLICY
from rlaif_jax.judge.store import ALONE, Worker
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.lora import LoraConfig, abstract_trained, whole_params, whole_params_in_place
from rlaif_jax.models.parameters import (
    Placement,
    abstract_parameters,
    check_host_memory,
    init_parameters,
    to_host_memory,
)
from rlaif_jax.models.peft import with_adapter
from rlaif_jax.models.shapes import model_config
from rlaif_jax.models.transformer import LanguageModel, ModelConfig, ScalarModel
from rlaif_jax.models.weights import Weights, load_parameters, open_weights
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import FORWARD_RULES, JUDGE_RULES, make_mesh
from rlaif_jax.stages.folders import cell_stages, name_in_round, record_file
from rlaif_jax.training.checkpoints import check_whole, restore_params
from rlaif_jax.training.reward_models import side_by_side

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "tokenizers", "gguf")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: what it is configured to do, where it writes and on which devices."""

    config: Config
    workdir: epath.Path
    placement: Placement
    shared: Mapping[str, epath.Path] = dataclasses.field(default_factory=dict)  # stages kept elsewhere than in workdir
    worker: Worker = ALONE  # of several processes that label together
    round: int = 1  # of config.rounds

    def in_round(self, number: int) -> "Run":
        """The same run as the stages of a round see it."""
        return dataclasses.replace(self, round=number)

    def folder(self, stage: str) -> epath.Path:
        """Where a stage of this round keeps its files."""
        name = name_in_round(stage, self.round)
        return self.shared.get(name, self.workdir / name)

    @property
    def judge_placement(self) -> Placement:
        """Where judges live: on the devices of this process alone, which labels rows of its own, or on all."""
        config, here = self.config.mesh.judge, jax.process_index()
        devices, slices = [*self.placement.mesh.devices.flat], self.config.mesh.slices
        if config.spans == "process":
            devices, slices = [device for device in devices if device.process_index == here], 1
        return Placement(make_mesh(config, devices, slices), config.replicated)

    def waiting(self, role: str, tree):
        """The parameters of a role as they wait between uses, before each of which `to_device` is called."""
        return to_host_memory(tree) if role in self.config.mesh.offload else tree

    def record(self, stage: str) -> epath.Path:
        """The file that says under which config a stage was begun, and whether it is done."""
        return self.folder(stage) / "stage.json"

    def key(self, stage: str, step: int = 0) -> jax.Array:
        """The random key of a step of a stage: a function of seed, stage and step, never of what ran before."""
        name = name_in_round(stage, self.round)
        numbers = np.array([self.config.seed, zlib.crc32(name.encode()) & 0x7FFFFFFF, step], np.uint32)
        return _key(processes.put(numbers, self.placement.whole))

    def order_seed(self, stage: str) -> int:
        """The seed of the order in which a stage reads its data; each stage has its own."""
        return zlib.crc32(f"{name_in_round(stage, self.round)} {self.config.seed}".encode())

    def data(self, name: str) -> dict[str, list]:
        """A set that the SFT stage has prepared (`data.prepare.COLUMNS`), as columns."""
        return read_parquet(self.folder("sft") / "data" / f"{name}.parquet").to_pydict()

    def ground_truth(self) -> embedded.GroundTruth | None:
        """What grades replies; None for data that has no ground truth."""
        if self.config.data.evaluation_prompts.kind != "embedded":
            return None
        return embedded.GroundTruth(self.config.data.embedded, self.config.seed)

    def model_config(self) -> ModelConfig:
        """The policy's shape: that of its weights, or the config's where it is trained from scratch."""
        policy = self.config.policy
        return self._trained(model_config(policy.weights) if policy.weights else policy.model)

    def _trained(self, shape: ModelConfig) -> ModelConfig:
        """A shape, computing as the config has its models in training compute."""
        own = self.config.policy.model
        return dataclasses.replace(
            shape, remat=own.remat, dtype=own.dtype, attention=own.attention, lora_scale=self.config.lora.scale
        )

    def lora(self, stage: str) -> LoraConfig | None:
        """The adapters that a stage trains; None where it trains all weights."""
        lora = self.config.lora
        return lora if lora.rank and stage in lora.stages else None

    def language_model(self) -> LanguageModel:
        """The policy's architecture."""
        return LanguageModel(self.model_config())

    def scalar_model(self) -> ScalarModel:
        """The architecture of the value network: the policy's."""
        return ScalarModel(self.model_config())

    def reward_model(self) -> ScalarModel:
        """The architecture of the reward model: the policy's, or that of weights of its own."""
        weights = self.config.reward_model.weights
        return ScalarModel(self._trained(model_config(weights))) if weights else self.scalar_model()

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The policy's tokenizer, which the SFT stage has saved."""
        folder = self.folder("sft")
        return tokenizers.from_folder(folder / "tokenizer", remedy=f"delete {folder} and run its stage again")

    def start(self) -> tuple["Run", str]:
        """Where this round's policy begins, which is also what it is held near: a run's round and a stage of it."""
        if self.round > 1:
            return self.in_round(self.round - 1), self.config.policy_stage
        return self, "sl_cai" if "sl_cai" in self.config.stages else "sft"

    def start_params(self):
        """The parameters that this round's policy begins with: those of SL-CAI or SFT, or of the round before."""
        run, stage = self.start()
        return run.trained_params(stage, self.language_model())

    def _reward_params(self) -> dict:
        """Those of weights of its own, with a head where they have one."""
        found = open_weights(self.config.reward_model.weights)
        abstract = abstract_parameters(self.reward_model(), self.placement)
        return load_parameters(found, {name: x for name, x in abstract.items() if name in {"decoder", *found.names}})

    def trained_params(self, stage: str, model: LanguageModel | ScalarModel, members: int = 0, iteration: int = 0):
        """The parameters at the end of a stage, never those before unless asked for; UserError where there are none.

        members: of models that were trained side by side, each leaf [members, ...]; 0 for one without that axis.
        iteration: of RL, after how many of its iterations, of those that it keeps; 0 for its end.
        """
        trained = self.trained(stage, model, members, iteration)
        if not self.lora(stage):
            return trained
        base = self.base_params(stage)
        frozen = base if isinstance(model, LanguageModel) else {"decoder": base["decoder"]}
        merge = whole_params if members else whole_params_in_place
        return merge(frozen, trained, self.config.lora.scale, members)

    def trained(self, stage: str, model: LanguageModel | ScalarModel, members: int = 0, iteration: int = 0) -> dict:
        """What a stage's checkpoint has of a model's parameters: all, or an adapter. As `trained_params` else."""
        abstract = abstract_trained(model, self.placement, self.lora(stage), FORWARD_RULES)
        abstract = side_by_side(abstract, members) if members else abstract
        folder, last = self.folder(stage) / "checkpoints", getattr(self.config, stage).steps
        with self._remedy(stage, iteration):
            return restore_params(folder, iteration or last, abstract)

    def whole_params(self, stage: str, frozen: dict, trained: dict, members: int = 0) -> dict:
        """What a stage has trained as parameters of a whole model, an adapter merged into what was frozen."""
        lora = self.lora(stage)
        return whole_params(frozen, trained, lora.scale, members) if lora else trained

    def base_params(self, stage: str) -> dict:
        """The parameters that a stage begins with: the policy's, or a reward model's decoder and what head there is."""
        if before := self.before(stage):
            run, name = before
            return run.trained_params(name, self.language_model())
        return self._reward_params() if stage == "reward_model" else self._initial_params()

    def before(self, stage: str) -> tuple["Run", str] | None:
        """The run's round and the stage of it that a stage begins with; None where it begins with weights."""
        if stage == "sft" or (stage == "reward_model" and self.config.reward_model.weights):
            return None
        return (self, "sft") if stage in ("sl_cai", "reward_model") else self.start()

    def _initial_params(self) -> dict:
        model, policy = self.language_model(), self.config.policy
        if not policy.weights:
            return init_parameters(model, self.key("init"), self.placement)
        return load_parameters(self.policy_weights(), abstract_parameters(model, self.placement))

    def policy_weights(self) -> Weights:
        """The model that the policy begins as. Raises UserError where it or its adapter can't be read."""
        weights, adapter = open_weights(self.config.policy.weights), self.config.policy.adapter
        return with_adapter(weights, adapter) if adapter else weights

    def check_kept(self) -> None:
        """Raises UserError where a policy that RL keeps on its way is missing or damaged."""
        for stage, iteration in map(stage_and_iteration, self.config.measured_policies):
            if iteration:
                with self._remedy(stage, iteration):
                    check_whole(self.folder(stage) / "checkpoints", iteration)

    @contextlib.contextmanager
    def _remedy(self, stage: str, iteration: int) -> Iterator[None]:
        """Adds to an error of reading a stage's parameters what can be done."""
        try:
            yield
        except UserError as error:
            if iteration:
                remedy = (
                    f"config.rl.keep_every={self.config.rl.keep_every} has the policy after iteration {iteration} "
                    f"evaluated. Delete {self.folder(stage)}, and the same command trains stage {stage} again from its "
                    f"start"
                )
            else:
                remedy = (
                    f"Delete {self.record(stage)}, and the same command trains stage {stage} again from its last whole "
                    f"checkpoint"
                )
            raise UserError(f"{error}. {remedy}") from error


@jax.jit
def _key(numbers: jax.Array) -> jax.Array:
    seed, stage, step = numbers
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), stage), step)


def open_run(config: Config, workdir: epath.Path, devices: Sequence | None = None) -> Run:
    """The run of a config in a folder, or in that of a sweep's cell, on all devices or on these.

    Raises UserError where config, devices and models do not fit together.
    """
    if jax.process_count() != processes.count():
        raise UserError(
            f"JAX finds the devices of {jax.process_count()} processes, and this command was told of "
            f"{processes.count()}: start it with launch/tpu_pod.sh, or give all the same --processes and --coordinator"
        )
    with blame("mesh"):
        mesh = make_mesh(config.mesh, devices)
    run = Run(config, workdir, Placement(mesh, config.mesh.replicated), cell_stages(workdir))
    with blame("mesh.judge"):
        judge_mesh = run.judge_placement.mesh
    check(config, mesh, judge_mesh)
    if config.mesh.offload:
        with blame("mesh.offload"):
            check_host_memory()
    _check_gold(config, workdir)
    with blame("policy.weights"):
        policy = run.model_config()
    longest, room = sum(config.policy.lengths), policy.max_position_embeddings
    if config.policy.weights and longest > room:
        raise UserError(
            f"config.policy: max_prompt_length + max_response_length, {longest}, is more than the {room} tokens "
            f"(max_position_embeddings) that {config.policy.weights} can read: lower them"
        )
    check_decoder(policy, longest)
    models, judging = {"policy": run.language_model()}, {}
    judges = {name: (f"{name}.weights", judge.weights, judge.max_length) for name, judge in config.judges.items()}
    if config.rl.gold.judge and config.rl.gold.judge_weights:
        judges["rl.gold.judge"] = ("rl.gold.judge_weights", config.rl.gold.judge_weights, config.judge.max_length)
    for name, (field, weights, max_length) in judges.items():
        with blame(field):
            shape = policy if weights == POLICY else model_config(weights)
        if shape.max_position_embeddings < max_length:
            longest = "judge" if name == "rl.gold.judge" else name
            own = weights == POLICY and not config.policy.weights
            grow = ", or raise config.policy.model.max_position_embeddings" if own else ""
            raise UserError(
                f"config.{longest}.max_length={max_length} is more than the {shape.max_position_embeddings} tokens "
                f"(max_position_embeddings) that {weights} can read: lower it, or config.judge.max_length where it "
                f"follows that{grow}"
            )
        judging[name] = LanguageModel(shape)
    if "critique" in config.stages and config.critique.weights:
        with blame("critique.weights"):
            models["reviser"] = LanguageModel(model_config(config.critique.weights))
    if "reward_model" in config.stages and config.reward_model.weights:
        models["reward model"] = _own_reward_model(run)
    _check_targets(run, models)
    for name, model in models.items():
        with blame(f"mesh does not fit the {name}"):
            run.placement.parameters(model)
    for name, model in judging.items():
        with blame(f"mesh.judge does not fit {name}"):
            run.judge_placement.parameters(model, JUDGE_RULES)
    return run


def _check_targets(run: Run, models: Mapping[str, LanguageModel | ScalarModel]) -> None:
    """Raises UserError for adapters to weights that a model does not have."""
    for name, stages in {"policy": set(run.config.stages) - {"reward_model"}, "reward model": {"reward_model"}}.items():
        if name not in models or not any(map(run.lora, stages)):
            continue
        family = models[name].config.family
        missing = sorted(set(run.config.lora.targets) - set(FAMILIES[family].layer))
        if missing:
            raise UserError(
                f"config.lora.targets: the {name}, of family {family}, has no {', '.join(missing)}: leave it out"
            )


def _own_reward_model(run: Run) -> ScalarModel:
    """The reward model of weights of its own. Raises UserError where it can't read what it is to score."""
    with blame("reward_model.weights"):
        model = run.reward_model()
    longest, room = sum(run.config.reward_lengths), model.config.max_position_embeddings
    if longest > room:
        raise UserError(
            f"config.reward_model: max_prompt_length + max_response_length, {longest} (those of the policy where they "
            f"are 0), is more than the {room} tokens (max_position_embeddings) that {run.config.reward_model.weights} "
            "can read: lower them"
        )
    return model


def _check_gold(config: Config, workdir: epath.Path) -> None:
    gold = config.rl.gold
    if gold.reward_model and epath.Path(gold.reward_model_run).resolve() == workdir.resolve():
        raise UserError(
            f"config.rl.gold.reward_model_run={gold.reward_model_run} is this run itself, so gold would be the proxy "
            "that it is held against: name the folder of another run"
        )


def reopen_run(workdir: epath.Path, mesh: Mesh) -> Run:
    """The run, or the cell of a sweep, that has been made in a folder, for another one to read from; on its mesh.

    Raises UserError where there is none, or one of another version.
    """
    file = record_file(workdir)
    try:
        config = parse(nested(read_json(file)["config"]))
    except UserError as error:
        raise UserError(f"{file} is of another version: {error}") from error
    return Run(config, workdir, Placement(mesh, config.mesh.replicated), cell_stages(workdir))


def with_seed(config: Config, workdir: epath.Path | None) -> Config:
    """`config` with a seed: for -1 the one that the run in `workdir` was begun with, else one drawn and printed."""
    if config.seed != -1:
        return config
    begun = None if workdir is None else workdir / "config.json"
    if begun is not None and there(begun):
        return dataclasses.replace(config, seed=read_json(begun)["config"]["seed"])
    seed = processes.agree(lambda: secrets.randbelow(2**31))
    print(f"seed: {seed} (drawn)", flush=True)
    return dataclasses.replace(config, seed=seed)


def run_record(config: Any) -> dict:
    """What config.json keeps of a config (a dataclass): its fields, package versions, devices and the git commit."""
    return {"config": flatten(config)} | _environment()


@functools.cache
def _environment() -> dict:
    try:
        command = ["git", "-C", str(epath.Path(__file__).parent), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git on this machine
        commit = ""
    return {
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": sys.version.split()[0],
        "devices": [device.device_kind for device in jax.devices()],
        "git_commit": commit or None,
    }


def shuffled_batches(source: Sequence, batch_size: int, seed: int, what: str, of: str = "examples") -> grain.MapDataset:
    """Batches of `source` without end, reshuffled each epoch. Batch `i` is a function of i and the seed alone.

    Raises UserError where the source is smaller than a batch, `what` being the fields that set its size, and `of` what
    is counted.
    """
    if len(source) < batch_size:
        raise UserError(
            f"config.{what} makes a batch of {batch_size}, more than the {len(source)} {of} there are: lower it, or "
            "give more data"
        )
    return grain.MapDataset.source(source).seed(seed).shuffle().repeat().batch(batch_size, batch_fn=list)
