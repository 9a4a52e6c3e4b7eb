"""The command line, in processes of their own."""

import importlib
import json
import subprocess
import sys

import pytest

from train import config
from train.__main__ import parse
from train.checkpoints import lock
from train.engine import loop
from train.experiments import catalogue


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_misspelt_flag_is_refused_with_a_hint():
    code, text = command("train", "dates", "--stepz", "3")
    assert code != 0
    assert "--steps" in text
    assert "Traceback" not in text


def test_help_lists_the_experiments_with_a_sentence():
    code, text = command("train", "--help")
    assert code == 0
    for name in ("dates", "addition", "reverse", "translation"):
        assert name in text
    assert "Human-written dates" in text
    assert "--list" in text


def test_list_prints_each_experiment_and_a_sentence_without_jax():
    script = (
        "import sys; from train.__main__ import main; sys.argv = ['', '--list']; print(main(), 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    *lines, last = done.stdout.splitlines()
    assert last == "0 False"
    assert [line.split()[0] for line in lines] == catalogue.names()
    (column,) = {len(line) - len(line.partition(" ")[2].lstrip()) for line in lines}  # aligned
    for line, name in zip(lines, catalogue.names(), strict=True):
        documentation = " ".join(importlib.import_module(f"train.experiments.{name}").__doc__.split())
        assert documentation.startswith(line[column:])
        assert line[column:].endswith(".")


def test_list_is_a_command():
    code, text = command("train", "--list")
    assert code == 0
    assert "Human-written dates" in text


TASK = '''"""Words to themselves in capitals."""

from dataclasses import dataclass

from train.tasks.task import Task, splits


@dataclass(frozen=True)
class Capitals(Task):
    """What the name says."""

    letters: str = "abc"
    """which letters there are"""

    def load(self):
        words = [one + two + three for one in self.letters for two in self.letters for three in self.letters]
        pairs = [(word, word.upper()) for word in words]
        return splits(pairs[6:], pairs[:3], pairs[3:6])
'''
EXPERIMENT = '''"""Words to capitals, by a tiny Transformer. It takes seconds."""

from pathlib import Path

from capitals import Capitals
from seqattn.models import TransformerConfig
from seqattn.nn import BlockConfig
from train.config import Experiment
from train.data.batches import Batches
from train.update.optimizer import Optimizer
from train.update.schedules import Constant

CAPITALS = Experiment(
    task=Capitals(),
    model=TransformerConfig(
        0, num_encoder_layers=1, num_decoder_layers=1, block=BlockConfig(model_dim=8, hidden_dim=8, num_heads=2)
    ),
    run=Path("runs/capitals"),
    batches=Batches(tokens=256, max_length=16, buckets=1),
    optimizer=Optimizer(schedule=Constant(rate=0.01)),
    steps=4,
    evaluate_every=4,
)
'''


@pytest.fixture
def own_files(tmp_path):
    """A new task and a new experiment: two files in a folder of their own."""
    (tmp_path / "capitals.py").write_text(TASK)
    file = tmp_path / "to_capitals.py"
    file.write_text(EXPERIMENT)
    return file


def test_a_run_of_a_new_task_and_a_new_experiment_begins_without_a_registry_edit(own_files, tmp_path):
    experiment = parse([str(own_files), "--task.letters", "abcd", "--run", str(tmp_path / "run")])
    with loop.prepare(experiment).checkpoints:
        saved = json.loads((experiment.run / "config.json").read_text())
    assert saved["task"] == {"type": "Capitals", "letters": "abcd"}
    assert config.decode(saved).task == experiment.task


@pytest.mark.slow
def test_a_new_task_and_a_new_experiment_are_two_files_and_no_registry_edit(own_files, tmp_path):
    run = tmp_path / "run"
    flags = ("--task.letters", "abcd", "--run", str(run))
    code, text = command("train", str(own_files), *flags)
    assert code == 0, text
    assert "Warning" not in text
    saved = json.loads((run / "config.json").read_text())
    assert saved["task"] == {"type": "Capitals", "letters": "abcd"}
    assert json.loads((run / "results.json").read_text())["steps"] == 4
    code, text = command("train.evaluate", str(run))
    assert (code, text.count("\n")) == (2, 1), text
    assert "a config cannot hold the type 'Capitals'" in text
    code, text = command("train.evaluate", str(run), "--experiment", str(own_files))
    assert code == 0, text
    assert "exact_match" in text


def test_help_of_a_file_shows_its_own_settings(own_files, capsys):
    with pytest.raises(SystemExit) as left:
        parse([str(own_files), "--help"])
    text = capsys.readouterr().out
    assert left.value.code == 0
    assert "Words to capitals, by a tiny Transformer." in text
    assert "--task.letters" in text


def test_a_file_in_this_folder_without_an_ending_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "noext").write_text(EXPERIMENT)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"noext is not a Python file: its name must end in \.py"):
        parse(["./noext"])


def test_a_file_that_is_no_experiment_is_one_sentence(tmp_path):
    code, text = command("train", str(tmp_path / "no.py"))
    assert (code, text.count("\n")) == (2, 1), text
    assert "there is no file" in text


def slow(*values):
    """A process more, which takes seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["translation"], "--task.source"),
        slow(["translation", "--task.source", "no.de", "--task.target", "no.en"], "no.de"),
        (["reverse", "--steps", "0"], "steps (0) must be an integer of at least 1"),
        slow(["translation", "--task.source", ".", "--task.target", "."], "--task.source: there is no file"),
        slow(["reverse", "--optimizer.clip-norm", "0"], "clip_norm (0.0) must be positive"),
    ],
)
def test_what_cannot_run_is_one_sentence_and_not_a_traceback(flags, words, tmp_path):
    code, text = command("train", *flags, "--run", str(tmp_path / "run"))
    assert code == 2
    assert words in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_first_time_user_gets_wrong_is_told_in_a_sentence(tmp_path):
    (tmp_path / "train.en").write_text("a b\nb c\nc d\n")
    (tmp_path / "train.de").write_text("b a\nc b\n")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.tex").touch()
    texts = ("--task.source", f"{tmp_path}/train.en", "--task.target", f"{tmp_path}/train.de")
    told = {
        ("translation", *texts, "--run", f"{tmp_path}/run"): "has 3 lines",
        ("reverse", "--run", f"{tmp_path}/used"): "holds files but no run; give an empty or new folder with --run",
        ("reverse", "--run", f"{tmp_path}/train.en"): "is a file; give a folder with --run",
    }
    for arguments, words in told.items():
        code, text = command("train", *arguments)
        assert (code, text.count("\n")) == (2, 1), text
        assert words in text
    with lock.RunLock(tmp_path / "locked"):
        code, text = command("train", "reverse", "--run", f"{tmp_path}/locked")
    assert (code, text.count("\n")) == (2, 1), text
    assert "is being trained" in text


@pytest.mark.parametrize("module", ["train.translate", "train.evaluate", "train.plot"])
def test_the_commands_for_a_run_say_what_is_missing_without_a_traceback(module, tmp_path):
    code, text = command(module, str(tmp_path / "no"))
    assert code == 2
    assert "holds no checkpoint; train it with" in text
    assert "Traceback" not in text
