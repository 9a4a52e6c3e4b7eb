"""A config survives JSON; two of them are compared field by field."""

import dataclasses
import json

import pytest

from train import experiments
from train.config import decode, differences, encode

ALL = [getattr(experiments, name) for name in experiments.__all__]


@pytest.mark.parametrize("experiment", ALL, ids=experiments.__all__)
def test_every_experiment_survives_json(experiment):
    assert decode(json.loads(json.dumps(encode(experiment)))) == experiment


def test_unknown_and_missing_fields_are_named():
    encoded = encode(experiments.DATES.model)
    renamed = {"vocabulary" if name == "vocab_size" else name: value for name, value in encoded.items()}
    with pytest.raises(ValueError, match=r"unknown \['vocabulary'\], missing \['vocab_size'\]"):
        decode(renamed)


def test_a_config_without_a_field_that_was_added_since_takes_its_default():
    encoded = encode(experiments.DATES.model)
    del encoded["decoder_window"], encoded["block"]["attention_bias"]
    assert decode(encoded) == experiments.DATES.model


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match="'Popen'"):
        decode({"type": "Popen", "args": "ls"})


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="function"):
        encode(lambda: None)


def test_differences_name_nested_fields():
    first = experiments.DATES
    model = dataclasses.replace(first.model, num_encoder_layers=7)
    second = dataclasses.replace(first, model=model, seed=3)
    assert differences(encode(first), encode(second)) == ["model.num_encoder_layers: 2 and 7", "seed: 0 and 3"]


def test_differences_of_other_types_name_the_types():
    assert differences(encode(experiments.DATES.task), encode(experiments.ADDITION.task)) == [": Dates and Addition"]


@pytest.mark.parametrize(("name", "value"), [("steps", 0), ("seed", -1), ("seed", 2**32), ("label_smoothing", 1.0)])
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\)"):
        dataclasses.replace(experiments.DATES, **{name: value})
