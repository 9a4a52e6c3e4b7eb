"""`python -m train EXPERIMENT [--overrides]`: trains, or resumes, one of the experiments."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import tyro

from train import environment

if TYPE_CHECKING:
    from train.config import Experiment


def parse(arguments: Sequence[str] | None = None) -> "Experiment":
    """The experiment that a command line names, with its overrides; that of this process by default."""
    from train import experiments

    defaults = {name.lower(): getattr(experiments, name) for name in experiments.__all__}
    modules = {name: sys.modules[f"{experiments.__name__}.{name}"] for name in defaults}
    descriptions = {name: (module.__doc__ or "").split("\n\n")[0] for name, module in modules.items()}
    kinds = tyro.extras.subcommand_type_from_defaults(defaults, descriptions)
    flags = (tyro.conf.ConsolidateSubcommandArgs, tyro.conf.CascadeSubcommandArgs, tyro.conf.EnumChoicesFromValues)
    return tyro.cli(kinds, prog="python -m train", config=flags, args=arguments)


def main() -> int:
    """Reads the command line and trains; returns the exit code."""
    from train import loop  # slow to import: a signal meanwhile must find `environment.command` at work

    return loop.train(parse())


if __name__ == "__main__":
    environment.command(main)
