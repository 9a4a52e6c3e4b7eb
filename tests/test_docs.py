"""The documentation keeps its word: examples run, links and commands work, figures are measured, no name is missing."""

import importlib
import json
import re
import shlex

import pytest

from benchmarks.training import long_sequences
from tests.pages import (
    EXPERIMENTS,
    ROOT,
    blocks,
    dead_links,
    docstring,
    measured,
    numbers,
    tables,
    train_commands,
    tree,
    unsaid,
    wrong_entries,
)
from train.__main__ import parse

DOCS = ROOT / "docs"
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text("utf-8") for path in sorted(DOCS.rglob("*.md"))}
PAGES = {name: text for name, text in PAGES.items() if not name.startswith(("_build/", "_generated/"))}
RESULTS, ARCHITECTURE = PAGES.get("results.md", ""), PAGES.get("architecture.md", "")
API = "\n".join(path.read_text("utf-8") for path in sorted((DOCS / "api").glob("*.rst")))
PACKAGES = ("seqattn", "seqattn.scores", "seqattn.nn", "seqattn.models", "seqattn.decoding", "seqattn.interop")

CODE = [
    pytest.param(name, line, source, id=f"{name} line {line}")
    for name, text in PAGES.items()
    for line, source in blocks(text, "python")
    if not name.startswith("examples/")  # notebooks, which `make docs` executes
]


@pytest.mark.parametrize(("name", "line", "source"), CODE)
def test_python_runs(name, line, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + source, str(DOCS / name), "exec"), {"__name__": "docs"})


COMMANDS = dict.fromkeys(tuple(arguments) for text in PAGES.values() for arguments in train_commands(text))


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_every_training_command_is_understood(arguments):
    if "--help" not in arguments:
        assert parse(arguments).run
        return
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 0


def _drawn_by_the_build(link: str) -> bool:
    return "_generated/" in link


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    dead = dead_links(PAGES[name], (DOCS / name).parent)
    assert not [link for link in dead if not _drawn_by_the_build(link)]


def test_every_page_is_in_a_table_of_contents():
    listed = set()
    for name, text in PAGES.items():
        for source in re.findall(r"^```\{toctree\}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            entries = [line.strip() for line in source.splitlines() if line.strip() and not line.startswith(":")]
            folder = name.rpartition("/")[0]
            listed |= {f"{folder}/{entry}".strip("/") for entry in entries}
    sources = {path.relative_to(DOCS).with_suffix("").as_posix() for path in (DOCS / "api").glob("*.rst")}
    assert listed | {"index"} == {name.removesuffix(".md") for name in PAGES} | sources


def test_the_map_is_the_tree():
    unmarked = (text for language in ("", "text") for _, text in blocks(ARCHITECTURE, language))
    maps = [text for text in unmarked if re.search(r"^seqattn/", text, re.MULTILINE)]
    assert len(maps) == 1, "docs/architecture.md must hold one map of the tree, a ``` block with a line for seqattn/"
    wrong = wrong_entries(maps[0], tree())
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_api_reference(package):
    shown: dict[str, list[str]] = {}
    module = ""
    for directive, name in re.findall(
        r"^\.\. (currentmodule|autofunction|autoclass|autodata):: (\S+)$", API, re.MULTILINE
    ):
        if directive == "currentmodule":
            module = name
        else:
            shown.setdefault(module, []).append(name)
    offered = importlib.import_module(package)
    public = {name for name in _public(offered) if type(getattr(offered, name)) is not type(importlib)}
    assert set(shown[package]) == public
    assert len(shown[package]) == len(public), "a name is listed twice"
    assert not [name for name in public if not getattr(offered, name).__doc__]


def _public(module: object) -> list[str]:
    names = getattr(module, "__all__", None)
    if names is not None:
        return names
    return [name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__]


def test_every_experiment_has_a_row():
    assert measured(RESULTS).keys() == set(EXPERIMENTS) - {"ablations"}  # it has a table of its own


@pytest.mark.parametrize("experiment", measured(RESULTS))
def test_rows_have_commands_that_are_understood_and_the_figures_of_their_file(experiment):
    rows = measured(RESULTS)[experiment]
    assert all(parse(shlex.split(command)).run for command, _ in rows)
    assert not unsaid([figures for _, figures in rows], docstring(experiment))


def test_choices_have_the_figures_of_ablations():
    (rows,) = [rows for rows in tables(RESULTS) if "choice" in rows[0]]
    said = set(re.findall(r"^ {4}\S.* (\d+\.\d) %  \d", docstring("ablations"), re.MULTILINE))
    shown = {numbers(part)[-1] for row in rows for part in row["exact match"].split(",")}
    assert len(said) > 20
    assert shown <= said, shown - said


def test_long_texts_have_the_figures_of_their_rows():
    (shown,) = [rows for rows in tables(RESULTS) if "16,000" in rows[0]]
    lines = (ROOT / "benchmarks" / "results" / "long-sequences.jsonl").read_text("utf-8").splitlines()
    rows = {(row["attention"], row["length"]): row for row in map(json.loads, lines)}
    for name, cells in zip(long_sequences.NAMES, shown, strict=True):
        for length, cell in zip((1_000, 4_000, 16_000), list(cells.values())[1:], strict=True):
            row = rows[name, length]
            milliseconds = f", {1e3 * row['median_seconds']:,.0f} ms" if row["status"] == "timed" else ": refused"
            assert cell == f"{row['planned_bytes'] / 2**20:,.0f} MiB{milliseconds}"
