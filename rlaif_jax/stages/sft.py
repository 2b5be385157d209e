"""Supervised fine-tuning: the policy learns the demonstrations; the loss is on completions alone."""

import functools
from collections.abc import Callable

import jax
import numpy as np
import optax

from rlaif_jax.config import SFTConfig, TrainingConfig
from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import end_of_reply, prompt_tokens, response_tokens
from rlaif_jax.data.packing import Example, lay_out, pack
from rlaif_jax.data.prepare import load, prepare, training_texts
from rlaif_jax.errors import blame
from rlaif_jax.models.lora import joined, start
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import shard_rows
from rlaif_jax.stages.reading import check_prompts
from rlaif_jax.stages.replies import sample_replies
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.stages.teacher import teacher_demonstrations
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.packed import sft_loss
from rlaif_jax.training.state import TrainState, abstract_state, init_state
from rlaif_jax.training.step import compiled_step


def run_sft(run: Run) -> None:
    """Reads the sources, trains, and writes `sft/data`, `sft/tokenizer` and `sft/checkpoints`."""
    processes.agree(lambda: _prepare_data(run))
    check_prompts(run)
    tune(run, "sft", run.config.sft, demonstration_rows(run), lambda: run.base_params("sft"))


def tune(
    run: Run,
    stage: str,
    config: TrainingConfig,
    rows: list[list[Example]],
    initial: Callable[[], dict],
) -> None:
    """Trains on packed rows from the parameters that `initial` gives; writes the checkpoints of a stage."""
    row_length = run.config.sft.row_length
    what = f"{stage}.batch_size"
    batches = shuffled_batches(range(len(rows)), config.batch_size, run.order_seed(stage), what, "rows")
    model, lora = run.language_model(), run.lora(stage)
    optimizer = make_optimizer(config.optimizer, config.steps)
    step_fn = step_function(model, optimizer, config)
    begin = start(model, lora, initial, run.key(f"{stage} adapter"), run.placement)

    def next_step(state: TrainState, step: int):
        chosen = [rows[row] for row in batches[step]]
        batch = shard_rows(chosen, lambda rows: lay_out(rows, row_length), run.placement.mesh)
        state, metrics = step_fn(state, batch, frozen=begin.frozen)
        tokens = sum(len(prompt) + len(completion) for row in chosen for prompt, completion in row)
        params = joined(begin.frozen, state.params)
        samples = lambda: _samples(run, stage, params) if step + 1 == config.steps else []  # noqa: E731
        return state, metrics | {"tokens": tokens}, samples

    train(
        run.folder(stage),
        LoopConfig(config.steps, config.checkpoint_every, config.keep_best, config.max_skipped_updates),
        abstract_state(model, optimizer, run.placement, lora),
        lambda: init_state(model, begin.trained(), optimizer, run.placement, lora),
        next_step,
    )


def step_function(
    model: LanguageModel, optimizer: optax.GradientTransformation, config: TrainingConfig
) -> jax.stages.Wrapped:
    """(state, PackedRows, frozen) -> (state, metrics)."""
    return compiled_step(functools.partial(sft_loss, model=model), optimizer, config.micro_batches)


def demonstration_rows(run: Run) -> list[list[Example]]:
    """The demonstrations that share a row of SFT, in a shuffled order that is the run's."""
    return packed_replies(run, demonstrations(run))


def demonstrations(run: Run) -> dict[str, list]:
    """Columns `prompt` and `reply`: what the data demonstrates, or a teacher."""
    return teacher_demonstrations(run) if run.config.sft.teacher.weights else run.data("demonstrations")


def packed_replies(run: Run, columns: dict[str, list]) -> list[list[Example]]:
    """The examples of columns `prompt` and `reply` that share a row of SFT, in a shuffled order that is the run's."""
    tokenizer = run.tokenizer()
    prompts, replies = prompt_tokens(tokenizer, columns["prompt"]), response_tokens(tokenizer, columns["reply"])
    last = end_of_reply(tokenizer)
    examples = [(prompt, [*reply, last]) for prompt, reply in zip(prompts, replies, strict=True)]
    return packed(examples, run.config.sft, run.order_seed("packing"))


def packed(examples: list[Example], config: SFTConfig, seed: int) -> list[list[Example]]:
    """The examples that share a row, in a shuffled order."""
    if not config.packing:
        return [[example] for example in examples]
    shuffled = [examples[i] for i in np.random.default_rng(seed).permutation(len(examples))]
    lengths = [len(prompt) + len(reply) for prompt, reply in shuffled]
    return [[shuffled[i] for i in row] for row in pack(lengths, config.row_length)]


def _samples(run: Run, stage: str, params) -> list[dict]:
    """Replies of the trained policy to some training prompts, for samples.jsonl."""
    prompts = run.data("train_prompts")["prompt"][: run.config.sampler.slots]
    replies = sample_replies(run, params, prompts, 1, run.key(f"{stage} samples"), run.config.label.sampling)
    return [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, replies.texts, strict=True)]


def _prepare_data(run: Run) -> None:
    """Saves the tokenizer (of the policy's weights, or trained on the demonstrations) and the data, for all stages.

    At the start; once there is a checkpoint, the data stays as it is.
    """
    if any(run.folder("sft").glob("checkpoints/*")):
        return
    policy, data, seed = run.config.policy, run.config.data, run.config.seed
    if policy.weights:
        with blame("policy.weights"):
            tokenizer = tokenizers.from_weights(policy.weights)
            prompt_tokens(tokenizer, ["a"])  # through its chat template
    else:
        demonstrations, _ = load(data, "demonstrations", seed)
        tokenizer = tokenizers.train(training_texts(demonstrations), policy.model.vocab_size)
    folder = run.folder("sft")
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder / "tokenizer"))
    prepare(data, seed, tokenizer, policy.max_prompt_length, policy.max_response_length, folder / "data")
