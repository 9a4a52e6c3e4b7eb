"""A config survives JSON; two of them are compared field by field."""

import dataclasses
import enum
import json
import re
import typing
from pathlib import Path

import numpy as np
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
    TransformerConfig,
    Window,
)
from seqattn.nn import BlockConfig, Cell, MixtureConfig, Monotonic, Predictive
from train import config
from train.config import decode, differences, encode
from train.data.cache_folder import DataCache
from train.experiments import catalogue
from train.experiments.addition import ADDITION
from train.experiments.dates import DATES
from train.tasks import CodeTopics, Docstrings, PythonCode, PythonTags
from train.tasks.task import Task
from train.update.adapters import LowRank
from train.update.initializers import Kaiming, Normal, Uniform, Xavier
from train.update.optimizer import SGD, AdaGrad, Momentum, Muon, Optimizer
from train.update.schedules import InverseTime

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
    dataclasses.replace(DATES, start_from=Path("hf:gpt2"), adapters=LowRank(2, 3.5, ("*query/kernel",), ("*norm*",))),
]


@pytest.mark.parametrize("value", VALUES, ids=[f"{type(each).__name__}-{n}" for n, each in enumerate(VALUES)])
def test_every_kind_of_value_survives_json(value):
    decoded = decode(json.loads(json.dumps(encode(value))), type(value))
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
    assert decode(block, BlockConfig) == BlockConfig()


def test_unknown_and_missing_fields_are_named():
    encoded = encode(DATES.model)
    renamed = {"vocabulary" if name == "vocab_size" else name: value for name, value in encoded.items()}
    with pytest.raises(ValueError, match=r"unknown field 'vocabulary'; the fields of TransformerConfig are vocab_size"):
        decode(renamed, type(DATES.model))


def test_a_config_without_a_field_that_was_added_since_takes_its_default():
    encoded = encode(DATES.model)
    del encoded["decoder_window"], encoded["block"]["attention_bias"]
    assert decode(encoded, type(DATES.model)) == DATES.model


def test_unknown_type_is_refused():
    with pytest.raises(ValueError, match=r"'Popen'; if .* python -m train FILE, .* --experiment FILE, or"):
        decode({"type": "Popen", "args": "ls"})


def test_what_json_cannot_hold_is_refused():
    with pytest.raises(TypeError, match="function"):
        encode(lambda: None)


def test_differences_name_nested_fields():
    first = DATES
    model = dataclasses.replace(first.model, num_encoder_layers=7)
    second = dataclasses.replace(first, model=model, seed=3)
    assert differences(encode(first), encode(second)) == ["model.num_encoder_layers: 2 and 7", "seed: 0 and 3"]


def test_differences_name_the_fields_of_a_class_that_has_one_named_value():
    kind = dataclasses.make_dataclass("Valued", [("value", int), ("other", int)], frozen=True)
    assert differences(encode(kind(1, 2)), encode(kind(1, 3))) == ["other: 2 and 3"]
    assert differences(encode(kind(1, 2)), encode(kind(4, 3))) == ["other: 2 and 3", "value: 1 and 4"]
    holder = dataclasses.make_dataclass("Holder", [("value", kind)], frozen=True)
    assert differences(encode(holder(kind(1, 2))), encode(holder(kind(1, 3)))) == ["value.other: 2 and 3"]
    assert differences(encode(kind(1, 2)), encode(holder(kind(1, 2)))) == [": Valued and Holder"]
    assert differences(encode(Inner(Path("a"))), encode(Inner(Path("b")))) == ["path: a and b"]


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
    with pytest.raises(ValueError, match=rf"seed \({seed}\) must be an integer from 0 to 4294967295"):
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


