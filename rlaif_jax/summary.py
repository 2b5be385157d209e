"""What a run prints at its end: the figures, and a few replies side by side."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlaif_jax.config import flatten
from rlaif_jax.evaluation.names import BY_POLICY, SINGLE, by_role, policy_titles, title
from rlaif_jax.evaluation.statistics import show_figure
from rlaif_jax.files import read_json, read_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import Judge, Judgement
from rlaif_jax.stages.run import Run


def print_summary(run: Run) -> None:
    """The table of results and `evaluation.shown_samples` replies side by side."""
    console = _console()
    results = by_role(read_json(run.folder("eval") / "results.json"), run.config.policy_stage)
    policy = title(flatten(run.config))
    rounds = f", round {run.round} of {run.config.rounds}" if run.config.rounds > 1 else ""
    table = Table(title=f"{escape(str(run.workdir))}{rounds}: mean [95 % interval]", title_justify="left")
    policies = policy_titles(run.config.policies, policy)
    for column in ("", *policies.values(), "n"):
        table.add_column(column, justify="right" if column else "left")
    for label, name in BY_POLICY:
        if f"{name}/sft" not in results:  # real data has no ground truth
            continue
        figures = [results[f"{name}/{each}"] for each in policies]
        table.add_row(label, *map(show_figure, figures), str(figures[-1]["n"]))
    table.add_section()
    for label, name in SINGLE:
        if name not in results:
            continue
        empty, figure = [""] * (len(policies) - 1), results[name]
        table.add_row(label.format(title=policy), *empty, show_figure(figure), str(figure["n"]))
    console.print(table)
    if results["judge_is_training_judge"]:
        console.print("The judge that evaluates is the judge that labelled or rewarded.")
    _print_samples(console, run, policy)


def _print_samples(console: Console, run: Run, policy: str) -> None:
    rows = read_parquet(run.folder("eval") / "preferences.parquet").to_pylist()
    table = Table(title="Held-out prompts", title_justify="left", show_lines=True)
    for column in ("prompt", "SFT", policy, f"P({policy} better)"):
        table.add_column(column)
    for row in rows[: run.config.evaluation.shown_samples]:
        probability = "-" if row["prob_a"] is None else f"{row['prob_a']:.2f}"
        table.add_row(*map(escape, (row["prompt"], row["response_b"], row["response_a"])), probability)
    console.print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a file has no width of its own


def print_replay(judge: Judge, stored: dict, fresh: dict, same: bool) -> None:
    """The exact prompts of a label row, and the stored fields beside the new ones."""
    console = _console()
    _print_prompts(console, judge, store.pair_of(stored))
    table = Table()
    for column in ("field", "stored", "now"):
        table.add_column(column)
    for name in stored:
        if name not in ("prompt", "response_a", "response_b", "principle_text"):
            table.add_row(name, escape(str(stored[name])), escape(str(fresh[name])))
    console.print(table)
    console.print("same label" if same else "DIFFERENT label")


def print_judgement(judge: Judge, pair: Pair, judgement: Judgement) -> None:
    """The exact prompts of a pair, and what the judge says of it."""
    console = _console()
    _print_prompts(console, judge, pair)
    table = Table(title=judge.provenance["judge"], title_justify="left")
    for column in ("", "P(a is better)", "tokens"):
        table.add_column(column)
    found, sides = judgement.verdict, _sides(judge)
    numbers = (found.prob_a_forward, found.prob_a_reversed, found.prob_a) if found else (None, None, None)
    for name, probability, tokens in zip(
        (*sides, "both sides"), numbers, (judgement.tokens_forward, judgement.tokens_reversed, ""), strict=True
    ):
        table.add_row(name, "-" if probability is None else f"{probability:.4f}", str(tokens))
    for name, probability in zip(judge.template.axes, (found and found.prob_a_axes) or (), strict=False):
        table.add_row(name, f"{probability:.4f}", "")
    console.print(table)
    if found and found.rating_a is not None:
        console.print(f"ratings from -1 to 1: a {found.rating_a:.4f}, b {found.rating_b:.4f}")
    for name, rationales in zip(sides, (judgement.rationale_forward, judgement.rationale_reversed), strict=True):
        for rationale in rationales or ():
            console.rule(f"rationale, {name}")
            console.print(rationale, markup=False, highlight=False, soft_wrap=True)
    if judgement.status != "ok":
        console.print(f"not scored: {judgement.status}")


def _print_prompts(console: Console, judge: Judge, pair: Pair) -> None:
    prompts = judge.template.asked(pair)
    for i, prompt in enumerate(prompts):
        console.rule(f"prompt, {_sides(judge)[2 * i // len(prompts)]}")
        console.print(prompt.text, markup=False, highlight=False, soft_wrap=True)


def _sides(judge: Judge) -> tuple[str, str]:
    return ("a", "b") if judge.template.method == "rating" else ("a first", "b first")


def print_audit(title: str, figures: dict) -> None:
    """The figures of a label file's audit."""
    table = Table(title=escape(title), title_justify="left")
    for column, justify in (("", "left"), ("mean [95 % interval]", "right"), ("n", "right")):
        table.add_column(column, justify=justify)
    for name, figure in figures.items():
        if isinstance(figure, dict):
            table.add_row(escape(name), show_figure(figure), str(figure["n"]))
        elif isinstance(figure, float):
            table.add_row(escape(name), f"{figure:.3f}", "")
    _console().print(table)
