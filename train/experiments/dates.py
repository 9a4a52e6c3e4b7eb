"""Human-written dates in 40 languages to ISO 8601, by a small Transformer: the default experiment.

Command: `make train`, or `python -m train dates`.
Time: 3 min 33 s on 2 CPU cores (Intel Xeon, AVX2, float32), without the installation.
Result: 99.1 % exact match on 1,000 dates of held-out days (seed 0, 1,500 updates).
"""

from pathlib import Path

from seqattn.models import Learned, TransformerConfig
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.tasks import Dates
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

DATES = Experiment(
    task=Dates(),
    model=TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=BlockConfig(model_dim=96, hidden_dim=384, num_heads=4, norm_first=True, dropout_rate=0.0),
        positions=Learned(max_length=128),
    ),
    run=Path("runs/dates"),
    batches=Batches(tokens=6144, max_length=80, buckets=2),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=100)),
    steps=1500,
    evaluate_every=250,
)
