"""Every command that the docstring of an experiment shows is one that the command line takes."""

import dataclasses
import importlib
import re
import shlex
from typing import get_args

import pytest

from seqattn.models import Rotary
from seqattn.models.position_encodings import Positions
from train.__main__ import parse
from train.experiments import catalogue
from train.experiments.reading import READING
from train.experiments.reading_transformer import READING_TRANSFORMER


def in_docstring(name):
    text = " ".join(importlib.import_module(f"train.experiments.{name}").__doc__.split())
    return re.findall(r"`python -m train ([^`]*)`", text)


@pytest.mark.parametrize("name", catalogue.names())
def test_commands_of_an_experiment_are_taken_and_differ(name):
    commands = in_docstring(name)
    own = [command for command in commands if command.split()[0] == name]
    assert own
    parsed = {command: parse(shlex.split(command)) for command in commands}
    folders = {parsed[command].run for command in own}
    # Without data of its own, the experiment has no result that another command would write over.
    assert len(folders) == (1 if name == "translation" else len(own))


def test_flags_of_a_choice_that_is_not_written_are_taken_in_any_order():
    flags = ["--model.block.use-norm", "False", "--steps", "3"]
    for words in (["reverse", *flags], ["reverse", *flags[2:], *flags[:2]]):
        experiment = parse(words)
        assert not experiment.model.block.use_norm
        assert experiment.steps == 3
    flags = ["--model.input-feeding", "False", "--model.attention", "None"]
    for words in (["addition", *flags], ["addition", *flags[2:], *flags[:2]]):
        model = parse(words).model
        assert (model.input_feeding, model.attention) == (False, None)


def test_all_positions_that_the_docstring_of_language_names_are_taken():
    text = importlib.import_module("train.experiments.language").__doc__.partition(", where ")[2].partition(".")[0]
    names = re.findall(r"`([^`]*)`", text)
    positions = {parse(["language", f"model.positions:{name}"]).model.positions for name in names}
    assert positions | {Rotary()} == {choice() if choice is not type(None) else None for choice in get_args(Positions)}


def test_convolutions_are_read_without_encoder_layers():
    (command,) = [command for command in in_docstring("reading_transformer") if "convolutional" in command]
    model = parse(shlex.split(command)).model
    assert model.image == READING.model.image
    own = READING_TRANSFORMER.model.decoder
    assert model.decoder == dataclasses.replace(own, num_encoder_layers=0)
