"""Pictures of recorded lines: bars of one look, whoever measured."""

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
"""More implementations than colours are hatched."""

_NAME = 1.3  # inches that a name takes in the legend


def with_value(lines: Sequence[Line], field: str, path: str | os.PathLike[str]) -> list[Line]:
    """The lines with a number in a field, without the baseline that others are relative to, if there is one.

    Raises ValueError, with the picture's path, if there is none.
    """
    found = [line for line in lines if line[field] and line["implementation"] != line.get("baseline")]
    if not found:
        raise ValueError(f"{path}: none of {len(lines)} rows has {field}")
    return found


def distinct(lines: Sequence[Line], field: str) -> list[Any]:
    """The values of a field, each once, in the order of the lines."""
    return list(dict.fromkeys(line[field] for line in lines))


def fill(number: int) -> dict[str, Any]:
    """The look of the bars of an implementation."""
    hatch, color = _HATCHES[number // len(COLORS) % len(_HATCHES)], COLORS[number % len(COLORS)]
    return {"facecolor": color, "hatch": hatch, "edgecolor": "white", "linewidth": 0.3}


def place(number: int, count: int, group: int) -> float:
    """Where the bar of one of so many implementations stands, in a group of a width of 1."""
    return group + (number - (count - 1) / 2) / (count + 1)


def logarithmic(ax: Axes, groups: Sequence[str], text: Callable[[float], str]) -> None:
    """A logarithmic axis of heights, whose numbers are written by a function, over named groups of bars."""
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xticks(range(len(groups)), groups)
    ax.grid(True, axis="y")


def finish(figure: Figure, names: Sequence[str], title: str, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Names implementations below a picture, and says above it what it is of; writes it as PNG and SVG.

    The suffix of the path does not matter, and its folder need not be there.
    """
    handles = [Patch(label=name, **fill(number)) for number, name in enumerate(names)]
    fitting = max(1, int(figure.get_figwidth() / _NAME))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), fitting, 5))
    entitle(figure, title)
    stem = Path(path).with_suffix("")
    stem.parent.mkdir(parents=True, exist_ok=True)
    return save(figure, stem)
