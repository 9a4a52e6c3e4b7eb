"""The common style of all plots, in runs and benchmarks.

Figures do without pyplot, which would keep them in global state and look for a display.
"""

import os
import textwrap
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# The palette of Okabe and Ito, which color-blind readers can distinguish.
ORANGE, BLUE, GREY = "#D55E00", "#0072B2", "#555555"
COLORS = (ORANGE, BLUE, "#009E73", "#E69F00", "#56B4E9", "#CC79A7", "#F0E442", GREY)

FONT = "DejaVu Sans"  # comes with matplotlib

_LETTERS_AN_INCH = 10  # in a title

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.family": FONT,
    "font.size": 9.0,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "seqattn",  # the same picture gives the same file
}
"""Settings for `matplotlib.rc_context`."""


def entitle(figure: Figure, text: str) -> None:
    """Sets the title of a figure, wrapped to its width."""
    figure.suptitle(textwrap.fill(text, int(_LETTERS_AN_INCH * figure.get_figwidth())))


def save(figure: Figure, path_stem: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Writes a figure as PNG and SVG, to the stem with a suffix, and returns both paths."""
    png, svg = Path(f"{os.fspath(path_stem)}.png"), Path(f"{os.fspath(path_stem)}.svg")
    figure.savefig(png, dpi=160)
    figure.savefig(svg, metadata={"Date": None})
    return png, svg