WRITTEN_BEFORE = """
{"type": "Experiment", "task": {"type": "PythonTags", "root": {"type": "Path", "value": "src"}, "train_examples":
null, "validation_examples": 1000, "test_examples": 1000, "seed": 0, "characters": 160}, "model": {"type":
"TransformerConfig", "vocab_size": 0, "num_encoder_layers": 2, "num_decoder_layers": 2, "block": {"type":
"BlockConfig", "model_dim": 96, "hidden_dim": 384, "num_heads": 4, "num_kv_heads": null, "activation": {"type":
"Activation", "value": "relu"}, "gated": false, "norm_first": true, "qk_norm": false, "attention_bias": false,
"norm_epsilon": 1e-06, "use_norm": true, "norm_gain": true, "norm_bias": true, "use_residual": true, "dropout_rate":
0.0, "attention_dropout_rate": 0.0, "hidden_dropout_rate": 0.0, "mixture": null, "remat": false, "scan_layers":
false}, "positions": {"type": "Learned", "max_length": 128}, "share_embeddings": true, "logits_bias": false,
"decoder_window": null}, "run": {"type": "Path", "value": "runs/dates"}, "tokenizer": {"type": "Characters"},
"batches": {"type": "Batches", "tokens": 6144, "max_length": 80, "buckets": 2, "packed": false}, "optimizer":
{"type": "Optimizer", "algorithm": {"type": "AdamW", "beta1": 0.9, "beta2": 0.98, "epsilon": 1e-09, "weight_decay":
0.01}, "schedule": {"type": "Cosine", "peak": 0.002, "warmup_steps": 100, "final": 0.0}, "clip_norm": 1.0}, "steps":
1500, "evaluate_every": 250, "evaluate_examples": 500, "log_every": 10, "tensorboard": false, "wandb": null,
"profile": null, "keep_checkpoints": 2, "keep_best": 0, "average": 1, "beam_size": 1, "patience": 1, "initializer":
{"type": "Uniform", "scale": 0.08}, "word_vectors": {"type": "Path", "value": "glove.txt"}, "start_from": null,
"frozen": ["embedding/*"], "parallel": {"type": "Replicated"}, "processes": {"type": "Processes", "coordinator":
null, "count": null, "index": null, "cluster": null, "timeout": 300}, "label_smoothing": 0.0, "pieces": 1,
"compute_dtype": "float32", "ema": null, "max_skipped": 10, "bleu": false, "accept_changes": false, "seed": 0}
"""
"""What the program wrote while a table of names said which classes there are (November 2026)."""


ADDED_TO_BLOCKS = (
    *("attention_head_dim", "attention_scale", "attention_soft_cap", "key_bias", "output_bias", "feed_forward_bias"),
    *("norm_outputs", "rms_norm"),
)
ADDED_TO_TRANSFORMERS = ("decoder_block", "embedding_scale", "norm_embedding", "tie_logits", "logits_scale")


def test_the_one_codec_reads_and_writes_what_was_written_before_it():
    expected = dataclasses.replace(
        DATES,
        task=PythonTags(root=Path("src")),
        patience=1,
        initializer=Uniform(),
        word_vectors=Path("glove.txt"),
        frozen=("embedding/*",),
    )
    assert decode(json.loads(WRITTEN_BEFORE)) == expected
    now = encode(expected)
    # Fields added since, whose defaults are what was done before.
    assert now.pop("data_cache") == encode(DataCache())
    assert now.pop("adapters") is None
    for values, plain, added in (
        (now["model"]["block"], BlockConfig(), ADDED_TO_BLOCKS),
        (now["model"], TransformerConfig(0), ADDED_TO_TRANSFORMERS),
    ):
        assert {name: values.pop(name) for name in added} == {name: getattr(plain, name) for name in added}
    assert json.dumps(now) == " ".join(WRITTEN_BEFORE.split())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 1.5}, "config.steps must be an integer, got 1.5"),
        ({"tensorboard": 1}, "config.tensorboard must be true or false, got 1"),
        ({"compute_dtype": "float16"}, "config.compute_dtype must be 'float32' or 'bfloat16', got 'float16'"),
        ({"frozen": "a"}, "config.frozen must be a list, got 'a'"),
        ({"run": {"type": "Path", "value": 3}}, "config.run must have the fields type and value, a string"),
        ({"steps": 0}, r"config: steps \(0\) must be an integer of at least 1"),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused_by_its_field(change, words):
    with pytest.raises(ValueError, match=words):
        decode(encode(DATES) | change)


def test_a_value_that_could_not_be_read_back_is_not_written():
    with pytest.raises(TypeError, match=r"config\.bleu must be true or false, got 'no'"):
        encode(dataclasses.replace(DATES, bleu="no"))
    assert encode(dataclasses.replace(DATES, ema=np.float64(0.5)))["ema"] == 0.5


def test_infinity_of_a_run_of_before_is_read():
    optimizer = dataclasses.replace(DATES.optimizer, clip_norm=float("inf"))
    experiment = dataclasses.replace(DATES, optimizer=optimizer)
    assert decode(json.loads(json.dumps(encode(experiment)))) == experiment
