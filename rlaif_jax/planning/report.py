"""A plan as data, which is what its JSON file holds, and as tables."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from rlaif_jax.planning.advice import advice
from rlaif_jax.planning.estimate import Estimate
from rlaif_jax.planning.machines import Machine
from rlaif_jax.stages.run import Run

_HOUR = 3600
_GIB = 1 << 30
_COLUMNS = ("program", "calls", "arguments", "outputs", "temporaries", "beside", "total", "of limit", "TFLOP", "memory",
            "links", "network", "least ms", "bound by")  # fmt: skip
_UNITS = ("", "", "GiB", "GiB", "GiB", "GiB", "GiB", "", "", "GB", "GB", "GB", "", "")


def as_data(
    run: Run, machine: Machine, estimates: Sequence[Estimate], command: str, efficiency: float, price: float
) -> dict[str, Any]:
    """All that a plan says. Figures of a program are those of one call and one device.

    efficiency: the share of the roofline that a run is taken to reach. price: of a device-hour; 0 for none.
    """
    devices, device = run.placement.mesh.size, machine.device
    stages: dict[str, dict[str, float]] = {}
    for each in estimates:
        stage = stages.setdefault(each.program.stage, {"memory": 0, "tokens": 0, "device_hours": 0.0})
        stage["memory"] = max(stage["memory"], each.total)
        stage["tokens"] += each.program.calls * each.program.tokens
        stage["device_hours"] += each.program.calls * each.least_seconds * devices / _HOUR / efficiency
    hours = sum(stage["device_hours"] for stage in stages.values())
    pairs = run.config.label.pairs * run.config.rounds if "label" in run.config.stages else 0
    totals = {"tokens": sum(stage["tokens"] for stage in stages.values()), "labels": pairs}
    if device:
        totals |= {"device_hours": hours, "hours": hours / devices, "efficiency": efficiency}
        totals |= {"price": hours * price} if price else {}
    return {
        "command": command,
        "topology": machine.name,
        "slices": machine.slices,
        "devices": devices,
        "mesh": dict(run.placement.mesh.shape),
        "judge_mesh": dict(run.judge_placement.mesh.shape),
        "limit": machine.memory,
        "source": device.source if device else "",
        "programs": [_program(each, machine.memory) for each in estimates],
        "stages": stages,
        "run": totals,
        "over": [line for each in estimates if (line := _trouble(each, run, machine))],
    }


def _trouble(each: Estimate, run: Run, machine: Machine) -> str:
    """Why a program can't run there, and what would help; "" where it can."""
    if each.refused:
        return f"{each.program.title}: the compiler refuses: {each.refused}"
    return advice(each, run, machine) if each.total > machine.memory else ""


def _program(each: Estimate, limit: int) -> dict[str, Any]:
    program, moved = each.program, each.traffic
    memory = {name: getattr(each, name) for name in ("arguments", "outputs", "temporaries", "beside", "total")}
    figures = {"name": program.title, "calls": program.calls, "tokens": program.tokens, "memory": memory}
    figures |= {"fits": each.total <= limit, "refused": bool(each.refused), "flops": each.flops}
    if moved:
        figures |= {"memory_bytes": moved.memory, "links_bytes": moved.links, "network_bytes": moved.network}
        figures |= {"collectives": dict(moved.by_kind), "seconds": each.seconds}
        figures |= {"least_seconds": each.least_seconds, "bound": each.bound}
    return figures


def print_plan(plan: Mapping[str, Any]) -> None:
    """The tables on the terminal, and a line for each program that does not fit."""
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    table = Table(title=_title(plan), title_justify="left")
    for column, unit in zip(_COLUMNS, _UNITS, strict=True):
        name = f"{column}\n{unit}" if unit else column
        table.add_column(name, justify="left" if column in ("program", "bound by") else "right")
    for program in plan["programs"]:
        table.add_row(*_row(program, plan["limit"]))
    console.print(table)
    for line in _about_run(plan):
        console.print(line, highlight=False)
    for line in plan["over"]:
        console.print(line, highlight=False, style="bold")


def markdown(plans: Sequence[Mapping[str, Any]]) -> str:
    """The tables of several plans, each with its command."""
    parts = []
    for plan in plans:
        heads = [f"{name}, {unit}" if unit else name for name, unit in zip(_COLUMNS, _UNITS, strict=True)]
        lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 2) + "---|"]
        lines += [f"| {' | '.join(_row(program, plan['limit']))} |" for program in plan["programs"]]
        about = [*_about_run(plan), *plan["over"]]
        parts.append("\n".join([f"## {_title(plan)}", "", "```", plan["command"], "```", "", *lines, "",
                                *[f"- {line}" for line in about]]))  # fmt: skip
    return "\n\n".join(parts)


