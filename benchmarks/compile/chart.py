"""Chart of compiled programs: temporaries of attention, and what an update sends and keeps."""

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.bench.chart import distinct, fill, finish, logarithmic, place
from benchmarks.bench.record import COMPILED, Line
from benchmarks.compile.table import size
from train.reports.style import STYLE

_POWERS = range(15, 40, 5)
"""Powers of two on the axis of bytes."""


def temporaries(lines: Sequence[Line], path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Draws bytes of temporaries on one device as bars: attention by mask and pass, a panel for each target of one.

    Args:
        lines: records; those of compiled attention are drawn.
        path: where to write the chart; the suffix is ignored.

    Returns:
        The paths of the PNG and the SVG file.

    Raises:
        ValueError: no attention was compiled.
    """
    drawn = [line for line in lines if line["status"] == COMPILED and line["program"].startswith("attention/")]
    if not drawn:
        raise ValueError(f"{path}: none of {len(lines)} rows is a compiled program of attention")
    names, targets = distinct(drawn, "implementation_of_attention"), distinct(drawn, "target")
    groups = distinct(drawn, "group")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2 + 0.85 * len(groups), 0.8 + 2.1 * len(targets)), layout="constrained")
        panels = figure.subplots(len(targets), 1, squeeze=False, sharey=True)
        for ax, target in zip(panels[:, 0], targets, strict=True):
            _draw(ax, [line for line in drawn if line["target"] == target], names, groups)
            ax.set_title(target)
        return finish(figure, names, "temporaries of attention on one device, {dtype}".format_map(drawn[0]), path)


def _draw(ax: Axes, lines: Sequence[Line], names: list[str], groups: list[str]) -> None:
    for line in lines:
        number = names.index(line["implementation_of_attention"])
        x = place(number, len(names), groups.index(line["group"]))
        ax.bar(x, max(line["temp_bytes"], 1024), 1 / (len(names) + 1), **fill(number))
    logarithmic(ax, groups, size)
    ax.set_yticks([2.0**power for power in _POWERS])
    ax.yaxis.set_minor_locator(NullLocator())
