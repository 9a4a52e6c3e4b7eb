"""The README keeps its word: its Python runs, its map is the tree, its links lead somewhere."""

import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from benchmarks import long_sequences
from train.__main__ import parse
from train.experiments import catalogue

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text("utf-8") if README.exists() else ""
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
    return {path.relative_to(ROOT).as_posix() for path in (*modules, *beside)}


def test_there_is_python_to_run():
    assert blocks(TEXT, "python"), f"{README} must show the library at work in at least one ```python block"


@pytest.mark.parametrize(
    ("line", "source"), [pytest.param(*block, id=f"line {block[0]}") for block in blocks(TEXT, "python")]
)
def test_python_runs(line, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile("\n" * (line - 1) + source, str(README), "exec"), {"__name__": "readme"})


def test_the_map_is_the_tree():
    unmarked = (text for language in ("", "text") for _, text in blocks(TEXT, language))
    maps = [text for text in unmarked if re.search(r"^seqattn/", text, re.MULTILINE)]
    assert len(maps) == 1, f"{README} must hold one map of the tree, a ``` block with a line for seqattn/"
    wrong = wrong_entries(maps[0], tree())
    assert not wrong, "\n".join(wrong)


def test_links_lead_somewhere():
    assert not dead_links(TEXT, ROOT)


TREE = """
seqattn/          arrays in, arrays out
  masks.py        who may look: Mask.dense, a.py/b.py
  nn/             flax.nnx modules
    blocks.py  embedding.py   two files
  kernels/        not opened
train/            not opened either
README.md
"""
FILES = {"seqattn/__init__.py", "seqattn/masks.py", "seqattn/nn/blocks.py", "seqattn/nn/embedding.py"}
FILES |= {"seqattn/kernels/reference.py", "train/reports/metrics.py", "README.md"}


def test_a_true_map_is_accepted():
    drawn = (
        TREE.replace("\n  masks", "\n├── masks")
        .replace("\n  nn", "\n├── nn")
        .replace("\n    blocks", "\n│   └── blocks")
    )
    assert not wrong_entries(TREE, FILES)
    assert not wrong_entries(drawn.replace("\n  kernels", "\n└── kernels"), FILES)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (FILES | {"seqattn/nn/novelty.py"}, "seqattn/nn/novelty.py is not shown"),
        (FILES | {"seqattn/models/seq2seq.py"}, "seqattn/models is not shown"),
        (FILES | {"benchmarks/attention.py"}, "benchmarks is not shown"),
        (FILES - {"seqattn/masks.py"}, "seqattn/masks.py is not there"),
        (FILES - {"train/reports/metrics.py"}, "train is not there"),
        (FILES - {"README.md"}, "README.md is not there"),
    ],
)
def test_a_false_map_is_caught(files, message):
    assert wrong_entries(TREE, files) == [message]


def test_a_dead_link_is_caught(tmp_path):
    (tmp_path / "there.png").touch()
    text = '![a](there.png) [b](gone.md#part) <img src="lost.svg"> [c](https://jax.dev) [d](#part)'
    assert dead_links(text, tmp_path) == ["gone.md", "lost.svg"]


def train_commands(text: str) -> list[list[str]]:
    """The arguments of every `python -m train EXPERIMENT ...` of the shell blocks."""
    lines = [line for _, source in blocks(text, "sh") for line in source.splitlines()]
    given = [shlex.split(line.partition(" -m train ")[2], comments=True) for line in lines if " -m train " in line]
    return [arguments for arguments in given if arguments != ["--list"]]


@pytest.mark.parametrize("arguments", train_commands(TEXT), ids=" ".join)
def test_every_training_command_is_understood(arguments):
    if "--help" not in arguments:
        assert parse(arguments).run
        return
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 0


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
    times, numbers = iter(_TIME.findall(said)), iter(_numbers(results))
    wrong = [row["time"] for row in rows if row["time"] not in times]
    for number in (number for row in rows for name, cell in row.items() if name != "time" for number in _numbers(cell)):
        after = len(number.partition(".")[2])
        if not any(round(float(each), after) == float(number) for each in numbers):
            wrong.append(number)
    return wrong


def _numbers(text: str) -> list[str]:
    return [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", text)]


def docstring(experiment: str) -> str:
    return importlib.import_module(f"train.experiments.{experiment}").__doc__


def test_every_experiment_has_a_row():
    assert measured(TEXT).keys() == set(EXPERIMENTS) - {"ablations"}  # it has a table of its own


@pytest.mark.parametrize("experiment", measured(TEXT))
def test_rows_have_commands_that_are_understood_and_the_figures_of_their_file(experiment):
    rows = measured(TEXT)[experiment]
    assert all(parse(shlex.split(command)).run for command, _ in rows)
    assert not unsaid([figures for _, figures in rows], docstring(experiment))


def test_choices_have_the_figures_of_ablations():
    (rows,) = [rows for rows in tables(TEXT) if "choice" in rows[0]]
    said = set(re.findall(r"^ {4}\S.* (\d+\.\d) %  \d", docstring("ablations"), re.MULTILINE))
    shown = {_numbers(part)[-1] for row in rows for part in row["exact match"].split(",")}
    assert len(said) > 20
    assert shown <= said, shown - said


def test_a_figure_that_was_not_measured_is_caught():
    header = "| system | command | time | result |\n|---|---|---|---|\n"
    first, second = (
        f"| ours | `dates --seed {seed}` | {time} | {share} % of 1,000 |\n"
        for seed, time, share in ((3, "4 min 5 s", "98.9"), (4, "0 min 7 s", "62.3"))
    )

    def wrong(text, said):
        return unsaid([figures for _, figures in measured(header + text)["dates"]], said)

    said = "Time: 4 min\n5 s on 2 CPU cores, and 0 min 7 s.\nResult: 98.94 % of 1,000 dates, and 62.3 % of 1,000."
    assert wrong(first + second, said) == []
    assert wrong(first, said.replace("98.94", "98.84").replace("4 min", "14 min"))[0] == "4 min 5 s"
    assert wrong(first, said.replace("98.94", "98.84").replace("cores", "98.9")) == ["98.9", "1000"]
    assert wrong(second + first, said) == ["4 min 5 s", "98.9", "1000"]
    with pytest.raises(AssertionError, match="no experiment"):
        measured(header + first.replace("`dates", "`date"))


def test_long_texts_have_the_figures_of_their_rows():
    (shown,) = [rows for rows in tables(TEXT) if "16,000" in rows[0]]
    lines = (ROOT / "benchmarks" / "results" / "long-sequences.jsonl").read_text("utf-8").splitlines()
    rows = {(row["attention"], row["length"]): row for row in map(json.loads, lines)}
    for name, cells in zip(long_sequences.NAMES, shown, strict=True):
        for length, cell in zip((1_000, 4_000, 16_000), list(cells.values())[1:], strict=True):
            row = rows[name, length]
            milliseconds = f", {1e3 * row['median_seconds']:,.0f} ms" if row["status"] == "timed" else ": refused"
            assert cell == f"{row['planned_bytes'] / 2**20:,.0f} MiB{milliseconds}"


def test_no_figure_is_left_open():
    prose = re.sub(r"```.*?```|`[^`]*`", "", TEXT, flags=re.DOTALL)
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b|^[A-Z]{4,}$", prose, re.MULTILINE)
