"""The README keeps its word: its Python runs, its map is the tree, its links lead somewhere."""

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from train import experiments
from train.__main__ import parse

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXT = README.read_text("utf-8") if README.exists() else ""
EXPERIMENTS = [name.lower() for name in experiments.__all__]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"""\]\(([^)\s]+)|\b(?:src|srcset|href)="([^"\s]+)""")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
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
    beside = (path for path in ROOT.iterdir() if path.is_file())
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
FILES |= {"seqattn/kernels/reference.py", "train/log.py", "README.md"}


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
        (FILES - {"train/log.py"}, "train is not there"),
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


def measured(text: str) -> list[tuple[str, Row]]:
    """The command of each table's row that names an experiment, and what the row has from its time on."""
    found = []
    for rows in tables(text):
        for row in rows:
            words = [match for cell in row.values() for match in re.findall(r"`([^`]+)`", cell)]
            commands = [word for word in words if word.split()[0] in EXPERIMENTS]
            if "time" in row:
                columns = list(row)
                # One before it says of what the row is a variant.
                found.append((commands[-1], {name: row[name] for name in columns[columns.index("time") :]}))
    return found


def unsaid(figures: Row, docstring: str) -> list[str]:
    """The times that a docstring does not have, and the numbers that its results are not, be it with more digits."""
    times, _, results = " ".join(docstring.split()).partition(" Result")
    said = [float(number.replace(",", "")) for number in _NUMBER.findall(results)]
    wrong = [] if re.search(rf"(?<!\d)(?<!h )(?<!min ){re.escape(figures['time'])}\b", times) else [figures["time"]]
    for name, cell in figures.items():
        numbers = [] if name == "time" else [number.replace(",", "") for number in _NUMBER.findall(cell)]
        digits = [(number, len(number.partition(".")[2])) for number in numbers]
        wrong += [number for number, after in digits if all(round(each, after) != float(number) for each in said)]
    return wrong


def docstring(experiment: str) -> str:
    return importlib.import_module(f"train.experiments.{experiment}").__doc__


def test_every_experiment_has_a_row():
    listed = {command.split()[0] for command, _ in measured(TEXT)}
    assert listed == set(EXPERIMENTS) - {"ablations"}  # it has a table of its own


@pytest.mark.parametrize(
    ("command", "figures"), [pytest.param(command, figures, id=command) for command, figures in measured(TEXT)]
)
def test_a_row_has_a_command_that_is_understood_and_the_figures_of_its_file(command, figures):
    assert parse(shlex.split(command)).run
    assert not unsaid(figures, docstring(command.split()[0]))


def test_choices_have_the_figures_of_ablations():
    (rows,) = [rows for rows in tables(TEXT) if "choice" in rows[0]]
    for row in rows:
        assert not unsaid({"time": "", "result": row["exact match"]}, docstring("ablations"))


def test_a_figure_that_was_not_measured_is_caught():
    header = "| system | command | time | result |\n|---|---|---|---|\n"
    ((command, figures),) = measured(header + "| ours | `dates --seed 3` | 4 min 5 s | 98.9 % of 1,000 |\n")
    assert command == "dates --seed 3"
    said = "Time: 4 min\n5 s on 2 CPU cores.\nResult: 98.94 % of 1,000 dates."
    assert unsaid(figures, said) == []
    assert unsaid(figures, said.replace("98.94", "98.84").replace("4 min", "3 min")) == ["4 min 5 s", "98.9"]
    assert unsaid(figures, said.replace("4 min", "14 min").replace("CPU cores", "98.9")) == ["4 min 5 s"]


def test_no_figure_is_left_open():
    prose = re.sub(r"```.*?```|`[^`]*`", "", TEXT, flags=re.DOTALL)
    assert not re.findall(r"\b[A-Z]+_[A-Z]+\b|^[A-Z]{4,}$", prose, re.MULTILINE)
