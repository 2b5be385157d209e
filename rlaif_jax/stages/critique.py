"""Critique and revision (Bai et al., arXiv 2212.08073, section 3): replies to red-team prompts, made better on request.

The SFT policy replies to each prompt. In every round a principle of the constitution is drawn for each reply; the
reviser criticises the reply and rewrites it, and the next round goes on from there.
"""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Sequence

import jax
import numpy as np
import pyarrow as pa
from etils import epath
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import response_tokens, texts_to_tokens
from rlaif_jax.errors import UserError, blame
from rlaif_jax.evaluation.statistics import Figure, mean_ci
from rlaif_jax.files import read_parquet, remove_folder, there, write_json, write_parquet
from rlaif_jax.judge.constitution import Principle, draw, load_constitution, principles_for
from rlaif_jax.judge.critiques import CritiqueTemplate, load_critique_template
from rlaif_jax.judge.score import read_prefix
from rlaif_jax.models.parameters import decoding_model, decoding_parameters
from rlaif_jax.models.transformer import ModelConfig
from rlaif_jax.models.weights import open_weights, weights_hash
from rlaif_jax.sampling.continuous import Sampler
from rlaif_jax.sampling.stopping import cut, make_stopping
from rlaif_jax.stages.replies import keep_replies, keep_rows, loaded_decoder
from rlaif_jax.stages.run import Run, shuffled_batches

_WRITTEN = pa.struct([
    ("prompt", pa.string()),  # what the reviser was asked, after the preamble that the manifest has
    ("hash", pa.string()),  # of preamble and prompt
    ("text", pa.string()),
    ("tokens", pa.int32()),
    ("status", pa.string()),  # "ok", "prompt_too_long" (for the reviser), "empty", "cut" or "too_long" (for the policy)
])  # fmt: skip
_ROUND = pa.struct([
    ("principle", pa.string()),
    ("critique", _WRITTEN),  # null with revise_only
    ("revision", _WRITTEN),  # null where the critique failed
    ("status", pa.string()),  # "ok", or "critique_" or "revision_" and the status of what failed
    ("text", pa.string()),  # the last good reply
])  # fmt: skip
SCHEMA = pa.schema([
    ("prompt", pa.string()),
    ("response", pa.string()),  # of the SFT policy
    ("ended", pa.bool_()),  # False where the response reached its limit
    ("rounds", pa.list_(_ROUND)),
])  # fmt: skip


def run_critique(run: Run) -> None:
    """Reads the SFT policy and the red-team prompts; writes `critique/revisions.parquet`, manifest and results.

    A text is kept in shards as soon as it is made, and never made again. Raises UserError where more of a round's
    revisions have failed than `critique.max_failure_rate`.
    """
    folder, config = run.folder("critique"), run.config.critique
    file, needed = folder / "revisions.parquet", ("revision",) if config.revise_only else ("critique", "revision")
    principles = principles_for("critique", run.config.constitution, needed)
    template = critique_template(run)
    if not there(file):
        write_parquet(file, pa.Table.from_pylist(_revised(run, principles, template), SCHEMA))
    for step in ("replies_sft", *_step_names(config.rounds)):
        remove_folder(folder / step)  # the shards of what the file now has
    rows = read_parquet(file).to_pylist()
    write_json(folder / "manifest.json", _manifest(run, principles, template, rows))
    write_json(folder / "results.json", _figures(run, rows) | _by_principle(run, principles, rows))


def critique_template(run: Run) -> CritiqueTemplate:
    """What the reviser is asked, and its worked examples."""
    config = run.config.critique
    with blame("critique.template"):
        return load_critique_template(config.template, config.shots, config.revise_only)


def texts(row: dict) -> list[str]:
    """The reply in a row of `revisions.parquet`, at first and after each round."""
    return [row["response"], *(step["text"] for step in row["rounds"])]


def check_reviser(run: Run) -> None:
    """Raises UserError where a reviser of its own weights has no room for a prompt. Other ones need the SFT stage."""
    if run.config.critique.weights:
        weights = run.config.critique.weights
        tokenizer, shape = tokenizers.from_weights(weights), open_weights(weights).config
        _preamble_and_room(run, critique_template(run), tokenizer, shape)


def _preamble_and_room(
    run: Run, template: CritiqueTemplate, tokenizer: PreTrainedTokenizerFast, shape: ModelConfig
) -> tuple[list[int], int]:
    """The tokens of the worked examples, and how many a prompt may have. Raises UserError where it may have none."""
    config, most = run.config.critique, shape.max_position_embeddings
    (examples,) = texts_to_tokens(tokenizer, [template.preamble])
    preamble = [*tokenizers.beginning(tokenizer), *examples]
    room = most - len(preamble) - config.max_new_tokens
    if room <= 0:
        raise UserError(
            f"config.critique: the {config.shots} examples of template {template.name} have {len(preamble)} tokens and "
            f"critique.max_new_tokens is {config.max_new_tokens}, which leaves no room for a prompt in the {most} that "
            "the reviser reads: lower critique.shots or max_new_tokens"
        )
    return preamble, room


