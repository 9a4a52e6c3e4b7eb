"""Plots exact match against source length: `python -m train.by_length RUN [RUN ...] --plot FILE`."""

import dataclasses
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro

from train import objectives
from train.checkpoints import run
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import loading
from train.inference.translator import Translator
from train.reports.plots import line_chart


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Compares runs of one task by exact match on the test split, for each length of the source, in one plot."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; their runs must have the same test split."""
    plot: Path
    """Path of the plot; written as PNG and SVG."""


def by_length(folder: Path) -> dict[int, float]:
    """Computes exact match on the test split for each source length.

    Args:
        folder: the run folder.

    Returns:
        From the number of characters in the source to the share of exact outputs, 0 to 1, in ascending order.

    Raises:
        ValueError: the run has no sequence-to-sequence model, or its data changed.
        FileNotFoundError: the folder holds no checkpoint.
    """
    trained = run.load(folder)
    loading.check_serves(trained, "by_length", objectives.SequenceToSequence)
    split = trained.splits()["test"]
    outputs = Translator(trained.model, trained.tokenizer)(list(split["source"]))
    right: dict[int, list[bool]] = defaultdict(list)
    for source, target, output in zip(split["source"], split["target"], outputs, strict=True):
        right[len(source)].append(output == target)
    return {length: float(np.mean(right[length])) for length in sorted(right)}


def main(arguments: Arguments) -> None:
    """Prints a tab-separated row for each length, then the paths of the plot."""
    stem = arguments.plot.with_suffix("") if arguments.plot.suffix in (".png", ".svg") else arguments.plot
    names = [folder.name for folder in arguments.run]
    if len(set(names)) < len(names):
        raise ValueError(
            f"two runs of {', '.join(map(str, arguments.run))} have the same name, which must label their lines"
        )
    lines = {folder.name: by_length(folder) for folder in arguments.run}
    print("length", *lines, sep="\t")
    for length in sorted({length for line in lines.values() for length in line}):
        print(length, *(f"{line.get(length, float('nan')):.3f}" for line in lines.values()), sep="\t")
    percent = {name: {x: 100 * y for x, y in line.items()} for name, line in lines.items()}
    paths = line_chart(percent, stem, x="characters of the source", y="exact match (%)", limits=(0, 102))
    print(*paths)


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.by_length")))
