"""A tiny experiment, and a run of it that all tests of run folders share."""

import dataclasses
from pathlib import Path

import pytest

from seqattn.models import Rotary, TransformerConfig
from seqattn.nn import BlockConfig
from train import loop
from train.batches import Batches
from train.config import Experiment
from train.optimizer import Constant, Optimizer
from train.tasks import Reverse

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


@pytest.fixture(scope="session")
def tiny() -> Experiment:
    return TINY


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of the tiny experiment; not to be written to."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert loop.train(dataclasses.replace(TINY, run=folder)) == 0
    return folder