@dataclasses.dataclass(frozen=True)
class _Reviser:
    """A model that has read the template's preamble, and continues what follows."""

    template: CritiqueTemplate
    tokenizer: PreTrainedTokenizerFast
    sampler: Sampler
    room: int  # tokens that a prompt may have
    commit_every: int

    def write(
        self, prompts: Sequence[str | None], principles: Sequence[str], key: jax.Array, folder: epath.Path
    ) -> list[dict | None]:
        """What is written after each prompt, as a row of `_WRITTEN`; None after None."""
        about = [
            {"prompt": prompt, "hash": prompt and self.template.hash(prompt), "principle": principle}
            for prompt, principle in zip(prompts, principles, strict=True)
        ]
        after_examples = bool(self.template.preamble)
        tokens = texts_to_tokens(self.tokenizer, [prompt or "" for prompt in prompts], continuing=after_examples)
        skipped = {i for i, row in enumerate(tokens) if prompts[i] is None or len(row) > self.room}
        asked = [[self.tokenizer.eos_token_id] if i in skipped else row for i, row in enumerate(tokens)]
        rows = keep_rows(self.sampler, self.tokenizer, asked, 1, key, folder, self.commit_every, skipped, about)
        return [self._written(prompt, rows.get(i)) for i, prompt in enumerate(prompts)]

    def _written(self, prompt: str | None, reply: dict | None) -> dict | None:
        if prompt is None:
            return None
        row = {"prompt": prompt, "hash": self.template.hash(prompt)}
        if reply is None:
            return row | {"text": "", "tokens": 0, "status": "prompt_too_long"}
        # Not the kept text: without the blanks around it, a marker at its beginning would no longer be one.
        text = cut(self.tokenizer.decode(reply["tokens"], skip_special_tokens=True), self.template.stop).strip()
        status = "cut" if not reply["ended"] else "ok" if text else "empty"
        return row | {"text": text, "tokens": len(reply["tokens"]), "status": status}


def _load_reviser(run: Run, template: CritiqueTemplate, params) -> _Reviser:
    """`params`: the SFT policy's. Raises UserError where the preamble leaves no room for a prompt."""
    config = run.config.critique
    if config.weights:
        tokenizer = tokenizers.from_weights(config.weights)
        model, parameters = loaded_decoder(run, config.weights, config.dtype)
    else:
        tokenizer, model = run.tokenizer(), decoding_model(run.language_model())
        parameters = decoding_parameters(run.language_model(), params, run.placement)
    preamble, room = _preamble_and_room(run, template, tokenizer, model.config)
    prefix = read_prefix(model, parameters, np.array([preamble], np.int32)) if preamble else None
    stopping, limit = make_stopping(tokenizer, template.stop), config.max_new_tokens
    sampler = Sampler(
        model, parameters, run.placement, stopping, config.revision_sampling, limit, config.sampler, prefix
    )
    return _Reviser(template, tokenizer, sampler, room, config.commit_every)


def _revised(run: Run, principles: Sequence[Principle], template: CritiqueTemplate) -> list[dict]:
    """The rows of `revisions.parquet`."""
    config, folder = run.config.critique, run.folder("critique")
    red_team = run.data("red_team_prompts")["prompt"]
    if config.prompts > len(red_team):  # each is replied to once
        raise UserError(
            f"config.critique.prompts={config.prompts} is more than the {len(red_team)} red-team prompts that "
            "config.data.red_team_prompts gives: lower it, or give more of them"
        )
    drawn = shuffled_batches(red_team, 1, run.order_seed("critique"), "critique.prompts")
    prompts = [drawn[i][0] for i in range(config.prompts)]
    params, key = run.trained_params("sft", run.language_model()), run.key("critique")
    shards = folder / "replies_sft"
    replies = keep_replies(run, params, prompts, 1, key, config.sampling, shards, config.commit_every)
    rows = [
        {"prompt": prompt, "response": text, "ended": ended, "rounds": []}
        for prompt, text, ended in zip(prompts, replies.texts, replies.ended, strict=True)
    ]
    reviser = _load_reviser(run, template, params)
    for number in range(config.rounds):
        chosen = draw(principles, run.order_seed(f"principles of round {number}"), range(len(rows)))
        steps = _revise(run, reviser, rows, chosen, number)
        _check_failures(run, steps, number)
        for row, step in zip(rows, steps, strict=True):
            row["rounds"].append(step)
    return rows


def _step_names(rounds: int) -> list[str]:
    return [f"{step}_{number + 1}" for number in range(rounds) for step in ("critique", "revision")]


