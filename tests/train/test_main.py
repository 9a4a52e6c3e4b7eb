"""The command line, in processes of their own."""

import subprocess
import sys

import pytest

from train import __main__ as commands
from train import experiments
from train.checkpoints import lock


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
    assert [line.split()[0] for line in lines] == [name.lower() for name in experiments.__all__]
    (column,) = {len(line) - len(line.partition(" ")[2].lstrip()) for line in lines}  # aligned
    for line, name in zip(lines, experiments.__all__, strict=True):
        documentation = " ".join(sys.modules[f"train.experiments.{name.lower()}"].__doc__.split())
        assert documentation.startswith(line[column:])
        assert line[column:].endswith(".")


def test_list_is_a_command():
    code, text = command("train", "--list")
    assert code == 0
    assert "Human-written dates" in text


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("One.", "One."),
        ("On two\nlines. Second.\n\nThird.", "On two lines."),
        ("By A. b of 2.5 (e.g. this one). `Code` follows", "By A. b of 2.5 (e.g. this one)."),
        ("", ""),
    ],
)
def test_the_first_sentence_of_a_docstring(docstring, sentence):
    assert commands._first_sentence(docstring) == sentence


def slow(*values):
    """A process more, which takes seconds."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["translation"], "--task.source"),
        slow(["translation", "--task.source", "no.de", "--task.target", "no.en"], "no.de"),
        (["reverse", "--steps", "0"], "steps (0) must be at least 1"),
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
