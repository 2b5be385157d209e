"""A labelling job: pairs of TL;DR summaries after six worked examples, both orders, against transformers.

    python benchmarks/judge_labelling.py --data=tldr_comparisons_human.jsonl.gz

The peer runs the same prompts byte for byte, twice: whole prompts in batches as most write it (`plain`), and with the
common beginning run once (`prefix cache`). tokens/s count the tokens of the whole prompts without padding on all sides.
"""

import dataclasses
import gzip
import json
import tempfile

import jax
import numpy as np
import yaml
from harness import WEIGHTS, alternate, parser, report, start_peer, watch

from configs import quickstart
from rlaif_jax.config import parse
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import answer_pairs, load_judge, plan_judging, read_prefix, suffix_tokens
from rlaif_jax.models.parameters import Placement
from rlaif_jax.parallel.mesh import make_mesh
from rlaif_jax.sampling.trees import grow

SHOTS, SHOT_WORDS = 6, 60
TEMPLATE = {
    "preambles": {
        "base": "A good summary is a shorter piece of text that has the essence of the original. Given a piece of "
        "text and two of its possible summaries, output 1 or 2 to indicate which summary is better."
    },
    "comparison": "Text - {prompt}\n\nSummary 1 - {response_1}\n\nSummary 2 - {response_2}",
    "verdict": "\n\nPreferred Summary=",
    "choices": ["1", "2"],
}


def distinct(rows, count: int) -> list[dict]:
    """The first rows with different posts."""
    found: dict[str, dict] = {}
    for row in rows:
        if len(found) < count:
            found.setdefault(row["id"], row)
    return list(found.values())


def read_job(path: str, count: int) -> tuple[list[Pair], list[dict]]:
    """The pairs to judge, and the worked examples from the end of the file."""
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    pairs = [
        Pair(row["post"].strip(), row["summary_0"].strip(), row["summary_1"].strip()) for row in distinct(rows, count)
    ]
    examples = [
        {
            "prompt": " ".join(row["post"].split()[:SHOT_WORDS]),
            "response_1": row["summary_0"].strip(),
            "response_2": row["summary_1"].strip(),
            "choice": row["choice"] + 1,
        }
        for row in reversed(distinct(reversed(rows), SHOTS))
    ]
    return pairs, examples


def main() -> None:
    """Prints a JSON line for each way of the peer's."""
    flags = parser(__doc__)
    flags.add_argument("--data", required=True, help="tldr_comparisons_human.jsonl.gz, see docs/data.md")
    flags.add_argument("--pairs", type=int, default=32)
    flags.add_argument("--batch", type=int, default=8, help="prompts in a batch of the peer's")
    flags.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a batch of ours")
    flags.add_argument("--buckets", type=int, default=4)
    options = flags.parse_args()
    pairs, examples = read_job(options.data, options.pairs)
    with tempfile.TemporaryDirectory() as folder:
        template = f"{folder}/template.yaml"
        with open(template, "w") as file:
            yaml.safe_dump(TEMPLATE | {"examples": examples}, file)
        settings = parse(quickstart.get_config().to_dict())
        config = dataclasses.replace(
            settings.judge,
            weights=WEIGHTS,
            prompt=dataclasses.replace(settings.judge.prompt, template=template, shots=len(examples)),
            dtype=options.dtype,
            batch_tokens=options.batch_tokens,
            buckets=options.buckets,
            bucket_multiple=16,
            max_length=4096,
        )
        judge = load_judge(config, 0, Placement(make_mesh(settings.mesh.judge)))
        judge.tokenizer.save_pretrained(folder)
        prompts = [prompt.text for pair in pairs for prompt in judge.template.asked(pair)]
        answers = None

        def ours():
            nonlocal answers
            fresh = load_prefix(judge)
            answers = answer_pairs(fresh, pairs, plan_judging(fresh, pairs), range(len(pairs)), lambda prompts: None)

        ours()
        for way, prefix_cache in (("plain", False), ("prefix cache", True)):
            request = {"task": "judge", "tokenizer": folder, "prompts": prompts, "choices": TEMPLATE["choices"]}
            request |= {"batch": options.batch, "prefix_cache": prefix_cache}
            peer = start_peer(options, request)
            with watch(peer) as watched:
                ours_seconds, peer_seconds = alternate(options.runs, ours, peer)
            more = counts(judge, answers, pairs)
            if peer:
                theirs = np.array(peer.answer["logprobs"]).reshape(answers.logprobs.shape)
                more["max_logprob_difference"] = float(np.abs(answers.logprobs - theirs).max())
                more["peer_shared_tokens"] = peer.answer["shared_tokens"]
                peer.close()
            name = f"labelling {options.pairs} pairs, peer: {way}, {options.dtype}"
            report(name, "tokens", int(answers.lengths.sum()), ours_seconds, peer_seconds, watched, **more)
            if options.no_peer:
                break


def load_prefix(judge):
    """The judge with its preamble read anew, as every job does."""
    prefix = read_prefix(judge.scorer.model, judge.scorer.params, np.array([judge.preamble], np.int32))
    return dataclasses.replace(judge, scorer=dataclasses.replace(judge.scorer, prefix=jax.block_until_ready(prefix)))


def counts(judge, answers, pairs) -> dict:
    """How many tokens the prompts have, and how many of them were computed."""
    rests = [suffix_tokens(judge, pair) for pair in pairs]
    trees = sum(len(grow(prompts, judge.choices)) for prompts in rests)
    return {
        "prompt_tokens": int(answers.lengths.sum()),
        "prefix_tokens": len(judge.preamble),
        "suffix_tokens": sum(len(rest) for prompts in rests for rest in prompts),
        "computed_tokens": len(judge.preamble) + trees,
    }


if __name__ == "__main__":
    main()
