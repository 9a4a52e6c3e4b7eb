"""Every experiment learns: a few updates on one small batch of its own task, by its own model and optimizer."""

import dataclasses
import importlib
import itertools
import re
import sysconfig
from pathlib import Path

import jax
import pytest

from seqattn.models import CaptionerConfig
from train.data.batches import stream
from train.data.tokenizer import ByteLevelBPE
from train.devices.parallel import Replicated
from train.engine import loop
from train.experiments import catalogue
from train.tasks import CodeTopics, LabelledFiles, Multi30k, ParallelFiles
from train.tasks.own_files import OwnFiles
from train.tasks.standard_library import SourceTask
from train.tasks.task import DrawnTask
from train.update.freezing import freeze
from train.update.schedules import Constant
from train.update.step import make_update

FEW = {"train_examples": 48, "validation_examples": 4, "test_examples": 4}
EMAIL = Path(sysconfig.get_path("stdlib")) / "email"


def _task(task, folder: Path):
    """The task with few and short examples."""
    if isinstance(task, ParallelFiles):
        (folder / "source").write_text("a b c\nb c\n" * 20)
        (folder / "target").write_text("c b a\nc b\n" * 20)
        names = ("source", "validation_source", "test_source"), ("target", "validation_target", "test_target")
        paths = {name: folder / side for side, group in zip(("source", "target"), names, strict=True) for name in group}
        return dataclasses.replace(task, **paths)
    if isinstance(task, OwnFiles):
        end = "\tlabel {0}" if isinstance(task, LabelledFiles) else ""
        for name in ("train", "validation", "test"):
            rows = (f"{{0}} b c {name} {number}{end}\n".format("xy"[number % 2]) for number in range(20))
            (folder / name).write_text("".join(rows))
        return dataclasses.replace(task, **{name: folder / name for name in ("train", "validation", "test")})
    if isinstance(task, Multi30k):
        for name in ("train", "val", "test_2016_flickr"):
            (folder / f"{name}.en").write_text("a b c\nb c\n" * 20)
            (folder / f"{name}.de").write_text("c b a\nc b\n" * 20)
        return dataclasses.replace(task, data=folder)
    if isinstance(task, CodeTopics):
        return dataclasses.replace(task, packages=("asyncio", "email"), lines=4, **FEW)
    if isinstance(task, SourceTask):
        return dataclasses.replace(task, root=EMAIL, **FEW)
    assert isinstance(task, DrawnTask)
    return dataclasses.replace(task, **FEW)


def _model(model):
    """The model with few layers: two show every kind of them."""
    if isinstance(model, CaptionerConfig):
        return dataclasses.replace(model, decoder=_model(model.decoder))
    layers = [field.name for field in dataclasses.fields(model) if field.name.startswith("num_")]
    return dataclasses.replace(model, **{name: min(2, getattr(model, name)) for name in layers})


RESEMBLING = {
    *("ablations", "docstrings_compressed", "docstrings_stream", "docstrings_transformer", "docstrings_recurrent"),
    *("few_tags", "in_between", "multi30k", "reading_transformer", "reverse"),
}
"""Experiments whose task, and whose kind of model, another one has."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in RESEMBLING else ()) for name in catalogue.names()]
)
def test_the_loss_falls(name, tmp_path):
    experiment = catalogue.named(name)
    tokenizer = experiment.tokenizer
    experiment = dataclasses.replace(
        experiment,
        task=_task(experiment.task, tmp_path),
        model=_model(experiment.model),
        run=tmp_path / "run",
        tokenizer=ByteLevelBPE(300) if isinstance(tokenizer, ByteLevelBPE) else tokenizer,
        batches=dataclasses.replace(
            experiment.batches, tokens=6000, max_length=min(300, experiment.batches.max_length)
        ),
        optimizer=dataclasses.replace(experiment.optimizer, schedule=Constant(1e-3)),
    )
    session = loop.prepare(experiment)
    rows = session.objective.examples(session.splits["train"])
    # The run itself would be over all devices, and this is of one.
    batch = next(itertools.islice(stream(dataclasses.replace(experiment.batches, tokens=1500), rows, seed=0), 1))
    optimizer = freeze(session.experiment.optimizer.make(experiment.steps), experiment.frozen)
    settings = {"seed": 0, "label_smoothing": experiment.label_smoothing}
    make = make_update(session.graph, optimizer, session.objective.loss, **settings)
    placed, state, losses = Replicated().spread(make, jax.local_devices()[:1]), session.state, []
    for _ in range(6):
        state, metrics = placed.update(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.97 * losses[0]


@pytest.mark.parametrize("name", catalogue.names())
def test_the_docstring_says_command_time_and_result(name):
    said = importlib.import_module(f"train.experiments.{name}").__doc__
    assert f"`python -m train {name}" in said
    assert re.search(r"^Time.*\d+ s\b.* 2 CPU cores", said, re.MULTILINE)
    assert re.search(r"^Result\b.*\d", said, re.DOTALL | re.MULTILINE)
    assert not re.findall(r"\b[A-Z]{7,}\b", said), "a figure that is left open"
