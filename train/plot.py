"""The pictures of a run: `python -m train.plot RUN`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from seqattn.models import Encoder
from train import environment, objectives, run
from train.drawing import learning_curves
from train.log import read_metrics
from train.objectives.pictures import draw_heads, draw_texts
from train.run import Run


def draw(trained: Run, texts: Sequence[str] = ()) -> list[Path]:
    """Learning curves, and what the model does with each text: by default with the first few of the test split."""
    folder = trained.folder / "attention"
    paths = list(learning_curves(read_metrics(trained.folder / "metrics.jsonl"), trained.folder / "curves"))
    if not texts:
        objective = objectives.make(trained.experiment, trained.tokenizer, trained.labels)
        return paths + objective.draw(trained.model, trained.experiment.task.load()["test"], folder)
    if isinstance(trained.model, Encoder):
        return paths + draw_heads(trained.model, trained.tokenizer, texts, folder)
    return paths + draw_texts(trained.model, trained.tokenizer, texts, folder)


@dataclass(frozen=True)
class Arguments:
    """Draws learning curves and attention maps of a run into its folder."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to draw the attention of; without any, the first few of the test split."""


def main(arguments: Arguments) -> None:
    """Prints the path of each picture."""
    for path in draw(run.load(arguments.run), arguments.text):
        print(path)


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.plot")))
