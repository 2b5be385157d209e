"""Figures as people read them."""

from collections.abc import Callable

from rlaif_jax.evaluation.statistics import Figure


def percent(value: float) -> str:
    """0.8021 -> 80%."""
    return f"{100 * value:.0f}%"


def points(value: float) -> str:
    """0.2917 -> +29, of percentage points."""
    return _minus(f"{value:+.0f}") if (value := round(100 * value)) else "0"


def number(value: float) -> str:
    """Three significant digits, and no exponent where it reads well without."""
    return _minus(f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}")


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


def fixed(scale: float) -> Callable[[float], str]:
    """The form of numbers of that size: as many decimals for each, so that a mean and its interval align."""
    size = abs(scale)
    decimals = 1 if size >= 10 else 2 if size >= 1 else 3
    return number if size >= 1e5 or 0 < size < 1e-3 else lambda value: _minus(f"{value:.{decimals}f}")


def interval(figure: Figure, form: Callable[[float], str]) -> str:
    """[72, 88], which no line break parts; empty where there is none."""
    if figure["mean"] is None:
        return ""
    low, high = (form(x).removesuffix("%") for x in figure["ci95"])
    return f"[{low},\N{NO-BREAK SPACE}{high}]"


def with_interval(figure: Figure, form: Callable[[float], str]) -> str:
    """80% [72, 88]; the mean alone says the unit."""
    return "not measured" if figure["mean"] is None else f"{form(figure['mean'])} {interval(figure, form)}"


def count(n: int, thing: str) -> str:
    """1 pair, 2 pairs."""
    return f"{n} {thing}" if n == 1 else f"{n} {thing}s"


def figure_cell(share: bool, figure: Figure) -> dict:
    """A figure in a table: mean and interval apart, so that a phone can put them below each other."""
    if figure["mean"] is None:
        return {"mean": "-", "interval": ""}
    form = percent if share else fixed(figure["mean"])
    return {"mean": form(figure["mean"]), "interval": interval(figure, form)}
