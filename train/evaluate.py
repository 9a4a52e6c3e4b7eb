"""Evaluates a model on a split of its data: `python -m train.evaluate RUN --split test`."""

import dataclasses
from pathlib import Path
from typing import Literal

import tyro

from seqattn.checks import check_integer
from train import objectives
from train.checkpoints import run
from train.devices import environment
from train.experiments.catalogue import OwnCode, from_file
from train.hub import hf_folder, loading


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Evaluates the latest model of a run on one of its splits, as training does at its end."""

    run: tyro.conf.Positional[Path]
    """Run folder, or hf:FOLDER for a folder of Hugging Face transformers (hf:NAME for a model of the hub), which needs
    --experiment for the task."""
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
    trained = _loaded(arguments)
    split = trained.splits()[arguments.split]
    if arguments.examples is not None:
        check_integer("--examples", arguments.examples, 1)
        split = split.select(range(min(len(split), arguments.examples)))
    beam_size = arguments.beam_size
    if beam_size is None:
        beam_size = run.judged_by(trained.folder, trained.step)[1]
    objective = objectives.make(trained.experiment, trained.tokenizer, trained.labels, beam_size=beam_size)
    scores = objective.evaluate(trained.model, split)
    how = "" if trained.average == 1 else f", the mean of {trained.average} checkpoints"
    how += "" if beam_size == 1 else f", by a beam of {beam_size}"
    print(f"{arguments.split} split of {arguments.run}: {len(split)} examples, after {trained.step} updates{how}")
    for name, value in scores.numbers.items():
        print(f"{name}: {value:.4f}")
    for name, signature in scores.signatures.items():
        print(f"sacrebleu of {name}: {signature}")


def _loaded(arguments: Arguments) -> run.Run:
    """The run; for a folder of transformers, its model as that of a run of the experiment."""
    if not hf_folder.is_hf(arguments.run):
        return run.load(arguments.run, average=arguments.average)
    if arguments.experiment is None:
        raise ValueError(f"{arguments.run} has no task: give the file of an experiment with one, --experiment FILE")
    theirs = loading.load_trained(arguments.run, average=arguments.average)
    experiment = dataclasses.replace(from_file(arguments.experiment), model=theirs.model.config)
    digest = run.fingerprint(experiment.task.load())
    return run.Run(theirs.folder, experiment, theirs.tokenizer, theirs.labels, 0, theirs.model, digest)


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.evaluate")))
