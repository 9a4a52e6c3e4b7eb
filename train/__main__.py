"""`python -m train EXPERIMENT [--overrides]` trains, or resumes, an experiment: a name or a file; --list names them."""

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from train.devices import environment
from train.experiments import catalogue

if TYPE_CHECKING:
    from train.config import Experiment

_FLAGS = (
    tyro.conf.ConsolidateSubcommandArgs,
    tyro.conf.CascadeSubcommandArgs,
    tyro.conf.EnumChoicesFromValues,
    # A nested `--no-...` is refused where the subcommand of its default is not written out.
    tyro.conf.FlagConversionOff,
)


def parse(arguments: Sequence[str] | None = None) -> "Experiment":
    """The experiment that a command line names, with its overrides; that of this process by default."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and _is_path(arguments[0]):
        return _from_file(Path(arguments[0]), arguments[1:])
    defaults = {name: catalogue.named(name) for name in catalogue.names()}
    kinds = tyro.extras.subcommand_type_from_defaults(defaults, catalogue.sentences())
    about = "Trains, or resumes, one of the experiments, or that of a FILE.py; --list names them, a line each."
    return tyro.cli(kinds, prog="python -m train", description=about, config=_FLAGS, args=arguments)


def _is_path(argument: str) -> bool:
    return not argument.startswith("-") and (
        argument.endswith(".py") or any(mark and mark in argument for mark in (os.sep, os.altsep))
    )


def _from_file(file: Path, overrides: Sequence[str]) -> "Experiment":
    from train.config import Experiment

    experiment = catalogue.from_file(file)
    about = catalogue.first_sentence(sys.modules[str(file.resolve())].__doc__ or "")
    with warnings.catch_warnings():
        # A task of the file is none of those that the annotation of the field names: it becomes a choice more.
        warnings.filterwarnings("ignore", ".*does not match any type in Union")
        prog = f"python -m train {file}"
        return tyro.cli(Experiment, prog=prog, description=about, default=experiment, config=_FLAGS, args=overrides)


def main() -> int:
    """Reads the command line and trains; returns the exit code."""
    if sys.argv[1:] == ["--list"]:
        listed = catalogue.sentences()
        width = max(map(len, listed))
        print("\n".join(f"{name:{width}}  {sentence}" for name, sentence in listed.items()))
        return 0
    from train.engine import loop  # slow to import: a signal meanwhile must find `environment.command` at work

    return loop.train(parse())


if __name__ == "__main__":
    environment.command(main)
