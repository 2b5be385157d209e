"""Supervised fine-tuning: the policy learns the demonstrations; the loss is on completions alone."""

import functools

import jax
import numpy as np

from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import encode_prompts, encode_responses
from rlaif_jax.losses.sft import completion_loss
from rlaif_jax.models import gguf
from rlaif_jax.models.parameters import init_parameters, place_parameters
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import shard_batch
from rlaif_jax.stages.run import Run, sample_responses, shuffled_batches
from rlaif_jax.training.loop import LoopConfig, train
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.sequences import Sequences, response_logprobs
from rlaif_jax.training.state import TrainState, abstract_state, init_state
from rlaif_jax.training.step import train_step


def sft_loss(params, batch: Sequences, model: LanguageModel):
    """Sum over completion tokens, their number, and sums of metrics: a `training.step.Loss`."""
    logprobs, entropy = response_logprobs(model, params, batch, temperature=1.0)
    total, weight = completion_loss(logprobs, batch.response_mask)
    return total, weight, {"entropy": entropy.sum()}


def run_sft(run: Run) -> None:
    """Reads the corpus, trains, and writes `sft/tokenizer` and `sft/checkpoints`."""
    config, corpus = run.config.sft, run.corpus()
    tokenizer = _make_tokenizer(run, [f"{d.prompt.text} {d.reply}" for d in corpus.demonstrations])
    later = [prompt.text for prompt in (*corpus.train_prompts, *corpus.evaluation_prompts)]
    encode_prompts(tokenizer, later, run.config.policy.max_prompt_length)  # too long a prompt fails now, not at the end
    prompts, prompt_mask = encode_prompts(
        tokenizer, [d.prompt.text for d in corpus.demonstrations], run.config.policy.max_prompt_length
    )
    responses, response_mask = encode_responses(
        tokenizer, [d.reply for d in corpus.demonstrations], run.config.policy.max_response_length
    )
    examples = Sequences(prompts, prompt_mask, responses, response_mask)
    batches = shuffled_batches(range(len(prompts)), config.batch_size, run.order_seed("sft"))

    model = run.language_model()
    optimizer = make_optimizer(config.optimizer, config.steps)
    loss = functools.partial(sft_loss, model=model)
    step_fn = jax.jit(functools.partial(train_step, loss=loss, optimizer=optimizer), donate_argnums=0)

    def next_step(state: TrainState, step: int):
        rows = np.asarray(batches[step])
        batch = shard_batch(jax.tree.map(lambda x: x[rows], examples), run.placement.mesh)
        state, metrics = step_fn(state, batch)
        tokens = examples.prompt_mask[rows].sum() + examples.response_mask[rows].sum()
        samples = _samples(run, state.params) if step + 1 == config.steps else []
        return state, metrics | {"tokens": tokens}, samples

    train(
        run.folder("sft"),
        LoopConfig(config.steps, config.checkpoint_every, config.keep_best),
        abstract_state(model, optimizer, run.placement),
        lambda: init_state(model, _initial_params(run, model), optimizer, run.placement),
        next_step,
    )


def _samples(run: Run, params) -> list[dict]:
    """Replies of the trained policy to a batch of training prompts, for samples.jsonl."""
    config = run.config.label
    prompts = [prompt.text for prompt in run.corpus().train_prompts[: config.sample_batch_size]]
    batches = sample_responses(
        run, params, prompts, run.key("sft samples"), config.temperature, config.sample_batch_size
    )
    texts, _ = next(batches)
    return [{"prompt": prompt, "response": text} for prompt, text in zip(prompts, texts, strict=True)]


def _make_tokenizer(run: Run, texts: list[str]):
    """The tokenizer of the policy's weights, or one trained on the corpus; saved for the other stages."""
    policy = run.config.policy
    if policy.weights:
        tokenizer = tokenizers.from_gguf(gguf.open_gguf(policy.weights))
    else:
        tokenizer = tokenizers.train(texts, policy.model.vocab_size)
    folder = run.folder("sft") / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    return tokenizer


def _initial_params(run: Run, model: LanguageModel):
    if run.config.policy.weights:
        weights = gguf.load_parameters(gguf.open_gguf(run.config.policy.weights))
        return place_parameters(model, weights, run.placement)
    return init_parameters(model, run.key("init"), run.placement)
