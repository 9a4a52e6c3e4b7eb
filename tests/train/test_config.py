"""A config survives JSON; two of them are compared field by field."""

import dataclasses
import enum
import json
import re
import typing
from pathlib import Path

import pytest

from seqattn.models import (
    AttentionEncoder,
    BucketBiases,
    Compressed,
    EncoderConfig,
    Full,
    LanguageModelConfig,
    LinearBiases,
    Local,
    MaskedTokens,
    RecurrentLanguageModelConfig,
    RelativeKeys,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    Window,
)
from seqattn.nn import BlockConfig, Cell, MixtureConfig, Monotonic, Predictive
from train import config
from train.config import decode, differences, encode
from train.experiments import catalogue
from train.experiments.addition import ADDITION
from train.experiments.dates import DATES
from train.tasks import CodeTopics, Docstrings, PythonCode, PythonTags
from train.tasks.task import Task
from train.update.initializers import Kaiming, Normal, Uniform, Xavier
from train.update.optimizer import SGD, AdaGrad, InverseTime, Momentum, Muon, Optimizer

TASKS = Path(config.__file__).with_name("tasks")
ALL = [catalogue.named(name) for name in catalogue.names()]


@pytest.mark.parametrize("experiment", ALL, ids=catalogue.names())
def test_every_experiment_survives_json(experiment):
    assert decode(json.loads(json.dumps(encode(experiment)))) == experiment


PATTERN = (Local(5), Compressed(3), Full(), Window(7))
VALUES = [
    LanguageModelConfig(11, pattern=PATTERN, positions=RelativeKeys(3, by_head=True)),
    LanguageModelConfig(11, block=BlockConfig(mixture=MixtureConfig(num_experts=5, capacity_factor=None))),
    RecurrentLanguageModelConfig(11, cell=Cell.LSTM, tie_embeddings=True),
    EncoderConfig(11, head=TokenLabels(3), positions=BucketBiases(8, 20)),
    EncoderConfig(11, head=TextLabels(3), positions=LinearBiases()),
    EncoderConfig(11, head=MaskedTokens(), positions=None),
    Seq2SeqConfig(11, local=Monotonic(3), attention_encoder=AttentionEncoder(num_heads=2, positions=None)),
    Seq2SeqConfig(11, local=Predictive(5)),
    Optimizer(Muon(adam=("a/*", "b")), InverseTime(every=7)),
    *(Optimizer(algorithm) for algorithm in (SGD(), Momentum(nesterov=True), AdaGrad(epsilon=1e-3))),
    *(Kaiming("uniform", mode="fan_out"), Uniform(0.5), Normal(0.5), Xavier(gain=2.0)),
    *(PythonCode(characters=9), PythonTags(root=Path("src")), CodeTopics(packages=("a", "b")), Docstrings()),
    dataclasses.replace(
        DATES,
        patience=1,
        initializer=Uniform(),
        word_vectors=Path("glove.txt"),
        frozen=("embedding/*", "stack/*"),
    ),
    dataclasses.replace(DATES, start_from=Path("runs/masked")),
]


@pytest.mark.parametrize("value", VALUES, ids=[f"{type(each).__name__}-{n}" for n, each in enumerate(VALUES)])
def test_every_kind_of_value_survives_json(value):
    decoded = decode(json.loads(json.dumps(encode(value))))
    assert decoded == value
    assert type(decoded) is type(value)


@dataclasses.dataclass(frozen=True)
class Inner:
    """What only the task below has."""

    path: Path = Path("x")


@dataclasses.dataclass(frozen=True)
class OfATest(Task):
    """A task that no file of the project names."""

    inner: Inner = Inner()

    def load(self):
        raise NotImplementedError


def test_a_task_of_ones_own_needs_no_registry():
    experiment = dataclasses.replace(DATES, task=OfATest(Inner(Path("y"))))
    assert decode(json.loads(json.dumps(encode(experiment)))) == experiment


def test_a_task_named_as_one_of_the_project_is_refused():
    own = dataclasses.make_dataclass("Dates", [], bases=(OfATest,), frozen=True)
    with pytest.raises(TypeError, match=r"Dates is both train\.tasks\.dates and .*: give one of them another name"):
        encode(dataclasses.replace(DATES, task=own()))


def test_every_file_of_tasks_is_a_choice_on_the_command_line():
    choices = typing.get_args(config.AnyTask)
    written = [re.findall(r"^    def load\(", file.read_text(), re.MULTILINE) for file in TASKS.glob("*.py")]
    # One `load` is that of `Task` itself.
    assert len(choices) == len(set(choices)) == sum(map(len, written)) - 1
    assert {"Dates", "Multi30k", "HubTranslation"} <= {kind.__name__ for kind in choices}


