"""How the report's figures look: SVG text that takes its colours and fonts from the page."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib
from cycler import cycler
from matplotlib.figure import Figure

# Colours that stand for the page's CSS variables, so that one SVG serves light and dark.
PAGE = {
    "ink": "#01aa01", "muted": "#02aa02", "grid": "#03aa03", "card": "#04aa04",
    "c1": "#11aa01", "c2": "#11aa02", "c3": "#11aa03", "c4": "#11aa04", "c5": "#11aa05",
    "c6": "#11aa06", "c7": "#11aa07",
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.color": PAGE["ink"],
    "axes.edgecolor": PAGE["muted"],
    "axes.labelcolor": PAGE["muted"],
    "axes.titlecolor": PAGE["ink"],
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PAGE["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": PAGE["muted"],
    "ytick.color": PAGE["muted"],
    "axes.prop_cycle": cycler(color=[PAGE[f"c{i}"] for i in range(1, 8)]),
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}
WIDTH = 9.2  # inches; the page scales it
P = ParamSpec("P")


def styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw with the report's style, whatever matplotlib's own settings are."""

    @functools.wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return styled


def new_figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), layout="constrained")


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element with ids of its own and the page's colours."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        # the browser draws the text, with fonts that have the letters
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", text)
    for variable, colour in PAGE.items():
        text = text.replace(colour, f"var(--{variable})")
    # fonts are the page's; sizes and weights stay
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    return re.sub(r"font: (?:(bold|700) )?([\d.]+px) [^;\"]*", _font, text)


def _font(match: re.Match[str]) -> str:
    weight, size = match.groups()
    return f"font-size: {size}" + ("; font-weight: 600" if weight else "")
