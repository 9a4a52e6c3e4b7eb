"""Short strings to their reverse by a small Transformer, at a budget by which one choice shows.

Command: `python -m train ablations`.
"""

from pathlib import Path

from seqattn.models import Rotary, TransformerConfig
from seqattn.nn import BlockConfig
from train.batches import Batches
from train.config import FROM_TOKENIZER, Experiment
from train.optimizer import Cosine, Optimizer
from train.tasks import Reverse

ABLATIONS = Experiment(
    task=Reverse(min_length=1, max_length=12),
    model=TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=BlockConfig(model_dim=64, hidden_dim=256, num_heads=4, norm_first=True, dropout_rate=0.0),
        positions=Rotary(),
    ),
    run=Path("runs/ablations"),
    batches=Batches(tokens=2048, max_length=16, buckets=1),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=50)),
    steps=400,
    evaluate_every=50,
)
"""The choices that are measured one by one change a flag or two of this."""
