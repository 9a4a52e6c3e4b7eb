"""The command line, in processes of their own."""

import subprocess
import sys

import pytest


def command(*arguments):
    done = subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_a_misspelt_flag_is_refused_with_a_hint():
    code, text = command("train", "dates", "--stepz", "3")
    assert code != 0
    assert "--steps" in text


def test_help_lists_the_experiments_with_a_sentence():
    code, text = command("train", "--help")
    assert code == 0
    for name in ("dates", "addition", "reverse", "translation"):
        assert name in text
    assert "Human-written dates" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["translation"], "--task.source"),
        (["translation", "--task.source", "no.de", "--task.target", "no.en"], "no.de"),
        (["reverse", "--steps", "0"], "steps (0) must be at least 1"),
        (["translation", "--task.source", ".", "--task.target", "."], "--task.source: there is no file"),
        (["reverse", "--optimizer.clip-norm", "0"], "clip_norm (0.0) must be positive"),
    ],
)
def test_what_cannot_run_is_one_sentence_and_not_a_traceback(flags, words, tmp_path):
    code, text = command("train", *flags, "--run", str(tmp_path / "run"))
    assert code == 2
    assert words in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("module", ["train.translate", "train.evaluate", "train.plot"])
def test_the_commands_for_a_run_say_what_is_missing_without_a_traceback(module, tmp_path):
    code, text = command(module, str(tmp_path / "no"))
    assert code == 2
    assert "holds no checkpoint; train it with" in text
    assert "Traceback" not in text
