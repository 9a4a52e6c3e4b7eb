"""Strings to their reverse by a recurrent encoder-decoder, with attention or through one vector alone.

Commands: `python -m train bottleneck`, and without attention
`python -m train bottleneck --model.attention None --model.input-feeding False --run runs/no_attention`;
the picture: `python -m train.by_length runs/no_attention runs/attention --plot bottleneck.png`.
Time and result: not measured yet.
"""

from pathlib import Path

from seqattn.models import Seq2SeqConfig
from seqattn.nn import Cell, Direction, Score
from train.batches import Batches
from train.config import FROM_TOKENIZER, Experiment
from train.optimizer import Cosine, Optimizer
from train.tasks import Reverse

BOTTLENECK = Experiment(
    task=Reverse(min_length=1, max_length=24),
    model=Seq2SeqConfig(
        FROM_TOKENIZER,
        embedding_dim=32,
        hidden_dim=128,
        cell=Cell.GRU,
        direction=Direction.BOTH,
        attention=Score.ADDITIVE,
        dropout_rate=0.0,
    ),
    run=Path("runs/attention"),
    batches=Batches(tokens=4096, max_length=32, buckets=2),
    optimizer=Optimizer(schedule=Cosine(peak=4e-3, warmup_steps=100)),
    steps=1500,
    evaluate_every=500,
)
