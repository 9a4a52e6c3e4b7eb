"""Random strings to their reverse, by a small Transformer with rotary positions.

Command: `python -m train reverse`.
Time: 2 min 20 s on 2 CPU cores (AVX2, float32).
Result: 99.8 % exact match on 1,000 held-out strings (seed 0, 1,500 updates).
"""

from pathlib import Path

from seqattn.models import Rotary, TransformerConfig
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.tasks import Reverse
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

REVERSE = Experiment(
    task=Reverse(),
    model=TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=BlockConfig(model_dim=64, hidden_dim=256, num_heads=4, norm_first=True, dropout_rate=0.0),
        positions=Rotary(),
    ),
    run=Path("runs/reverse"),
    batches=Batches(tokens=4096, max_length=64, buckets=2),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=100)),
    steps=1500,
    evaluate_every=250,
)
