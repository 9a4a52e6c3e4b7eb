"""Task and model say what an experiment is about."""

import dataclasses

import pytest

from seqattn.models import (
    EncoderConfig,
    LanguageModelConfig,
    MaskedTokens,
    RecurrentLanguageModelConfig,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
)
from train import experiments, objectives
from train.objectives import Classification, Continuation, Masking, SequenceToSequence, Tagging
from train.tasks import CodeTopics, Docstrings, PythonCode, PythonTags, Reverse
from train.tokenizer import Characters, Tokenizer


@pytest.mark.parametrize(
    ("task", "model", "kind"),
    [
        (PythonCode(), LanguageModelConfig(11), Continuation),
        (PythonCode(), RecurrentLanguageModelConfig(11), Continuation),
        (PythonCode(), EncoderConfig(11, head=MaskedTokens()), Masking),
        (PythonTags(), EncoderConfig(11, head=TokenLabels(0)), Tagging),
        (CodeTopics(), EncoderConfig(11, head=TextLabels(0)), Classification),
        (Docstrings(), LanguageModelConfig(11), SequenceToSequence),
        (Reverse(), Seq2SeqConfig(11), SequenceToSequence),
    ],
)
def test_task_and_model_decide(task, model, kind, tiny):
    experiment = dataclasses.replace(tiny, task=task, model=model)
    assert objectives.kind(experiment) is kind
    tokenizer = Tokenizer.train(Characters(), ["ab"])
    objective = objectives.make(experiment, tokenizer, ("x", "y"))
    assert type(objective) is kind
    assert objective.tokenizer is tokenizer
    assert objective.labels == (() if kind is SequenceToSequence else ("x", "y"))


@pytest.mark.parametrize("name", experiments.__all__)
def test_every_experiment_is_about_something(name):
    assert issubclass(objectives.kind(getattr(experiments, name)), objectives.Objective)