def scaling(plans: Sequence[Mapping[str, Any]]) -> str:
    """What each device moves in a call and what that allows, machine by machine, as a Markdown table.

    Efficiency is the share of peak FLOP/s: at most, with all that moves hidden behind what is computed; and with
    nothing of it hidden.
    """
    heads = ("program", "machine", "devices", "tokens a call", "TFLOP", "collectives, GB", "over links, GB",
             "over network, GB", "compute ms", "links ms", "network ms", "efficiency at most",
             "nothing hidden")  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    names = list(dict.fromkeys(program["name"] for plan in plans for program in plan["programs"]))
    for name in names:
        for plan in plans:
            for program in (x for x in plan["programs"] if x["name"] == name and "seconds" in x):
                lines.append(f"| {' | '.join(_scaling_row(plan, program))} |")
    return "\n".join(lines)


def _scaling_row(plan: Mapping[str, Any], program: Mapping[str, Any]) -> list[str]:
    seconds = program["seconds"]
    moving = seconds["links"] + seconds["network"]
    sizes = (sum(program["collectives"].values()), program["links_bytes"], program["network_bytes"])
    return [
        program["name"],
        _machine(plan),
        str(plan["devices"]),
        f"{program['tokens']:,}",
        f"{program['flops'] / 1e12:.1f}",
        *(f"{size / 1e9:.2f}" for size in sizes),
        *(f"{1000 * seconds[part]:.1f}" for part in ("compute", "links", "network")),
        f"{seconds['compute'] / program['least_seconds']:.0%}",
        f"{seconds['compute'] / (max(seconds['compute'], seconds['memory']) + moving):.0%}",
    ]


def _machine(plan: Mapping[str, Any]) -> str:
    return (f"{plan['slices']} x " if plan["slices"] > 1 else "") + plan["topology"]


def _title(plan: Mapping[str, Any]) -> str:
    mesh = ", ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1)
    return f"{_machine(plan)}: {plan['devices']} devices of {plan['limit'] / _GIB:.1f} GiB, mesh {mesh or 'of one'}"


def _row(program: Mapping[str, Any], limit: int) -> list[str]:
    memory = program["memory"]
    parts = [f"{memory[name] / _GIB:.2f}" for name in ("arguments", "outputs", "temporaries", "beside", "total")]
    share = "refused" if program["refused"] else f"{memory['total'] / limit:.0%}{'' if program['fits'] else ' OVER'}"
    moved = [f"{program[name] / 1e9:.2f}" if name in program else "-" for name in (
        "memory_bytes", "links_bytes", "network_bytes")]  # fmt: skip
    timed = program.get("seconds")
    least = [f"{1000 * program['least_seconds']:.1f}", program["bound"]] if timed else ["-", "-"]
    calls = f"{program['calls']:,}" if program["calls"] else "?"
    return [program["name"], calls, *parts, share, f"{program['flops'] / 1e12:.2f}", *moved, *least]


def _about_run(plan: Mapping[str, Any]) -> list[str]:
    """The stages and the run, a line each."""
    lines = []
    for name, stage in plan["stages"].items():
        hours = f", {stage['device_hours']:,.1f} device-hours" if "device_hours" in plan["run"] else ""
        lines.append(
            f"{name}: {stage['memory'] / _GIB:.2f} GiB of {plan['limit'] / _GIB:.2f}, "
            f"{_count(stage['tokens'])} tokens at most{hours}"
        )
    total = plan["run"]
    line = f"the run: {_count(total['tokens'])} tokens at most, {total['labels']:,} labels"
    if "device_hours" in total:
        line += (
            f", {total['device_hours']:,.1f} device-hours ({total['hours']:,.1f} hours) at "
            f"{total['efficiency']:.0%} of the roofline, which is a bound and no forecast"
        )
    if "price" in total:
        line += f", USD {total['price']:,.0f}"
    if plan["unplanned"]:
        lines.append(f"not planned: {', '.join(plan['unplanned'])}")
    return [*lines, line]


def _count(number: float) -> str:
    """1234567 -> "1.2 M"."""
    power = min(int(math.log10(number)) // 3, 4) if number >= 1 else 0
    return f"{number / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}".strip()
