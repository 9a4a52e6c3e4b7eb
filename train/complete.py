"""Continues texts with a language model: `python -m train.complete RUN "def __init__(self"`."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tyro

from seqattn.decoding import LogitsProcessor, Sample, Temperature, TopK, TopP
from train import objectives
from train.data.standard_input import lines_as_they_come, standard_input
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import loading
from train.hub.exported import Exported
from train.inference.completer import Completer
from train.inference.decoding import Decoding
from train.inference.weights import Weights, with_weights

_OURS = {"temperature": 0.8, "top_p": 0.95}


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Continues texts, or each line of standard input, with the latest model of a run."""

    run: tyro.conf.Positional[Path]
    """Run folder, folder of an exported model, or hf:FOLDER for a folder of Hugging Face transformers (hf:NAME for a
    model of the hub)."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to continue. Without any, reads all of standard input and continues each line."""
    length: int = 200
    """Maximum number of tokens to add."""
    temperature: float | None = None
    """Sampling temperature: divides the logits. 0 always takes the most probable token. By default 0.8, or that of the
    model's generation_config.json."""
    top_k: int | None = None
    """Sample from the k most probable tokens. By default from all, or as in generation_config.json."""
    top_p: float | None = None
    """Nucleus sampling: sample from the fewest tokens whose probabilities sum to this. 1 for all tokens. By default
    0.95, or that of generation_config.json."""
    weights: Weights = Weights.TRAINED
    """Numbers of the model: as trained, in bfloat16, or in int8 with less memory and small errors."""
    seed: int = 0
    """Random seed of the samples."""


def main(arguments: Arguments) -> None:
    """Prints each text with its continuation."""
    trained = loading.load_trained(arguments.run)
    loading.check_serves(trained, "complete", objectives.Continuation)
    loading.check_task(trained, arguments.experiment)
    sampling = _sampling(arguments, trained.decoding if isinstance(trained, Exported) else Decoding())
    completer = Completer(
        *(with_weights(trained.model, arguments.weights), trained.tokenizer),
        length=arguments.length,
        sampling=sampling,
        seed=arguments.seed,
    )
    texts = arguments.text or _lines()
    for text, rest in zip(texts, completer(texts), strict=True):
        print(text + rest)


def _sampling(arguments: Arguments, defaults: Decoding) -> Sample:
    """The choice of tokens: what the arguments say, then what the model says, then our own values."""
    values = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    filled = {name: getattr(defaults, name) if value is None else value for name, value in values.items()}
    # The model's values belong together: where it has any, ours fill none in.
    if all(getattr(defaults, name) is None for name in filled):
        filled |= {name: value for name, value in _OURS.items() if filled[name] is None}
    made: dict[str, Callable[[Any], LogitsProcessor]] = {"temperature": Temperature, "top_k": TopK, "top_p": TopP}
    return Sample(tuple(made[name](value) for name, value in filled.items() if value is not None))


def _lines() -> list[str]:
    return [line for lines in lines_as_they_come(standard_input(), sys.maxsize) for line in lines]


if __name__ == "__main__":
    environment.command(
        lambda: main(tyro.cli(Arguments, prog="python -m train.complete", config=(tyro.conf.EnumChoicesFromValues,)))
    )
