"""Plots learning curves and attention of a run, or compares several: `python -m train.plot RUN [RUN ...]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from seqattn.models import Encoder
from train import objectives
from train.checkpoints import run
from train.checkpoints.run import Run
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import loading
from train.objectives.pictures import draw_heads, draw_texts
from train.reports.metrics import read_metrics
from train.reports.plots import compared_curves, learning_curves


def draw(trained: Run, texts: Sequence[str] = ()) -> list[Path]:
    """Draws the learning curves of a run, and the model's attention or outputs for some texts, into its folder.

    Args:
        trained: the run.
        texts: source texts; by default the first few examples of the test split.

    Returns:
        The paths of the pictures.

    Raises:
        ValueError: without texts, the data changed since training.
    """
    folder = trained.folder / "attention"
    paths = list(learning_curves(read_metrics(trained.folder / "metrics.jsonl"), trained.folder / "curves"))
    if not texts:
        objective = objectives.make(trained.experiment, trained.tokenizer, trained.labels)
        return paths + objective.draw(trained.model, trained.splits()["test"], folder)
    if isinstance(trained.model, Encoder):
        return paths + draw_heads(trained.model, trained.tokenizer, texts, folder)
    return paths + draw_texts(trained.model, trained.tokenizer, texts, folder)


def compare(folders: Sequence[Path], path_stem: Path) -> list[Path]:
    """Draws the learning curves of several runs in one picture.

    Args:
        folders: the run folders, at most eight.
        path_stem: the path of the picture without a suffix.

    Returns:
        The paths of the PNG and the SVG.

    Raises:
        ValueError: two folders have the same name, there are too many runs, or a run has no metrics.
    """
    rows = {}
    for folder in folders:
        if not (folder / "metrics.jsonl").is_file():
            raise ValueError(f"{folder} holds no metrics.jsonl; train: python -m train EXPERIMENT --run {folder}")
        rows[folder.name] = read_metrics(folder / "metrics.jsonl")
    if len(rows) < len(folders):
        raise ValueError(f"the folders of two runs have the same name: {', '.join(map(str, folders))}")
    return list(compared_curves(rows, path_stem))


@dataclass(frozen=True)
class Arguments(OwnCode):
    """Draws learning curves and attention maps of a run into its folder, or compares the curves of several runs."""

    run: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders. With several, their learning curves go into one plot."""
    text: tuple[str, ...] = ()
    """Texts for the attention maps of a single run. By default the first few examples of the test split."""
    to: Path = Path("compared")
    """Path of the plot that compares several runs; written as PNG and SVG."""


def main(arguments: Arguments) -> None:
    """Prints the path of each picture."""
    if not arguments.run:
        raise ValueError("give at least one run folder")
    if len(arguments.run) > 1:
        if arguments.text:
            raise ValueError(f"--text needs exactly one run, got {len(arguments.run)}")
        stem = arguments.to.with_suffix("") if arguments.to.suffix in (".png", ".svg") else arguments.to
        paths = compare(arguments.run, stem)
    else:
        trained = run.load(arguments.run[0])
        loading.check_task(trained, arguments.experiment)
        paths = draw(trained, arguments.text)
    for path in paths:
        print(path)


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.plot")))
