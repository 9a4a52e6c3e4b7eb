"""Evaluates a model on a split of its data: `python -m train.evaluate RUN --split test`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from seqattn.checks import check_integer
from train import objectives
from train.checkpoints import run
from train.devices import environment
from train.experiments.catalogue import OwnCode


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Evaluates the latest model of a run on one of its splits, as training does at its end."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    split: Literal["train", "validation", "test"] = "test"
    """Split to evaluate on."""
    examples: int | None = None
    """Maximum number of examples, from the start of the split. All by default."""
    average: int | None = None
    """Average the parameters of this many latest checkpoints (Vaswani 2017, section 6.1). By default as many as for
    the results of the run."""
    beam_size: int | None = None
    """Number of beam-search hypotheses per text; 1 is greedy decoding. By default as for the results of the run."""


def main(arguments: Arguments) -> None:
    """Prints the scores, one per line."""
    if arguments.beam_size is not None:
        check_integer("--beam-size", arguments.beam_size, 1)
    trained = run.load(arguments.run, average=arguments.average)
    split = trained.splits()[arguments.split]
    if arguments.examples is not None:
        check_integer("--examples", arguments.examples, 1)
        split = split.select(range(min(len(split), arguments.examples)))
    beam_size = arguments.beam_size
    if beam_size is None:
        beam_size = run.judged_by(arguments.run, trained.step)[1]
    objective = objectives.make(trained.experiment, trained.tokenizer, trained.labels, beam_size=beam_size)
    scores = objective.evaluate(trained.model, split)
    how = "" if trained.average == 1 else f", the mean of {trained.average} checkpoints"
    how += "" if beam_size == 1 else f", by a beam of {beam_size}"
    print(f"{arguments.split} split of {arguments.run}: {len(split)} examples, after {trained.step} updates{how}")
    for name, value in scores.numbers.items():
        print(f"{name}: {value:.4f}")
    for name, signature in scores.signatures.items():
        print(f"sacrebleu of {name}: {signature}")


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.evaluate")))
