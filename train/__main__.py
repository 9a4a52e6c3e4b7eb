"""`python -m train EXPERIMENT [--overrides]`: trains, or resumes, one of the experiments."""

import sys

import tyro

from train import environment


def main() -> int:
    """Reads the command line and trains; returns the exit code."""
    from train import experiments, loop  # slow to import: a signal meanwhile must find `environment.command` at work

    defaults = {name.lower(): getattr(experiments, name) for name in experiments.__all__}
    modules = {name: sys.modules[f"{experiments.__name__}.{name}"] for name in defaults}
    descriptions = {name: (module.__doc__ or "").split("\n\n")[0] for name, module in modules.items()}
    kinds = tyro.extras.subcommand_type_from_defaults(defaults, descriptions)
    flags = (tyro.conf.ConsolidateSubcommandArgs, tyro.conf.CascadeSubcommandArgs, tyro.conf.EnumChoicesFromValues)
    return loop.train(tyro.cli(kinds, prog="python -m train", config=flags))


if __name__ == "__main__":
    environment.command(main)
