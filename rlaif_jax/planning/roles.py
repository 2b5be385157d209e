"""What the programs of a run take, as shapes, dtypes and shardings: models in their roles, batches, caches."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from rlaif_jax.config import PolicyConfig
from rlaif_jax.data.packing import PackedRows
from rlaif_jax.judge.prompts import Pair, PromptConfig, load_template
from rlaif_jax.judge.score import POLICY, JudgeConfig, read_prefix
from rlaif_jax.models.cache import KVCache
from rlaif_jax.models.parameters import (
    Placement,
    abstract_decoding_parameters,
    abstract_parameters,
    decoding_model,
    in_layers,
)
from rlaif_jax.models.shapes import model_config
from rlaif_jax.models.transformer import HEAD, LanguageModel, ScalarModel
from rlaif_jax.parallel.mesh import JUDGE_RULES, RULES, batch_sharding, partition_spec
from rlaif_jax.sampling.stopping import Stopping
from rlaif_jax.stages.preferences import Comparisons
from rlaif_jax.stages.run import Run
from rlaif_jax.training.reward_models import RewardModel, side_by_side
from rlaif_jax.training.sequences import Sequences

# Tracing a large model to know its shapes takes seconds, and most programs need them.
trained_shapes, decoding_shapes = functools.cache(abstract_parameters), functools.cache(abstract_decoding_parameters)
CHARACTERS = 4  # about so many are a token of English: a judge without weights has no tokenizer to count with


@dataclasses.dataclass(frozen=True)
class Arrays:
    """Arrays on a placement."""

    placement: Placement

    def rows(self, dtype, *shape: int) -> jax.ShapeDtypeStruct:
        """An array that is split along its first axis."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(shape, self.placement.mesh))

    def whole(self, dtype, *shape: int) -> jax.ShapeDtypeStruct:
        """An array that every device holds."""
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.placement.whole)

    @property
    def key(self) -> jax.ShapeDtypeStruct:
        """A random key."""
        return self.all_whole(jax.eval_shape(jax.random.key, 0))

    @property
    def stopping(self) -> Stopping:
        """An end of sequence, and no stop strings."""
        return Stopping((0,), (), self.whole(jnp.uint8, 0, 0), self.whole(jnp.int32, 0))

    def packed(self, rows: int, length: int) -> PackedRows:
        """Rows of SFT."""
        tokens = self.rows(jnp.int32, rows, length)
        return PackedRows(tokens, tokens, self.rows(jnp.bool_, rows, length))

    def sequences(self, rows: int, lengths: tuple[int, int]) -> Sequences:
        """Prompts and responses of such lengths."""
        shapes = [(rows, length) for length in lengths]
        return Sequences(*(self.rows(dtype, *shape) for shape in shapes for dtype in (jnp.int32, jnp.bool_)))

    def comparisons(self, rows: int, lengths: tuple[int, int]) -> Comparisons:
        """Labelled pairs."""
        side, number = self.sequences(rows, lengths), self.rows(jnp.float32, rows)
        return Comparisons(side, side, number, number)

    def all_whole(self, shapes):
        """A tree of shapes, each on every device."""
        return jax.tree.map(lambda x: self.whole(x.dtype, *x.shape), shapes)

    def all_rows(self, shapes):
        """A tree of shapes, each split along its first axis."""
        return jax.tree.map(lambda x: self.rows(x.dtype, *x.shape), shapes)

    def cache(self, shapes: KVCache) -> KVCache:
        """Keys and values, split by rows and heads."""

        def split(x):
            axes = ("batch", None, "kv_heads", None)[: x.ndim]
            spec = partition_spec(axes, x.shape, self.placement.mesh, replicated=tuple(RULES))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.placement.mesh, spec))

        return self.all_whole(shapes.replace(layers=())).replace(layers=jax.tree.map(split, shapes.layers))


