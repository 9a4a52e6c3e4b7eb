"""`python -m train EXPERIMENT [--overrides]`: trains, or resumes, one of the experiments; `--list` names them."""

import ast
import importlib.util
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from train import environment

if TYPE_CHECKING:
    from train.config import Experiment


def sentences() -> dict[str, str]:
    """The first sentence about each experiment, by its name; their files are read, not run, since JAX is slow to load.

    >>> "reverse" in sentences()
    True
    """
    spec = importlib.util.find_spec("train.experiments")
    assert spec is not None
    assert spec.origin is not None
    package = Path(spec.origin)
    (names,) = (
        ast.literal_eval(node.value)
        for node in _parsed(package).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    docstrings = {name.lower(): ast.get_docstring(_parsed(package.with_name(f"{name.lower()}.py"))) for name in names}
    return {name: _first_sentence(docstring or "") for name, docstring in docstrings.items()}


def parse(arguments: Sequence[str] | None = None) -> "Experiment":
    """The experiment that a command line names, with its overrides; that of this process by default."""
    from train import experiments

    defaults = {name.lower(): getattr(experiments, name) for name in experiments.__all__}
    kinds = tyro.extras.subcommand_type_from_defaults(defaults, sentences())
    flags = (
        tyro.conf.ConsolidateSubcommandArgs,
        tyro.conf.CascadeSubcommandArgs,
        tyro.conf.EnumChoicesFromValues,
        # A nested `--no-...` is refused where the subcommand of its default is not written out.
        tyro.conf.FlagConversionOff,
    )
    about = "Trains, or resumes, one of the experiments; --list names them, a line each."
    return tyro.cli(kinds, prog="python -m train", description=about, config=flags, args=arguments)


def main() -> int:
    """Reads the command line and trains; returns the exit code."""
    if sys.argv[1:] == ["--list"]:
        listed = sentences()
        width = max(map(len, listed))
        print("\n".join(f"{name:{width}}  {sentence}" for name, sentence in listed.items()))
        return 0
    from train.engine import loop  # slow to import: a signal meanwhile must find `environment.command` at work

    return loop.train(parse())


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text("utf-8"))


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


if __name__ == "__main__":
    environment.command(main)
