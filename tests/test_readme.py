"""The README keeps its word: one page, examples that run, commands that exist, figures of the documentation."""

import re
import subprocess
import sys

import pytest

from tests.pages import ROOT, blocks, dead_links, numbers, tables, train_commands
from train.__main__ import parse

README = ROOT / "README.md"
TEXT = README.read_text("utf-8") if README.exists() else ""
MOST_LINES = 180
MAKE = {"make train": "-m train dates", "make test": "-m pytest"}


def test_it_is_one_page():
    assert 0 < len(TEXT.splitlines()) <= MOST_LINES


def test_it_shows_two_examples():
    assert len(blocks(TEXT, "python")) == 2


@pytest.mark.parametrize(
    ("line", "source"), [pytest.param(*block, id=f"line {block[0]}") for block in blocks(TEXT, "python")]
)
def test_python_runs(line, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + source, str(README), "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(("command", "runs"), MAKE.items())
def test_both_commands_run_what_the_readme_says(command, runs):
    """Shown, not run: `make test` is running now, and `make train` takes minutes."""
    assert any(line.startswith(command) for _, text in blocks(TEXT, "sh") for line in text.splitlines())
    # A goal of an outer `make` must not reach the inner one.
    shown = subprocess.run(
        ["env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", *command.split(), "--dry-run", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert runs in shown.stdout


@pytest.mark.parametrize("arguments", train_commands(TEXT), ids=" ".join)
def test_every_training_command_is_understood(arguments):
    assert parse(arguments).run


def test_links_lead_somewhere():
    assert not dead_links(TEXT, ROOT)


def test_figures_are_those_of_the_documentation():
    pages = "".join((ROOT / "docs" / f"{name}.md").read_text("utf-8") for name in ("results", "benchmarks"))
    (rows,) = tables(TEXT)
    shown = {number for row in rows for cell in list(row.values())[1:] for number in numbers(cell)}
    assert len(shown) > 5
    assert shown <= set(numbers(pages)), shown - set(numbers(pages))


def test_no_figure_is_left_open():
    prose = re.sub(r"```.*?```|`[^`]*`", "", TEXT, flags=re.DOTALL)
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b|^[A-Z]{4,}$", prose, re.MULTILINE)
