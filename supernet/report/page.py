"""What the HTML pages share: templates that escape everything, and numbers for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from latency.table import Target

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **context: Any) -> str:
    """Fill a template of `templates/`."""
    return _ENVIRONMENT.get_template(template).render(context)


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, thousands and more by letter; a dash for None.

    4.256 -> "4.26", 42.56 -> "42.6", 425.6 -> "426", 42560 -> "42.6 k", 4.2e6 -> "4.20 M".
    """
    if value is None:
        return "–"
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= (1e4 if letter == "k" else scale):
            return f"{value / scale:#.{digits}g}".rstrip(".") + f"\u202f{letter}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:#.{digits}g}" if value else "0"


def percent(value: float | None) -> str:
    """A percentage with two decimals; a dash for None."""
    return "–" if value is None else f"{value:.2f}"


def scale(units: Iterable[str]) -> str:
    """What axes and columns say of accuracies in "%", of scores without a unit, or of both."""
    kinds = {*units}
    return "%" if "" not in kinds else "score" if len(kinds) == 1 else "% or score"


def target_text(target: Target) -> str:
    """Where a network runs, in words."""
    threads = f"{target.threads} thread" + ("s" if target.threads != 1 else "")
    return (
        f"target {target.device}, {target.runtime}, {threads}, batch {target.batch}, "
        f"{target.dtype}, {target.resolution} px"
    )
