"""Task and model say what an experiment is about, and which commands serve its run."""

import dataclasses
import importlib.util
from pathlib import Path

import pytest

from seqattn.models import (
    CaptionerConfig,
    EncoderConfig,
    LanguageModelConfig,
    MaskedTokens,
    RecurrentLanguageModelConfig,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    TokenVectors,
)
from train import by_length, complete, objectives, translate
from train.checkpoints import run
from train.data.tokenizer import Characters, Tokenizer
from train.experiments import catalogue
from train.objectives import Classification, Continuation, Masking, Reading, SequenceToSequence, Tagging
from train.tasks import CodeTopics, Docstrings, LabelledFiles, PythonCode, PythonTags, RenderedText, Reverse, TextFiles
from train.tasks.task import Task, splits


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
    experiment = dataclasses.replace(tiny, task=task, model=model, bleu=False)
    assert objectives.kind(experiment) is kind
    tokenizer = Tokenizer.train(Characters(), ["ab"])
    objective = objectives.make(experiment, tokenizer, ("x", "y"))
    assert type(objective) is kind
    assert objective.tokenizer is tokenizer
    assert objective.labels == (() if kind is SequenceToSequence else ("x", "y"))


@dataclasses.dataclass(frozen=True)
class Own(Task):
    """A task that no file of the project names."""

    def load(self):
        return splits([("a", "b")], [("a", "b")], [("a", "b")])


class OwnContinuation(Own):
    objective = "Continuation"


class OwnSummary(Own):
    scores = frozenset({"rouge"})


class OwnMisspelt(Own):
    objective = "Continuaton"


def test_a_task_says_what_its_objective_and_its_scores_are(tiny):
    experiment = dataclasses.replace(tiny, model=LanguageModelConfig(11), bleu=False)
    tokenizer = Tokenizer.train(Characters(), ["ab"])
    made = {
        task: objectives.make(dataclasses.replace(experiment, task=task()), tokenizer, ())
        for task in (Own, OwnContinuation, OwnSummary)
    }
    assert [type(each) for each in made.values()] == [SequenceToSequence, Continuation, SequenceToSequence]
    assert [made[task]._rouge for task in (Own, OwnSummary)] == [False, True]
    with pytest.raises(ValueError, match=r"objective \(Continuaton\) must be one of SequenceToSequence, Continuation"):
        objectives.kind(dataclasses.replace(experiment, task=OwnMisspelt()))


@pytest.mark.parametrize(
    ("task", "head", "served"),
    [
        (LabelledFiles(labels="character"), TextLabels(0), "LabelledFiles are for Tagging, .* the head TokenLabels$"),
        (LabelledFiles(), TokenLabels(0), "LabelledFiles are for Classification, .* the head TextLabels$"),
        (
            TextFiles(),
            TextLabels(0),
            "TextFiles are for Masking, .* is for Classification: .* MaskedTokens$",
        ),
        (PythonCode(), TokenLabels(0), "PythonCode are for Masking"),
        (PythonTags(), MaskedTokens(), "PythonTags are for Tagging"),
        (CodeTopics(), TokenLabels(0), "CodeTopics are for Classification"),
    ],
)
def test_a_head_that_the_examples_do_not_serve_is_refused(task, head, served, tiny):
    experiment = dataclasses.replace(tiny, task=task, model=EncoderConfig(11, head=head))
    with pytest.raises(ValueError, match=served):
        objectives.kind(experiment)


def test_objectives_own_their_names_and_commands():
    for name in ("SequenceToSequence", "Continuation", "Reading", "Masking", "Tagging", "Classification"):
        kind = objectives.named(name)
        assert (kind.__name__, kind.name) == (name, name)
        assert importlib.util.find_spec(f"train.{kind.command}") is not None


KINDS = {
    Continuation: (PythonCode(), LanguageModelConfig(11)),
    Masking: (PythonCode(), EncoderConfig(11, head=MaskedTokens())),
    Tagging: (PythonTags(), EncoderConfig(11, head=TokenLabels(0))),
    Classification: (CodeTopics(), EncoderConfig(11, head=TextLabels(0))),
    Reading: (RenderedText(), CaptionerConfig(11)),
    SequenceToSequence: (Reverse(), Seq2SeqConfig(11)),
}
FOLDER = Path("runs/other")
COMMANDS = {
    "translate": (SequenceToSequence, lambda: translate.main(translate.Arguments(FOLDER, ("a",)))),
    "by_length": (SequenceToSequence, lambda: by_length.by_length(FOLDER)),
    "complete": (Continuation, lambda: complete.main(complete.Arguments(FOLDER, ("a",)))),
}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_bleu_and_beams_of_what_writes_no_text_from_a_text_are_refused(kind, tiny):
    task, model = KINDS[kind]
    experiment = dataclasses.replace(tiny, task=task, model=model, bleu=True)
    tokenizer = Tokenizer.train(Characters(), ["ab"])
    if kind is SequenceToSequence:
        assert type(objectives.make(experiment, tokenizer, ())) is kind
        return
    with pytest.raises(ValueError, match=rf"bleu \(True\) .* {kind.__name__}: set --bleu False"):
        objectives.make(experiment, tokenizer, ())
    experiment = dataclasses.replace(experiment, bleu=False)
    for asked, beam_size in ((experiment, 3), (dataclasses.replace(experiment, beam_size=3), 1)):
        with pytest.raises(ValueError, match=rf"beam_size \(3\) .* {kind.__name__}: set --beam-size 1"):
            objectives.make(asked, tokenizer, (), beam_size=beam_size)


@pytest.mark.parametrize(
    ("command", "kind"),
    [(command, kind) for command, (served, _) in COMMANDS.items() for kind in KINDS if kind is not served],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_command_names_the_one_that_serves_a_run(command, kind, tiny, monkeypatch):
    task, model = KINDS[kind]
    _, main = COMMANDS[command]
    experiment = dataclasses.replace(tiny, task=task, model=model)
    trained = run.Run(FOLDER, experiment, Tokenizer.train(Characters(), ["ab"]), (), 1, None, "digest")
    monkeypatch.setattr(run, "load", lambda folder, average=1: trained)
    other = {Continuation: "complete", SequenceToSequence: "translate"}.get(kind, "evaluate")
    words = rf"train.{command} serves .* of {FOLDER} is {kind.__name__}: use python -m train.{other}"
    with pytest.raises(ValueError, match=words):
        main()


@pytest.mark.parametrize("name", catalogue.names())
def test_every_experiment_is_about_something(name):
    assert issubclass(objectives.kind(catalogue.named(name)), objectives.Objective)


@pytest.mark.parametrize(
    "model", [Seq2SeqConfig(11), RecurrentLanguageModelConfig(11), EncoderConfig(11, head=TokenLabels(0))]
)
def test_a_model_that_cannot_tell_the_texts_of_a_row_apart_refuses_packed_batches(model, tiny):
    packed = dataclasses.replace(tiny.batches, packed=True)
    experiment = dataclasses.replace(tiny, model=model, batches=packed, bleu=False)
    with pytest.raises(ValueError, match=rf"packed \(True\) .* a {type(model).__name__}: set --batches.packed False"):
        objectives.make(experiment, Tokenizer.train(Characters(), ["ab"]), ())


def test_an_encoder_without_a_head_has_no_objective():
    experiment = dataclasses.replace(catalogue.named("tags"), model=EncoderConfig(11, head=TokenVectors()))
    with pytest.raises(ValueError, match="the head TokenVectors has no objective"):
        objectives.kind(experiment)
