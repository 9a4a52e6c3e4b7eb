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
    ],
)
def test_what_cannot_run_is_one_sentence_and_not_a_traceback(flags, words, tmp_path):
    code, text = command("train", *flags, "--run", str(tmp_path / "run"))
    assert code == 2
    assert words in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()
