"""Continues texts with a language model: `python -m train.complete RUN "def __init__(self"`."""

import dataclasses
import sys
from pathlib import Path

import tyro

from seqattn.decoding import Sample, Temperature, TopP
from train import objectives
from train.data.standard_input import lines_as_they_come, standard_input
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import exported
from train.inference.completer import Completer


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Continues texts, or each line of standard input, with the latest model of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder, or folder of an exported model."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to continue. Without any, reads all of standard input and continues each line."""
    length: int = 200
    """Maximum number of tokens to add."""
    temperature: float = 0.8
    """Sampling temperature: divides the logits. 0 always takes the most probable token."""
    top_p: float = 0.95
    """Nucleus sampling: sample from the fewest tokens whose probabilities sum to this. 1 for all tokens."""
    seed: int = 0
    """Random seed of the samples."""


def main(arguments: Arguments) -> None:
    """Prints each text with its continuation."""
    trained = exported.load_trained(arguments.run)
    exported.check_serves(trained, "complete", objectives.Continuation)
    exported.check_task(trained, arguments.experiment)
    sampling = Sample((Temperature(arguments.temperature), TopP(arguments.top_p)))
    completer = Completer(
        trained.model, trained.tokenizer, length=arguments.length, sampling=sampling, seed=arguments.seed
    )
    texts = arguments.text or _lines()
    for text, rest in zip(texts, completer(texts), strict=True):
        print(text + rest)


def _lines() -> list[str]:
    return [line for lines in lines_as_they_come(standard_input(), sys.maxsize) for line in lines]


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.complete")))
