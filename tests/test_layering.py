"""The architecture, as rules over the source text. Each rule is a pure function and is shown to catch offenders.

A module is named as Python names it, with `.__init__` for the index of a package: "seqattn.nn.__init__".
"""

import ast
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a layer imports only from rows above its own, or, if it is a folder, from itself.
ROWS = (
    "seqattn.platforms seqattn.precision seqattn.pytrees seqattn.checks seqattn.sizes",
    "seqattn.coordinates seqattn.dropout seqattn.positions seqattn.scores seqattn.losses seqattn.top_k "
    "seqattn.hypotheses",
    "seqattn.mask seqattn.score_mod",
    "seqattn.masks",
    "seqattn.score_mods",
    "seqattn.kernels",
    "seqattn.attention seqattn.block_mask seqattn.ring_attention",
    "seqattn.drop_in",
    "seqattn.nn seqattn.decoding",
    "seqattn.models",
    "seqattn.interop",
    "seqattn.__init__",
    "train",
    "benchmarks.bench",
    "benchmarks.attention benchmarks.decoding benchmarks.training benchmarks.__init__",
    "benchmarks.compile",
)
RANK = {layer: rank for rank, row in enumerate(ROWS) for layer in row.split()}

# The library takes arrays and gives arrays. Of the standard library it gets what touches no file, clock or environment.
LIBRARY_MAY_IMPORT = frozenset(
    "seqattn jax flax numpy jaxtyping abc collections contextlib dataclasses enum fnmatch functools importlib inspect "
    "itertools math numbers operator string textwrap tokamax types typing".split()
)
LIBRARY_MAY_NOT_CALL = frozenset("open print input breakpoint exec eval __import__".split())
FORBIDDEN_PACKAGES = frozenset("chex clu hydra ml_collections pickle tensorflow".split())
NAMES_WITHOUT_MEANING = frozenset("common commons helper helpers misc util utils".split())
CODE = ("seqattn", "train", "benchmarks")
MOST_LINES, MEDIAN_LINES = 450, 130