def frozen_shapes(run: Run, stage: str, model: LanguageModel | ScalarModel) -> dict:
    """What a stage that trains adapters leaves alone; {} for one that does not."""
    shapes = trained_shapes(model, run.placement)
    return {name: part for name, part in shapes.items() if name not in HEAD} if run.lora(stage) else {}


def abstract_reward_model(run: Run) -> RewardModel:
    """The trained reward model."""
    config, whole = run.config.reward_model, Arrays(run.placement).whole
    members = 1 if config.combine == "weights" else config.members
    params = side_by_side(trained_shapes(run.reward_model(), run.placement), members)
    number = whole(jnp.float32)
    return RewardModel(params, whole(jnp.float32, members), number, number, config.combine, config.uncertainty_coef)


@dataclasses.dataclass(frozen=True)
class AbstractJudge:
    """A judge: its model, and what it reads."""

    config: JudgeConfig
    prompt: PromptConfig
    policy: PolicyConfig
    shape: LanguageModel  # as its weights are read
    placement: Placement

    @property
    def stacked(self) -> LanguageModel:
        """As it computes, its layers stacked."""
        shape = dataclasses.replace(self.shape.config, dtype=self.config.dtype, attention=self.config.attention)
        return LanguageModel(shape)

    @property
    def model(self) -> LanguageModel:
        """As it judges."""
        return decoding_model(self.stacked)

    @functools.cached_property
    def loaded(self):
        """Its parameters as they are read, the layers stacked."""
        params = trained_shapes(self.shape, self.placement)
        dtype = jnp.dtype(self.config.dtype)
        in_dtype = lambda path, x: x.update(dtype=dtype) if x.ndim - in_layers(path) > 1 else x  # noqa: E731
        return jax.tree_util.tree_map_with_path(in_dtype, params)

    @functools.cached_property
    def parameters(self):
        """Of `model`."""
        return abstract_decoding_parameters(self.stacked, self.placement, JUDGE_RULES)

    @functools.cached_property
    def template(self):
        """What it is asked."""
        return load_template(self.prompt)

    @property
    def preamble(self) -> jax.ShapeDtypeStruct:
        """The tokens that all its prompts begin with."""
        tokens = max(math.ceil(len(self.template.preamble) / CHARACTERS), 1)
        return Arrays(self.placement).whole(jnp.int32, 1, tokens)

    @functools.cached_property
    def prefix(self) -> KVCache:
        """The keys and values of the preamble."""
        with jax.set_mesh(self.placement.mesh):
            shapes = jax.eval_shape(functools.partial(read_prefix, self.model), self.parameters, self.preamble)
        return Arrays(self.placement).cache(shapes)

    @property
    def tree_length(self) -> int:
        """Tokens of the longest tree of a pair, or of one response where each is rated by itself, padded."""
        both = len(self.template.prompts(Pair("", "", "", "", "")))  # orders of a pair, or its responses
        text = sum(len(prompt.text) for prompt in self.template.asked(Pair("", "", "", "", "")))
        frame = math.ceil((text - both * len(self.template.questions) * len(self.template.preamble)) / CHARACTERS)
        responses = both if self.template.method == "rating" else 2 * both * self.config.pairs_per_tree
        longest = frame + self.policy.max_prompt_length + responses * self.policy.max_response_length
        multiple = self.config.bucket_multiple
        room = responses * (self.config.max_length - self.preamble.shape[1])
        return math.ceil(min(longest, room) / multiple) * multiple

    @property
    def asked(self) -> int:
        """Questions of a tree."""
        return 2 * self.config.pairs_per_tree * len(self.template.questions) * len(self.template.choices)


def abstract_judge(run: Run, config: JudgeConfig, prompt: PromptConfig | None = None) -> AbstractJudge:
    """The judge of a config, under another prompt where there is one."""
    shape = run.model_config() if config.weights == POLICY else model_config(config.weights)
    return AbstractJudge(config, prompt or config.prompt, run.config.policy, LanguageModel(shape), run.judge_placement)