def _revise(run: Run, reviser: _Reviser, rows: list[dict], principles: Sequence[Principle], number: int) -> list[dict]:
    """Round `number` of every row, as `_ROUND`."""
    template, folder, ids = reviser.template, run.folder("critique"), [principle.id for principle in principles]
    critique_step, revision_step = _step_names(number + 1)[-2:]
    asked = [
        template.critique_prompt(row["prompt"], texts(row)[-1], principle.critique)
        for row, principle in zip(rows, principles, strict=True)
    ]
    critiques = [None] * len(rows)
    if template.critique:
        critiques = reviser.write(asked, ids, run.key("critiques", number), folder / critique_step)
    good = [critique is None or critique["status"] == "ok" for critique in critiques]
    then_asked = [
        template.revision_prompt(asked[i], critiques[i]["text"] if critiques[i] else "", principle.revision)
        if good[i]
        else None
        for i, principle in enumerate(principles)
    ]
    revisions = reviser.write(then_asked, ids, run.key("revisions", number), folder / revision_step)
    tokenizer = run.tokenizer()
    return [
        _round(run, tokenizer, principle, critique, revision, texts(row)[-1])
        for principle, critique, revision, row in zip(ids, critiques, revisions, rows, strict=True)
    ]


def _round(
    run: Run,
    tokenizer: PreTrainedTokenizerFast,
    principle: str,
    critique: dict | None,
    revision: dict | None,
    before: str,
) -> dict:
    if revision and revision["status"] == "ok":
        (tokens,) = response_tokens(tokenizer, [revision["text"]])
        if len(tokens) >= run.config.policy.max_response_length:
            revision = revision | {"status": "too_long"}
    status = f"revision_{revision['status']}" if revision else f"critique_{critique['status']}"
    ok = status == "revision_ok"
    return {
        "principle": principle,
        "critique": critique,
        "revision": revision,
        "status": "ok" if ok else status,
        "text": revision["text"] if ok else before,
    }


def _check_failures(run: Run, steps: list[dict], number: int) -> None:
    statuses, limit = collections.Counter(step["status"] for step in steps), run.config.critique.max_failure_rate
    rate = 1 - statuses.pop("ok", 0) / len(steps)
    if rate > limit:
        raise UserError(
            f"stage critique: {rate:.1%} of the revisions of round {number + 1} failed ({dict(statuses)}), more than "
            f"config.critique.max_failure_rate={limit:g}: their texts are in {run.folder('critique')}"
        )


def _manifest(run: Run, principles: Sequence[Principle], template: CritiqueTemplate, rows: list[dict]) -> dict:
    """Who revised, with what prompts and principles, and how the rounds ended."""
    weights, constitution = run.config.critique.weights, load_constitution(run.config.constitution.file)
    rounds = list(zip(*(row["rounds"] for row in rows), strict=True))
    return {
        "reviser": weights or "the SFT policy",
        "reviser_hash": weights_hash(weights) if weights else None,
        "template": template.name,
        "template_hash": template.digest,
        "preamble": template.preamble,
        "constitution": constitution.name,
        "constitution_digest": constitution.digest,
        "principles": [dataclasses.asdict(principle) for principle in principles],
        "rows": len(rows),
        "rounds": [
            {name: dict(collections.Counter(step[name] for step in steps)) for name in ("status", "principle")}
            for steps in rounds
        ],
    }


def _figures(run: Run, rows: list[dict]) -> dict[str, Figure]:
    """How good the replies are by the ground truth, first and after each round; what failed or changed in a round."""
    mean = functools.partial(mean_ci, resamples=run.config.evaluation.bootstrap_samples, seed=run.config.seed)
    truth, figures, names = run.ground_truth(), {}, ["first"]
    for number in range(run.config.critique.rounds):
        name = f"revision_{number + 1}"
        steps = [row["rounds"][number] for row in rows]
        figures[f"critique_failed/{name}"] = mean([step["status"] != "ok" for step in steps])
        figures[f"critique_changed/{name}"] = mean([texts(row)[number] != texts(row)[number + 1] for row in rows])
        names.append(name)
    if truth and all(truth.knows(row["prompt"]) for row in rows):
        for number, name in enumerate(names):
            grades = [truth.grades(row["prompt"], texts(row)[number]) for row in rows]
            figures |= {f"critique_{grade}/{name}": mean([x[grade] for x in grades]) for grade in grades[0]}
    return figures


def _by_principle(run: Run, principles: Sequence[Principle], rows: list[dict]) -> dict[str, Figure]:
    """What failed and what changed under each principle, over the replies and rounds that have drawn it."""
    failed, changed = (collections.defaultdict(list) for _ in range(2))
    for row in rows:
        for step, (before, after) in zip(row["rounds"], itertools.pairwise(texts(row)), strict=True):
            failed[step["principle"]].append(step["status"] != "ok")
            changed[step["principle"]].append(before != after)
    return {
        f"critique_{name}_by_principle/{principle.id}": mean_ci(
            found[principle.id], run.config.evaluation.bootstrap_samples, run.config.seed
        )
        for name, found in (("failed", failed), ("changed", changed))
        for principle in principles
    }
