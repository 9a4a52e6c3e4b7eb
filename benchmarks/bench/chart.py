"""Bar charts of recorded lines, in one style for all benchmarks."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from benchmarks.bench.record import Line
from train.reports.style import COLORS, entitle, save

_HATCHES = ["", "///", "..."]
"""Hatches for implementations beyond the number of colors."""

_NAME = 1.3  # inches per name in the legend


def with_value(lines: Sequence[Line], field: str, path: str | os.PathLike[str]) -> list[Line]:
    """Returns the lines with a number in a field, except the baseline's lines.

    Raises ValueError with the chart's path if there are none.
    """
    found = [line for line in lines if line[field] and line["implementation"] != line.get("baseline")]
    if not found:
        raise ValueError(f"{path}: none of {len(lines)} rows has {field}")
    return found


def distinct(lines: Sequence[Line], field: str) -> list[Any]:
    """Returns the distinct values of a field, in the order of the lines."""
    return list(dict.fromkeys(line[field] for line in lines))


def fill(number: int) -> dict[str, Any]:
    """Returns the bar style of an implementation."""
    hatch, color = _HATCHES[number // len(COLORS) % len(_HATCHES)], COLORS[number % len(COLORS)]
    return {"facecolor": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}


def place(number: int, count: int, group: int) -> float:
    """Returns the x position of bar `number` of `count`, in a group of width 1."""
    return group + (number - (count - 1) / 2) / (count + 1)


def logarithmic(ax: Axes, groups: Sequence[str], text: Callable[[float], str]) -> None:
    """Sets a logarithmic y axis with labels from `text`, over named groups of bars."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(True, axis="y")


def finish(figure: Figure, names: Sequence[str], title: str, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Adds a legend below the chart and a title above it, and writes it as PNG and SVG.

    Ignores the suffix of the path and creates its folder.
    """
    handles = [Patch(label=name, **fill(number)) for number, name in enumerate(names)]
    fitting = max(1, int(figure.get_figwidth() / _NAME))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), fitting, 5))
    entitle(figure, title)
    stem = Path(path).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, stem)
