"""Charts as small inline SVG: no fonts, no ids but the ones in use, no dates, colours left to the style sheet."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib.style
import numpy as np
from markupsafe import Markup, escape
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import MaxNLocator

from rlaif_jax.evaluation.frontier import Point
from rlaif_jax.reporting.calibration import Calibration

# matplotlib needs colours; these stand for the style sheet's variables, so that a chart follows light and dark mode.
INK, MUTED, GRID, ACCENT, SECOND = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", ACCENT: "--accent", SECOND: "--second"}

MAX_POINTS = 200  # of a curve; longer ones are averaged in equal blocks
_STEPS = (1, 2, 2.5, 5, 10)  # between ticks, times a power of ten
_SMOOTHED = 100  # points: from here on a curve has a moving average
_STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "lines.linewidth": 1.4,
    "path.simplify_threshold": 0.5,
}


def _chart(draw, name: str, description: str, size: tuple[float, float] = (3.6, 2.1)) -> Markup:
    """The SVG that `draw(axes)` makes; `name` keeps its ids apart from those of the page's other charts."""
    with matplotlib.style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        draw(canvas.add_subplot())
        file = io.StringIO()
        canvas.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return _tidy(file.getvalue(), description)


def _tidy(svg: str, description: str) -> Markup:
    """What matplotlib wrote, without what a page does not need."""
    view = re.search(r'viewBox="[^"]*"', svg)[0]
    svg = svg[svg.index(">", svg.index("<svg")) + 1 :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))

    def tidy_tag(match: re.Match) -> str:
        tag = re.sub(r' transform="rotate\(-0 [^"]*"| font-family:[^;"]*;', "", match[0])
        tag = re.sub(r' id="([^"]*)"', lambda id_: id_[0] if id_[1] in used else "", tag).replace("xlink:href", "href")
        return re.sub(r"\d+\.\d{2,}", lambda number: f"{float(number[0]):.2f}".rstrip("0").rstrip("."), tag)

    svg = re.sub(r"<[^>]*>", tidy_tag, svg)
    svg = re.sub(r">\s+<", "><", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("<defs></defs>", "").replace("<g/>", "")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(f'<svg role="img" aria-label="{escape(description)}" {view}>{svg.strip()}')


def curve(name: str, steps: Sequence[float], values: Sequence[float], chance: float | None = None) -> Markup:
    """A metric over the steps of a stage; `chance` is a level to hold it against."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    blocks = np.array_split(np.arange(len(x)), min(len(x), MAX_POINTS))
    x, y = (np.array([axis[block].mean() for block in blocks]) for axis in (x, y))

    def draw(axes):
        smoothed = len(x) >= _SMOOTHED
        axes.plot(x, y, color=ACCENT, alpha=0.35 if smoothed else 1, linewidth=0.8 if smoothed else 1.4)
        if smoothed:
            axes.plot(x, _moving_average(y, len(y) // 50), color=ACCENT)
        if len(x) == 1:
            axes.plot(x, y, "o", color=ACCENT, markersize=4)
        if chance is not None:
            axes.axhline(chance, color=SECOND, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))
        axes.margins(x=0.02, y=0.08)

    return _chart(draw, name, f"{name} over {len(steps)} steps, from {values[0]:.3g} to {values[-1]:.3g}")


def _moving_average(values: np.ndarray, reach: int) -> np.ndarray:
    """The mean of up to `reach` values on either side; as many on both, so that the ends stay where they are."""
    reaches = [min(reach, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - near : i + near + 1].mean() for i, near in enumerate(reaches)])


def reward_against_kl(kl: Sequence[float], reward: Sequence[float]) -> Markup:
    """Mean reward over the square root of the KL from RL's start, from the first step (hollow) to the last (filled).

    (Gao et al., arXiv 2210.10760: reward models and gold rewards are simple functions of that root.)
    """
    blocks = np.array_split(np.arange(len(kl)), min(len(kl), MAX_POINTS))
    distance = np.sqrt(np.maximum(np.asarray(kl, float), 0))  # an estimate near 0 can fall below it
    x, y = (np.array([axis[block].mean() for block in blocks]) for axis in (distance, np.asarray(reward, float)))

    def draw(axes):
        axes.plot(x, y, color=ACCENT, alpha=0.35, linewidth=0.8)
        axes.plot(x[1:-1], y[1:-1], "o", color=ACCENT, markersize=3, alpha=0.7, markeredgewidth=0)
        axes.plot(x[:1], y[:1], "o", color=ACCENT, markersize=6, fillstyle="none")
        axes.plot(x[-1:], y[-1:], "o", color=ACCENT, markersize=6)
        axes.set_xlabel("square root of KL from RL's start (nats a reply)")
        axes.set_ylabel("reward")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))

    description = f"reward over the square root of KL, ending at KL {kl[-1]:.3g} and reward {reward[-1]:.3g}"
    return _chart(draw, "reward against KL", description, (3.8, 2.6))


def overoptimisation(
    name: str,
    distances: np.ndarray,
    points: Mapping[str, Sequence[Mapping]],
    curve_distances: np.ndarray,
    curves: Mapping[str, np.ndarray | None],
    peak: float | None,
) -> Markup:
    """Gains in `proxy` (filled) and `gold` (hollow) over the square root of KL, with the laws that fit them.

    points: figures at `distances`; curves: values at `curve_distances`, None where nothing was fitted; peak: of gold.
    """
    dense = len(distances) > _SMOOTHED // 4

    def draw(axes):
        axes.axhline(0, color=MUTED, linewidth=0.6)
        for reward, colour, fill in (("proxy", ACCENT, "full"), ("gold", SECOND, "none")):
            means = np.array([point["mean"] for point in points[reward]])
            errors = np.abs(np.array([point["ci95"] for point in points[reward]]).T - means)
            axes.errorbar(
                distances, means, errors, fmt="none", ecolor=colour, elinewidth=0.7, alpha=0.25 if dense else 1
            )
            axes.plot(distances, means, "o", color=colour, fillstyle=fill, markersize=3 if dense else 4.5, label=reward)
            if curves[reward] is not None:
                axes.plot(curve_distances, curves[reward], color=colour)
        if peak is not None:
            axes.axvline(peak, color=SECOND, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlabel("square root of KL from RL's start (nats a reply)")
        axes.set_ylabel("gain over RL's start")
        axes.legend(frameon=False, labelcolor=MUTED)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=_STEPS))

    last = {reward: points[reward][-1]["mean"] for reward in points}
    described = ", ".join(f"{reward} gains {gain:.3g}" for reward, gain in last.items())
    return _chart(draw, name, f"{name}: at the last of {len(distances)} points {described}", (3.8, 2.8))


# Where the names of points stand: of neighbours, which may be close to each other, in different corners.
_CORNERS = (((5, 5), "left"), ((-5, -11), "right"), ((5, -11), "left"), ((-5, 5), "right"))


def frontier(name: str, points: Sequence[Point]) -> Markup:
    """How harmless the points are over how helpful, with 95 % intervals, in order from the first (hollow) on."""
    x, y = ([point[side]["mean"] for point in points] for side in (1, 2))

    def draw(axes):
        for i, point in enumerate(points):
            spread = [np.abs(np.array(figure["ci95"])[:, None] - figure["mean"]) for figure in point[1:]]
            axes.errorbar(x[i], y[i], yerr=spread[1], xerr=spread[0], fmt="none", ecolor=ACCENT, elinewidth=0.7)
            offset, side = _CORNERS[i % len(_CORNERS)]
            axes.annotate(point.name, (x[i], y[i]), offset, textcoords="offset points", ha=side, color=INK, fontsize=8)
        axes.plot(x, y, color=ACCENT, alpha=0.35, linewidth=0.8)
        axes.plot(x[1:], y[1:], "o", color=ACCENT, markersize=5)
        axes.plot(x[:1], y[:1], "o", color=ACCENT, markersize=6, fillstyle="none")
        axes.margins(0.15)
        axes.set_xlabel("helpful")
        axes.set_ylabel("harmless")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5, steps=_STEPS))

    described = ", ".join(f"{point.name} {a:.3g} and {b:.3g}" for point, a, b in zip(points, x, y, strict=True))
    return _chart(draw, name, f"{name}, helpful and harmless: {described}", (3.8, 2.8))


def reliability(calibration: Calibration) -> Markup:
    """How often A is the good reply where the judge says so with a given probability, with Wilson intervals."""
    x = np.array([bin_.probability for bin_ in calibration.bins])
    y = np.array([bin_.good["mean"] for bin_ in calibration.bins])
    low, high = np.array([bin_.good["ci95"] for bin_ in calibration.bins]).T
    reach = max(0.1, 1.15 * float(np.abs(x - 0.5).max()))

    def draw(axes):
        axes.plot([0, 1], [0, 1], color=SECOND, linewidth=0.9, linestyle=(0, (4, 3)))
        errors = np.maximum([y - low, high - y], 0)
        axes.errorbar(x, y, errors, fmt="o", color=ACCENT, markersize=4.5, elinewidth=0.9)
        axes.set_xlim(0.5 - reach, 0.5 + reach)
        axes.set_ylim(-0.05, 1.05)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
        axes.set_xlabel("judge's probability that A is better")
        axes.set_ylabel("A is the good reply")

    return _chart(draw, "reliability", f"reliability diagram of {calibration.n} pairs", (3.8, 2.6))


def histogram(values: Sequence[float]) -> Markup:
    """The judge's probabilities."""

    def draw(axes):
        axes.hist(values, bins=np.linspace(0, 1, 41), color=ACCENT, alpha=0.75)
        axes.axvline(0.5, color=SECOND, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlim(-0.02, 1.02)
        axes.set_xlabel("judge's probability that A is better")
        axes.set_ylabel("pairs")
        axes.grid(visible=False, axis="x")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, steps=_STEPS))

    return _chart(draw, "probabilities", f"histogram of the judge's {len(values)} probabilities", (3.8, 2.6))
