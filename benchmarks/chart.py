"""The picture of a benchmark: how fast each implementation is by the baseline, case by case."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks import machine
from benchmarks.row import Row

# Okabe and Ito's colours, which colour-blind people tell apart; more implementations than colours are hatched.
_COLORS = "#D55E00 #0072B2 #009E73 #E69F00 #56B4E9 #CC79A7 #F0E442 #555555".split()
_ROOM = 1.6  # between a bar and the end of the axis, for its number
_HATCHES = ["", "///", "..."]
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 9.0,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.hashsalt": "seqattn",  # the same picture gives the same file
}
_BAR = 0.2  # inches


def speeds(rows: Sequence[Row], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws bars of speed relative to the baseline, a panel for each shape and pass, a group for each mask.

    Args:
        rows: those with a speed are drawn, on a logarithmic scale; the baseline is the line at 1.
        path: that of the picture; its suffix does not matter.

    Returns:
        The paths of the PNG and of the SVG beside it.

    Raises:
        ValueError: no row has a speed.
    """
    drawn = [row for row in rows if row.speed and row.implementation != row.baseline]
    if not drawn:
        raise ValueError(f"{path}: none of {len(rows)} rows has a speed relative to another one, the baseline")
    names, patterns = _distinct(r.implementation for r in drawn), _distinct(r.case.pattern for r in drawn)
    shapes, directions = _distinct(r.case.shape.name for r in drawn), _distinct(r.case.direction for r in drawn)
    width = max(3.5, len(patterns) * (len(names) + 1) * _BAR) * len(directions)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width + 0.8, 2.3 * len(shapes) + 1.2), layout="constrained")
        axes = figure.subplots(len(shapes), len(directions), sharex=True, sharey="row", squeeze=False)
        for across, shape in zip(axes, shapes, strict=True):
            for ax, direction in zip(across, directions, strict=True):
                panel = [row for row in drawn if (row.case.shape.name, row.case.direction) == (shape, direction)]
                _draw_panel(ax, panel, names, patterns)
                ax.set_title(f"{shape}, {direction}")
            # The panels of a shape share their axis, so that the limits are those of all its rows.
            speeds = [row.speed or 1 for row in drawn if row.case.shape.name == shape]
            across[0].set_ylim(min(0.5, min(speeds) / _ROOM), max(2, max(speeds) * _ROOM))
            across[0].set_ylabel(f"speed ({drawn[0].baseline} = 1)")
        handles = [Patch(label=name, **fill(number)) for number, name in enumerate(names)]
        figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5))
        figure.suptitle(f"{machine.describe()['device']}, {drawn[0].case.dtype}")
        return save(figure, Path(path).with_suffix(""))


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(values))


def _draw_panel(ax: Axes, rows: Sequence[Row], names: list[str], patterns: list[str]) -> None:
    step = 1 / (len(names) + 1)
    for number, name in enumerate(names):
        mine = [row for row in rows if row.implementation == name]
        places = [patterns.index(row.case.pattern) + (number - (len(names) - 1) / 2) * step for row in mine]
        # Bars grow from 1: what is faster upwards, what is slower downwards.
        heights = [(row.speed or 1) - 1 for row in mine]
        ax.bar(places, heights, step, bottom=1, **fill(number))
        for place, row in zip(places, mine, strict=True):
            _name_bar(ax, place, row.speed or 1)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(patterns)), patterns)
    ax.grid(True, axis="y")


def fill(number: int) -> dict[str, Any]:
    """The look of the bars of an implementation."""
    hatch, color = _HATCHES[number // len(_COLORS) % len(_HATCHES)], _COLORS[number % len(_COLORS)]
    return {"facecolor": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}


def _name_bar(ax: Axes, place: float, speed: float) -> None:
    above = speed >= 1
    text = f"{speed:.0f}" if speed >= 10 else f"{speed:.2g}"
    offset, align = ((0, 2), "bottom") if above else ((0, -2), "top")
    ax.annotate(text, (place, speed), offset, textcoords="offset points", ha="center", va=align, size=6, rotation=90)


def finish(figure: Figure, names: Sequence[str], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Names implementations below a picture and the machine above it, and saves it as PNG and SVG."""
    handles = [Patch(label=name, **fill(number)) for number, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    figure.suptitle(f"{machine.describe()['device']}, {machine.describe()['cores']} cores, float32", size=8)
    return save(figure, Path(path).with_suffix(""))


def save(figure: Figure, stem: Path) -> tuple[Path, Path]:
    """Writes a PNG and, beside it, an SVG."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = stem.with_suffix(".png"), stem.with_suffix(".svg")
    figure.savefig(png, dpi=160)
    figure.savefig(svg, metadata={"Date": None})
    return png, svg