def test_names_of_types_are_one_type_each():
    """What the annotations reach, from the experiment on: a name is all that a saved config has of a type."""
    found = []

    def reach(annotation):
        for inner in typing.get_args(annotation):
            reach(inner)
        if not isinstance(annotation, type) or annotation in found:
            return
        if dataclasses.is_dataclass(annotation) or issubclass(annotation, enum.Enum):
            found.append(annotation)
        if dataclasses.is_dataclass(annotation):
            for inner in typing.get_type_hints(annotation).values():
                reach(inner)

    reach(config.Experiment)
    assert {Muon, MixtureConfig, AttentionEncoder, Cell, MaskedTokens} <= set(found)
    assert len({kind.__name__ for kind in found}) == len(found)


def test_a_run_of_before_the_new_settings_takes_their_defaults():
    encoded = encode(ADDITION)
    for name in ("patience", "initializer", "word_vectors", "start_from", "frozen"):
        del encoded[name]
    for name in ("local", "attention_encoder"):
        del encoded["model"][name]
    assert decode(encoded) == ADDITION
    block = encode(BlockConfig())
    for name in ("mixture", "use_norm", "norm_gain", "norm_bias", "use_residual"):
        del block[name]
    assert decode(block) == BlockConfig()


def test_unknown_and_missing_fields_are_named():
    encoded = encode(DATES.model)
    renamed = {"vocabulary" if name == "vocab_size" else name: value for name, value in encoded.items()}
    with pytest.raises(ValueError, match=r"unknown \['vocabulary'\], missing \['vocab_size'\]"):
        decode(renamed)


def test_a_config_without_a_field_that_was_added_since_takes_its_default():
    encoded = encode(DATES.model)
    del encoded["decoder_window"], encoded["block"]["attention_bias"]
    assert decode(encoded) == DATES.model


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match=r"'Popen'; if .* the file of its experiment \(--experiment FILE\)"):
        decode({"type": "Popen", "args": "ls"})


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="function"):
        encode(lambda: None)


def test_differences_name_nested_fields():
    first = DATES
    model = dataclasses.replace(first.model, num_encoder_layers=7)
    second = dataclasses.replace(first, model=model, seed=3)
    assert differences(encode(first), encode(second)) == ["model.num_encoder_layers: 2 and 7", "seed: 0 and 3"]


def test_differences_of_other_types_name_the_types():
    assert differences(encode(DATES.task), encode(ADDITION.task)) == [": Dates and Addition"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", 0), ("label_smoothing", 1.0), ("pieces", 0), ("max_skipped", 0)),
        *(("average", 0), ("beam_size", 0), ("keep_best", -1), ("ema", 0.0), ("ema", 1.0), ("ema", float("nan"))),
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} \({value}\)"):
        dataclasses.replace(DATES, **{name: value})


@pytest.mark.parametrize("seed", [-1, -(2**40), 2**32, 2**64])
def test_e17_a_seed_that_is_none_of_32_bits_is_refused(seed):
    with pytest.raises(ValueError, match=rf"seed \({seed}\) must be in \[0, 2\*\*32\)"):
        dataclasses.replace(DATES, seed=seed)
    assert [dataclasses.replace(DATES, seed=seed).seed for seed in (0, 2**32 - 1)] == [0, 2**32 - 1]


@pytest.mark.parametrize(("steps", "keep"), [(20, 10), (1000, 2)])
def test_a_mean_of_more_checkpoints_than_there_will_be_is_refused(steps, keep):
    settings = {"steps": steps, "evaluate_every": 10, "keep_checkpoints": keep}
    with pytest.raises(ValueError, match=r"average \(3\) must be at most the number of checkpoints at the end \(2\)"):
        dataclasses.replace(DATES, average=3, **settings)
    assert dataclasses.replace(DATES, average=2, **settings).average == 2


@pytest.mark.parametrize(("patience", "keep"), [(0, 2), (2, 2), (3, 2)])
def test_a_patience_that_would_lose_the_best_checkpoint_is_refused(patience, keep):
    with pytest.raises(ValueError, match=rf"patience \({patience}\) must be .* keep_checkpoints \({keep}\)"):
        dataclasses.replace(DATES, patience=patience, keep_checkpoints=keep)
    assert dataclasses.replace(DATES, patience=1, keep_checkpoints=2).patience == 1


@pytest.mark.parametrize(("name", "value"), [("word_vectors", Path("glove.txt")), ("initializer", Uniform())])
def test_parameters_from_two_places_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} .* and start_from \(runs/masked\) exclude each other"):
        dataclasses.replace(DATES, start_from=Path("runs/masked"), **{name: value})
