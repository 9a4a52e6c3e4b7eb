"""Trains or resumes an experiment: `python -m train EXPERIMENT [--overrides]`.

EXPERIMENT is a name or a file. `--list` shows the names.
"""

import argparse
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
    # tyro rejects a nested `--no-...` unless the subcommand of its default is given too, so flags take True or False.
    tyro.conf.FlagConversionOff,
)


def parse(arguments: Sequence[str] | None = None) -> "Experiment":
    """Parses a command line to an experiment with its overrides.

    Args:
        arguments: the words of the command line; by default those of this process.

    Raises:
        SystemExit: a flag is unknown or its value invalid, or the command line asks for help.
        ValueError: the file holds no experiment, or a setting is out of its range.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and _is_path(arguments[0]):
        return _from_file(Path(arguments[0]), arguments[1:])
    defaults = {name: catalogue.named(name) for name in catalogue.names()}
    if arguments and arguments[0] in defaults:
        defaults[arguments[0]] = _adopting(defaults[arguments[0]], arguments[1:])
    kinds = tyro.extras.subcommand_type_from_defaults(defaults, catalogue.sentences())
    about = "Trains or resumes an experiment, given by name or as FILE.py. --list shows the names, one per line."
    return tyro.cli(kinds, prog="python -m train", description=about, config=_FLAGS, args=arguments)


def _is_path(argument: str) -> bool:
    return not argument.startswith("-") and (
        argument.endswith(".py") or any(mark and mark in argument for mark in (os.sep, os.altsep))
    )


def _from_file(file: Path, overrides: Sequence[str]) -> "Experiment":
    from train.config import Experiment

    experiment = _adopting(catalogue.from_file(file), overrides)
    about = catalogue.first_sentence(sys.modules[str(file.resolve())].__doc__ or "")
    with warnings.catch_warnings():
        # A task defined in the file is not in the annotation of the field; tyro adds it as another choice.
        warnings.filterwarnings("ignore", ".*does not match any type in Union")
        prog = f"python -m train {file}"
        return tyro.cli(Experiment, prog=prog, description=about, default=experiment, config=_FLAGS, args=overrides)


def _adopting(experiment: "Experiment", overrides: Sequence[str]) -> "Experiment":
    """An experiment with the model of the folder that `--start-from` names, so that flags change that model."""
    # Before tyro parses: the model decides which flags there are, and their defaults.
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    given.add_argument("--start-from", "--start_from", type=Path)
    given.add_argument("--run", type=Path, default=experiment.run)
    try:
        found, _ = given.parse_known_args(overrides)
    except argparse.ArgumentError:
        return experiment  # tyro says what is wrong
    if found.start_from in (None, Path("None")):
        return experiment
    from train.hub.origin import adopt

    return adopt(experiment, found.start_from, found.run)


def main() -> int:
    """Parses the command line and trains; returns the exit code."""
    if sys.argv[1:] == ["--list"]:
        listed = catalogue.sentences()
        width = max(map(len, listed))
        print("\n".join(f"{name:{width}}  {sentence}" for name, sentence in listed.items()))
        return 0
    from train.engine import loop  # slow to import: `environment.command` must already handle signals meanwhile

    return loop.train(parse())


if __name__ == "__main__":
    environment.command(main)