def sources(folders: Iterable[str] = CODE) -> dict[str, str]:
    """Module name to source text, for everything under these folders."""
    paths = [path for top in folders for path in sorted((ROOT / top).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text("utf-8") for path in paths}


def layer(name: str) -> str:
    """The layer that a module, or a name inside one, belongs to; what a package itself offers belongs to its index."""
    top, *inside = name.split(".")
    if top not in ("seqattn", "benchmarks"):
        return top
    found = ".".join([top, *inside[:1]])
    return found if found in RANK else f"{top}.__init__"


def imported_names(module: str, source: str) -> Iterator[tuple[int, str]]:
    """Each import as (line, full dotted name): `from a.b import c` gives "a.b.c"; relative imports are resolved."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = module.split(".")[: -node.level] if node.level else []
            package = ".".join(start + ([node.module] if node.module else []))
            yield from ((node.lineno, f"{package}.{alias.name}") for alias in node.names)


def out_of_order(module: str, source: str) -> Iterator[str]:
    mine = layer(module)
    if module != mine and not module.startswith(f"{mine}."):
        yield f"{module}: it has no row in tests/test_layering.py"
    for line, name in imported_names(module, source):
        theirs = layer(name)
        same_folder = mine == theirs and module != mine
        if theirs in RANK and RANK[theirs] >= RANK[mine] and not same_folder:
            yield f"{module}:{line}: {mine} may not import {name}, which is not above it"
        if theirs == "tests":
            yield f"{module}:{line}: only tests import {name}"


def impure(module: str, source: str) -> Iterator[str]:
    if not module.startswith("seqattn."):
        return
    for line, name in imported_names(module, source):
        if name.split(".")[0] not in LIBRARY_MAY_IMPORT:
            yield f"{module}:{line}: the library may not import {name}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("jax.debug.") in LIBRARY_MAY_NOT_CALL:
            yield f"{module}:{node.lineno}: the library may not call {ast.unparse(node.func)}"


def forbidden(module: str, source: str) -> Iterator[str]:
    for line, name in imported_names(module, source):
        if name.split(".")[0] in FORBIDDEN_PACKAGES:
            yield f"{module}:{line}: {name} is not used in this project"


def code_in_index(module: str, source: str) -> Iterator[str]:
    if not module.endswith(".__init__"):
        return
    for node in ast.parse(source).body:
        docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        names = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        if not (docstring or names or isinstance(node, ast.Import | ast.ImportFrom)):
            yield f"{module}:{node.lineno}: an __init__.py holds imports and __all__ only"


def meaningless(module: str, source: str) -> Iterator[str]:
    if NAMES_WITHOUT_MEANING.intersection(module.split(".")):
        yield f"{module}: a file is named after what it holds"


def too_long(module: str, source: str) -> Iterator[str]:
    if (lines := _lines(source)) > MOST_LINES:
        yield f"{module}: it has {lines} lines, and a file has at most {MOST_LINES}"


def _lines(source: str) -> int:
    return len(source.split("\n")) - source.endswith("\n")


def long_at_the_median(modules: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with all files together: half of them fit on a few screens."""
    if (median := statistics.median(map(_lines, modules.values()))) >= MEDIAN_LINES:
        yield f"files have {median:g} lines at the median, which must be below {MEDIAN_LINES}"


def resolve(name: str, modules: Mapping[str, str]) -> str | None:
    """The module that holds a dotted name, if it is one of these; a package stands for its index."""
    while name:
        for candidate in (name, f"{name}.__init__"):
            if candidate in modules:
                return candidate
        name = name.rpartition(".")[0]
    return None


def cycle(modules: Mapping[str, str]) -> list[str]:
    """The modules of one import cycle in order, or an empty list."""
    graph = {
        module: sorted(filter(None, {resolve(name, modules) for _, name in imported_names(module, source)}))
        for module, source in modules.items()
    }
    done: set[str] = set()

    def search(module: str, path: tuple[str, ...]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        done.add(module)
        return next(filter(None, (search(target, (*path, module)) for target in graph[module])), [])

    return next(filter(None, (search(module, ()) for module in graph)), [])


@pytest.mark.parametrize("rule", [out_of_order, impure, forbidden, code_in_index, meaningless])
def test_every_file_keeps(rule):
    broken = [message for module, source in sources().items() for message in rule(module, source)]
    assert not broken, "\n".join(broken)


def test_no_file_is_too_long():
    modules = sources((*CODE, "tests"))
    assert "tests.test_layering" in modules
    broken = [message for module, source in modules.items() for message in too_long(module, source)]
    assert not broken, "\n".join(broken)


def test_files_of_the_library_and_of_training_are_short_at_the_median():
    assert not list(long_at_the_median(sources(("seqattn", "train"))))


def test_no_import_cycle():
    found = cycle(sources())
    assert not found, " -> ".join(found)


def test_the_top_floor_of_benchmarks_has_at_most_8_rooms():
    rooms = [path.name for path in (ROOT / "benchmarks").iterdir() if path.name != "__pycache__"]
    assert len(rooms) <= 8, rooms


def test_every_library_test_has_its_source():
    tests = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests" / "seqattn").rglob("test_*.py")]
    orphans = [path for path in tests if not any(source.is_file() for source in _sources_of(path))]
    assert not orphans, f"tests/ mirrors the sources; these mirror nothing: {', '.join(map(str, orphans))}"


def _sources_of(test: Path) -> list[Path]:
    """The source that a test mirrors, or what it shares with other tests: tests/contract.py for several kernels.

    A source may have several tests: test_attention.py and test_attention_weights.py are both about attention.py.
    """
    words = test.stem.removeprefix("test_").split("_")
    names = ["_".join(words[:count]) + ".py" for count in range(1, len(words) + 1)]
    return [folder / name for name in names for folder in (ROOT / test.parent, ROOT / "tests")]


OFFENDERS = {
    "an import from a row below": (out_of_order, "seqattn.masks", "from seqattn.kernels import reference"),
    "an import from the same row": (out_of_order, "seqattn.scores", "import seqattn.losses"),
    "a layer that decodes": (out_of_order, "seqattn.nn.mixture", "from seqattn.decoding import beam_search"),
    "decoding that knows a layer": (out_of_order, "seqattn.decoding.beam", "from seqattn.nn import KeyValue"),
    "a relative import from a row below": (out_of_order, "seqattn.kernels.reference", "from ..nn import key_value"),
    "an import inside a function": (out_of_order, "seqattn.masks", "def f():\n    import seqattn.attention"),
    "the library's own index": (out_of_order, "seqattn.nn.key_value", "from seqattn import attend"),
    "the training program": (out_of_order, "seqattn.attention", "from train import log"),
    "a program that knows the tests": (out_of_order, "train.reports.metrics", "from tests.oracle import attend"),
    "training that knows benchmarks": (out_of_order, "train.reports.metrics", "import benchmarks"),
    "a benchmark that knows another one": (out_of_order, "benchmarks.training.case", "import benchmarks.decoding.case"),
    "what benchmarks share that knows one": (
        out_of_order,
        "benchmarks.bench.table",
        "from benchmarks import attention",
    ),
    "a file without a row": (out_of_order, "seqattn.novelty", ""),
    "a third-party package": (impure, "seqattn.nn.key_value", "import optax"),
    "the operating system": (impure, "seqattn.masks", "from os import environ"),
    "a clock": (impure, "seqattn.masks", "import time"),
    "an opened file": (impure, "seqattn.masks", "open('x')"),
    "a printed line": (impure, "seqattn.masks", "def f(x):\n    print(x)"),
    "a line printed by the device": (impure, "seqattn.masks", "jax.debug.print('{}', x)"),
    "a forbidden package": (forbidden, "train.checkpoints.checkpoints", "import pickle"),
    "a part of a forbidden package": (forbidden, "train.config", "from ml_collections.config_dict import ConfigDict"),
    "code in an index": (code_in_index, "seqattn.nn.__init__", "def f(): ..."),
    "a value in an index": (code_in_index, "train.__init__", "x = __all__ = []"),
    "a file for anything": (meaningless, "train.tasks.utils", ""),
    "a long file": (too_long, "tests.train.test_config", "x = 1\n" * 451),
}


@pytest.mark.parametrize(("rule", "module", "source"), OFFENDERS.values(), ids=OFFENDERS)
def test_an_offender_is_caught(rule, module, source):
    assert list(rule(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("seqattn.nn.blocks", "import jax\nfrom seqattn.attention import attend\nfrom seqattn.nn import key_value"),
        ("seqattn.kernels.flash", "from seqattn import masks\nfrom . import reference"),
        ("seqattn.__init__", "from seqattn.models import Transformer"),
        ("train.engine.loop", "import optax\nfrom seqattn import attend\nfrom train.reports.progress import Progress"),
        ("benchmarks.training.case", "from benchmarks.bench import marian\nfrom train.engine import loop"),
    ],
)
def test_imports_from_above_and_beside_are_fine(module, source):
    assert not list(out_of_order(module, source))


def test_a_file_of_450_lines_is_not_too_long():
    assert not list(too_long("train.config", "x = 1\n" * 450))
    assert not list(too_long("train.config", "x = 1\n" * 449 + "x = 1"))


def test_long_files_are_caught_at_the_median():
    short, long = "x = 1\n" * 129, "x = 1\n" * 130
    assert not list(long_at_the_median({"train.a": short, "train.b": short, "train.c": long}))
    assert list(long_at_the_median({"train.a": short, "train.b": long, "train.c": long}))


def test_a_cycle_is_caught():
    modules = {"train.a": "from train import b", "train.b": "import train.c", "train.c": "from train.a import x"}
    assert cycle(modules) == ["train.a", "train.b", "train.c", "train.a"]
    assert not cycle(modules | {"train.c": ""})
    assert cycle({"seqattn.nn.__init__": "from seqattn.nn.a import x", "seqattn.nn.a": "from seqattn.nn import x"})
