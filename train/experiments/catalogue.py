"""Experiments by name, from the other files of this folder, or from any file: each defines one experiment.

`train.config`, and JAX with it, is imported only once an experiment is wanted: to list them takes no time.
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
    """The names of all experiments of this project, in order.

    >>> "dates" in names()
    True
    """
    return sorted(file.stem for file in _FOLDER.glob("*.py") if file.stem not in ("__init__", "catalogue"))


def sentences() -> dict[str, str]:
    """The first sentence about each experiment, by its name; the files are read, not run.

    >>> sentences()["reverse"]
    'Random strings to their reverse, by a small Transformer with rotary positions.'
    """
    return {name: first_sentence(ast.get_docstring(_parsed(_FOLDER / f"{name}.py")) or "") for name in names()}


def named(name: str) -> "Experiment":
    """The experiment of a name.

    Raises:
        ValueError: there is none, or its file does not define exactly one.

    >>> named("dates").steps
    1500
    """
    if name not in names():
        raise ValueError(f"there is no experiment {name!r}; --list names them all")
    return _the_only_one(importlib.import_module(f"train.experiments.{name}"), _FOLDER / f"{name}.py")


def from_file(path: Path) -> "Experiment":
    """The experiment that a file of Python defines; the file is run, and may import from other files of its folder.

    Args:
        path: the file. It binds exactly one upper-case name to an `Experiment`; names that it imports do not count.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file defines no experiment or several ones, or it fails or ends the process; the message has the
            line and the error.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}, and an experiment is a name (see --list) or a file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # behind all others: no file there hides a library
    name = str(path.resolve())
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up their module there
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a process that ends here would seem to have trained
        raise ValueError(f"{path}:{_line(error, path)}: {type(error).__name__}: {error}") from error
    return _the_only_one(module, path)


@dataclass(frozen=True, kw_only=True)
class OwnCode:
    """The part of a command's arguments by which runs of an experiment in a file are known."""

    experiment: Path | None = None
    """File of the run's experiment, which is run; needed only where its task is not one of train/tasks/. The task's
    examples must be those of the training."""

    def __post_init__(self) -> None:
        if self.experiment is not None:
            from_file(self.experiment)


def first_sentence(docstring: str) -> str:
    """The first sentence of the first paragraph, on one line.

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
        raise ValueError(f"{file} must bind exactly one upper-case name to an Experiment, and {found}")
    experiment: Experiment = getattr(module, bound[0])
    return experiment


def _bound(tree: ast.Module) -> list[str]:
    """The upper-case names that the statements of a file bind, other than by an import."""
    targets: list[ast.expr] = []
    for node in tree.body:
        targets += node.targets if isinstance(node, ast.Assign) else []
        targets += [node.target] if isinstance(node, ast.AnnAssign) else []
    names = [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in dict.fromkeys(names) if name.isupper()]


def _parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_bytes())


def _line(error: BaseException, file: Path) -> int:
    """The line of a file where an error came from, or passed through."""
    here = file.resolve()
    if isinstance(error, SyntaxError) and error.filename is not None and Path(error.filename).resolve() == here:
        return error.lineno or 1
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno or 1 for frame in frames if Path(frame.filename).resolve() == here), 1)
