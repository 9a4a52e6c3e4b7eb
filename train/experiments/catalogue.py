"""Finds experiments by name in this folder, or in any Python file; each file defines one experiment.

`train.config`, which imports JAX, is imported only when an experiment is loaded, so that listing them is fast.
"""

import ast
import importlib
import importlib.util
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config import Experiment

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Returns the names of all experiments in this folder, sorted.

    >>> "dates" in names()
    True
    """
    return sorted(file.stem for file in _FOLDER.glob("*.py") if file.stem not in ("__init__", "catalogue"))


def sentences() -> dict[str, str]:
    """Returns the first sentence of the docstring of each experiment, by name, without importing the files.

    >>> sentences()["reverse"]
    'Random strings to their reverse, by a small Transformer with rotary positions.'
    """
    return {name: first_sentence(ast.get_docstring(_parsed(_FOLDER / f"{name}.py")) or "") for name in names()}


def named(name: str) -> "Experiment":
    """Returns the experiment with a name.

    Raises:
        ValueError: the name is unknown, or its file does not define exactly one experiment.

    >>> named("dates").steps
    1500
    """
    if name not in names():
        raise ValueError(f"there is no experiment {name!r}; --list shows all names")
    return _the_only_one(importlib.import_module(f"train.experiments.{name}"), _FOLDER / f"{name}.py")


def from_file(path: Path) -> "Experiment":
    """Runs a Python file and returns the experiment that it defines. The file may import other files of its folder.

    Args:
        path: the file. It must bind exactly one upper-case name to an `Experiment`; imported names do not count.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file does not define exactly one experiment, raises an error or exits; the message has the line
            and the error.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give the name of an experiment (see --list) or a file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # at the end, so that no file of the folder hides a library
    name = str(path.resolve())
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # `dataclasses` looks up the module of a class there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # an exit here would look like a finished training
        raise ValueError(f"{path}:{_line(error, path)}: {type(error).__name__}: {error}") from error
    return _the_only_one(module, path)


@dataclass(frozen=True, kw_only=True)
class OwnCode:
    """Arguments of commands that load a run whose experiment is defined in your own file."""

    experiment: Path | None = None
    """Python file of the run's experiment, which is executed. Needed only if its task is not one of train/tasks/. The
    task must give the same examples as in training."""

    def __post_init__(self) -> None:
        if self.experiment is not None:
            from_file(self.experiment)


def first_sentence(docstring: str) -> str:
    """Returns the first sentence of the first paragraph on one line.

    >>> first_sentence("One, at 2.5 (e.g.\\nthis). Two.")
    'One, at 2.5 (e.g. this).'
    """
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) (?=[A-Z`])", paragraph)[0]


def _the_only_one(module: ModuleType, file: Path) -> "Experiment":
    from train.config import Experiment

    bound = [name for name in _bound(_parsed(file)) if isinstance(getattr(module, name, None), Experiment)]
    if len(bound) != 1:
        found = f"it defines {', '.join(bound)}" if bound else "it defines none"
        raise ValueError(f"{file} must bind exactly one upper-case name to an Experiment, but {found}")
    experiment: Experiment = getattr(module, bound[0])
    return experiment


def _bound(tree: ast.Module) -> list[str]:
    """Returns the upper-case names that the statements of a file bind, without imported names."""
    targets: list[ast.expr] = []
    for node in tree.body:
        targets += node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in dict.fromkeys(names) if name.isupper()]


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _line(error: BaseException, file: Path) -> int:
    """Returns the line of the file where an error was raised or passed through; 1 if it is not known."""
    here = file.resolve()
    if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename).resolve() == here:
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 1 for frame in frames if Path(frame.filename).resolve() == here), 1)
