"""SL-CAI (Bai et al., arXiv 2212.08073, section 3.2): supervised fine-tuning on revisions and helpful demonstrations.

The paper fine-tunes the pretrained model, having drawn the first replies from a helpful one. Here both are the SFT
policy, so that what it has learned of the task stays: with no demonstrations at all there is no other to begin with.
"""

import numpy as np
import pyarrow as pa

from rlaif_jax.files import read_parquet, there, write_json, write_parquet
from rlaif_jax.stages.run import Run
from rlaif_jax.stages.sft import demonstrations, packed_replies, tune


def run_sl_cai(run: Run) -> None:
    """Reads the SFT policy, the revisions and the demonstrations; writes `sl_cai/examples.parquet`, how many there are
    of each to `results.json`, and checkpoints.
    """
    folder = run.folder("sl_cai")
    file = folder / "examples.parquet"
    if not there(file):
        write_parquet(file, pa.Table.from_pylist(_examples(run), _SCHEMA))
    examples = read_parquet(file)
    write_json(folder / "results.json", _counts(examples["row"].null_count, examples.num_rows))
    rows = packed_replies(run, examples.to_pydict())
    tune(run, "sl_cai", run.config.sl_cai, rows, lambda: run.base_params("sl_cai"))


# Where an example is from: the row and the round (from 1) of `critique/revisions.parquet`; null for a demonstration.
_SCHEMA = pa.schema([("prompt", pa.string()), ("reply", pa.string()), ("row", pa.int32()), ("round", pa.int32())])


def _counts(demonstrations: int, examples: int) -> dict[str, int | float]:
    share = demonstrations / examples if examples else 0.0
    return {
        "sl_cai_revisions": examples - demonstrations,
        "sl_cai_demonstrations": demonstrations,
        "sl_cai_helpful_share": share,
    }


def _examples(run: Run) -> list[dict]:
    """The revisions of every round that have not failed, as in the paper, and the demonstrations beside them."""
    revised = read_parquet(run.folder("critique") / "revisions.parquet").to_pylist()
    revisions = [
        {"prompt": row["prompt"], "reply": step["text"], "row": i, "round": number}
        for i, row in enumerate(revised)
        for number, step in enumerate(row["rounds"], 1)
        if step["status"] == "ok"
    ]
    red_team, shown = set(run.data("red_team_prompts")["prompt"]), demonstrations(run)
    helpful = [
        {"prompt": prompt, "reply": reply}
        for prompt, reply in zip(shown["prompt"], shown["reply"], strict=True)
        if prompt not in red_team
    ]
    share = run.config.sl_cai.helpful_share
    wanted = round(len(revisions) * share / (1 - share))
    if wanted > len(helpful):
        print(f"sl_cai: {len(helpful)} helpful demonstrations beside {len(revisions)} revisions, not {wanted}: there "
              "are no more", flush=True)  # fmt: skip
    order = np.random.default_rng(run.order_seed("sl_cai")).permutation(len(helpful))
    return revisions + [helpful[i] for i in order[:wanted]]
