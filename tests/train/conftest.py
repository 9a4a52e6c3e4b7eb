"""Tiny experiments, and runs of them that all tests of run folders share."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

from seqattn.models import EncoderConfig, LanguageModelConfig, MaskedTokens, Rotary, TokenLabels, TransformerConfig
from seqattn.nn import BlockConfig
from train.checkpoints import run
from train.config import Experiment
from train.data.batches import Batches
from train.devices.parallel import Placed, Replicated
from train.engine import loop
from train.tasks import PythonCode, PythonTags, Reverse
from train.update.optimizer import Optimizer
from train.update.schedules import Constant

BLOCK = BlockConfig(model_dim=12, hidden_dim=17, num_heads=2, norm_first=True, dropout_rate=0.1)
TINY = Experiment(
    task=Reverse(train_examples=101, validation_examples=7, test_examples=5, min_length=2, max_length=5),
    model=TransformerConfig(0, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK, positions=Rotary()),
    run=Path("set by each test"),
    batches=Batches(tokens=256, max_length=16, buckets=1),
    optimizer=Optimizer(schedule=Constant(rate=0.01, warmup_steps=3)),
    steps=12,
    evaluate_every=5,
    evaluate_examples=4,
    log_every=2,
    keep_checkpoints=1,
    label_smoothing=0.1,
    bleu=True,
    seed=3,
)


@pytest.fixture(scope="module")
def unchecked() -> Iterator[None]:
    """Where a length may be a symbol: an annotation says int, which is checked in tests alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    return TINY


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the tiny experiment; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert loop.train(dataclasses.replace(TINY, run=folder)) == 0
    return folder


@pytest.fixture(scope="session")
def interrupted() -> Callable[[Experiment, int], None]:
    """Trains until a signal comes after so many steps."""

    def train(experiment: Experiment, steps: int) -> None:
        handlers: list[loop.Interrupts] = []
        batches = loop.iterate

        def iterate(order, *, start):
            for count, batch in enumerate(batches(order, start=start), start + 1):
                if count == steps:
                    handlers[-1]._note(15, None)
                yield batch

        class Noted(loop.Interrupts):
            def __enter__(self):
                handlers.append(self)
                return super().__enter__()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "iterate", iterate)
            patch.setattr(loop, "Interrupts", Noted)
            assert loop.train(experiment) == 143

    return train


@pytest.fixture(scope="session")
def compiled_once() -> Callable[[], AbstractContextManager[None]]:
    """Where one experiment is trained several times, its update is compiled once."""

    @contextmanager
    def once() -> Iterator[None]:
        placed: list[Placed] = []
        spread = Replicated.spread

        def first(choice: Replicated, update: Any, **_: Any) -> Placed:
            placed[:] = placed or [spread(choice, update)]
            return placed[0]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Replicated, "spread", first)
            yield

    return once


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of Python source; the last of all letters is in some of them only."""
    folder = tmp_path_factory.mktemp("library")
    for number in range(41):
        (folder / f"m{number}.py").write_text(f"x = {number}\n" + "# z\n" * (number % 2))
    return folder


def untrained(experiment: Experiment) -> Path:
    """The folder of a run that was saved before its first update."""
    session = loop.prepare(experiment)
    with session.checkpoints:
        session.save()
    return experiment.run


@pytest.fixture(scope="session")
def masked(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder of masked tokens; not to be written to."""
    model = EncoderConfig(0, num_layers=1, block=BLOCK, head=MaskedTokens())
    folder = tmp_path_factory.mktemp("runs") / "masked"
    return untrained(dataclasses.replace(TINY, task=PythonCode(library), model=model, run=folder, bleu=False))


@pytest.fixture(scope="session")
def tagging(library: Path, masked: Path) -> Experiment:
    """A tagger that starts from the encoder of masked tokens, and learns nothing but its head."""
    return dataclasses.replace(
        TINY,
        task=PythonTags(library, train_examples=7),
        model=EncoderConfig(0, num_layers=1, block=BLOCK, head=TokenLabels(0)),
        start_from=masked,
        frozen=("embedding/*", "stack/*"),
        optimizer=Optimizer(schedule=Constant(rate=0.1)),
        steps=4,
        evaluate_every=2,
        bleu=False,
        seed=5,
    )


@pytest.fixture(scope="session")
def tagged(tagging, masked, tmp_path_factory, interrupted, compiled_once) -> Path:
    """The folder of a run of the tagger, which was interrupted and then had lost what it started from.

    Not to be written to.
    """
    runs = tmp_path_factory.mktemp("runs")
    shutil.copytree(masked, runs / "masked")
    experiment = dataclasses.replace(tagging, run=runs / "tagged", start_from=runs / "masked")
    with compiled_once():
        interrupted(experiment, 3)
        shutil.rmtree(runs / "masked")
        assert loop.train(experiment) == 0
    return experiment.run


@pytest.fixture(scope="session")
def language(library: Path, tmp_path_factory: pytest.TempPathFactory) -> run.Run:
    """A language model before its first update."""
    model = LanguageModelConfig(0, num_layers=1, block=BLOCK, positions=Rotary())
    folder = tmp_path_factory.mktemp("runs") / "language"
    return run.load(untrained(dataclasses.replace(TINY, task=PythonCode(library), model=model, run=folder, bleu=False)))
