"""What tests read from a page of Markdown: code, commands, the map of the tree, links and tables of figures."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from train.experiments import catalogue

ROOT = Path(__file__).parents[1]
EXPERIMENTS = catalogue.names()

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"""\]\(([^)\s]+)|\b(?:src|srcset|href)="([^"\s]+)""")
_TIME = re.compile(r"(?:\d+ h )?\d+ min \d+ s\b")
_ENTRY = re.compile(r"[\w.-]+(/|\.py|\.md|\.toml)|Makefile|LICENSE")


def blocks(text: str, language: str) -> list[tuple[int, str]]:
    """The fenced blocks of one language, as (line of its first line, source)."""
    found = ((text.count("\n", 0, match.start(2)) + 1, match) for match in _FENCE.finditer(text))
    return [(line, match[2]) for line, match in found if match[1] == language]


def entries(shown_tree: str) -> Iterator[PurePosixPath]:
    """The paths of a map: the words at the start of a line that look like paths; what is indented more lies inside."""
    folders: list[tuple[int, PurePosixPath]] = []
    for line in shown_tree.splitlines():
        indent = len(line) - len(line.lstrip(" │├└─"))
        folders = [(depth, path) for depth, path in folders if depth < indent]
        parent = folders[-1][1] if folders else PurePosixPath()
        for word in line[indent:].split():
            if not _ENTRY.fullmatch(word):
                break
            yield parent / word
            if word.endswith("/"):
                folders.append((indent, parent / word))


def wrong_entries(shown_tree: str, files: set[str]) -> list[str]:
    """What a map shows that is not there, and what it leaves out of a folder that it opens."""
    shown = set(entries(shown_tree))
    there = {PurePosixPath(file) for file in files}
    folders = {folder for path in there for folder in path.parents}
    due = {path for path in folders | there if path in folders or path.suffix == ".py"}
    opened = {path.parent for path in shown}
    left_out = {path for path in due - shown if path.parent in opened and path.name and not path.name.startswith("_")}
    gone = shown - there - folders
    return [f"{path} is not there" for path in sorted(gone)] + [f"{path} is not shown" for path in sorted(left_out)]


def dead_links(text: str, root: Path) -> list[str]:
    targets = [target for pair in _LINK.findall(text) for target in pair if target]
    local = [target.partition("#")[0] for target in targets if not re.match(r"[a-z]+:|#", target)]
    return [target for target in local if not (root / target).exists()]


def tree() -> set[str]:
    modules = (path for folder in ("seqattn", "train", "benchmarks", "tests") for path in (ROOT / folder).rglob("*.py"))
    beside = (path for folder in (ROOT, ROOT / "findings") for path in folder.iterdir() if path.is_file())
    scripts = (ROOT / "benchmarks").glob("*.sh")
    return {path.relative_to(ROOT).as_posix() for path in (*modules, *beside, *scripts)}


def train_commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m train EXPERIMENT ...` of the shell blocks."""
    lines = [line for _, source in blocks(text, "sh") for line in source.splitlines()]
    given = [shlex.split(line.partition(" -m train ")[2], comments=True) for line in lines if " -m train " in line]
    return [arguments for arguments in given if arguments != ["--list"]]


Row = dict[str, str]


def tables(text: str) -> Iterator[list[Row]]:
    """The rows of each table by the names of their columns, the first of which may be empty."""
    for match in re.finditer(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        header, _, *rows = (
            [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in match[0].splitlines()
        )
        yield [dict(zip(header, row, strict=True)) for row in rows]


def measured(text: str) -> dict[str, list[tuple[str, Row]]]:
    """By experiment, the command of each row of a table with times, and what the row has from its time on."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for row in (row for rows in tables(text) for row in rows if "time" in row):
        words = [match for cell in row.values() for match in re.findall(r"`([^`]+)`", cell)]
        commands = [word for word in words if word.split()[0] in EXPERIMENTS]
        assert commands, f"no experiment in {row}"
        columns = list(row)
        # A command before the last says of what the row is a variant.
        figures = {name: row[name] for name in columns[columns.index("time") :]}
        found.setdefault(commands[-1].split()[0], []).append((commands[-1], figures))
    return found


def unsaid(rows: list[Row], docstring: str) -> list[str]:
    """The times and numbers of the rows of an experiment that its docstring does not have in the same order.

    A docstring may have more of them, and more digits; its numbers are those of its results.
    """
    said, _, results = " ".join(docstring.split()).partition(" Result")
    times, found = iter(_TIME.findall(said)), iter(numbers(results))
    wrong = [row["time"] for row in rows if row["time"] not in times]
    for number in (number for row in rows for name, cell in row.items() if name != "time" for number in numbers(cell)):
        after = len(number.partition(".")[2])
        if not any(round(float(each), after) == float(number) for each in found):
            wrong.append(number)
    return wrong


def numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def docstring(experiment: str) -> str:
    return importlib.import_module(f"train.experiments.{experiment}").__doc__
