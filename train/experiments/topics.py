"""Ten lines of Python source to their package, by a Transformer encoder with mean pooling.

The data is six packages of the Python standard library of this machine, split by file.

Command: `python -m train topics`.
Time: 2 min 8 s on 2 CPU cores (AVX2, float32).
Result: 74.5 % accuracy on 501 pieces of held-out files (seed 0, 300 updates).
"""

from pathlib import Path

from seqattn.models import EncoderConfig, Sinusoidal, TextLabels
from seqattn.nn import BlockConfig
from train.config import FROM_DATA, FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import CodeTopics
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

TOPICS = Experiment(
    task=CodeTopics(),
    model=EncoderConfig(
        FROM_TOKENIZER,
        num_layers=2,
        block=BlockConfig(model_dim=64, hidden_dim=256, num_heads=4, norm_first=True, dropout_rate=0.2),
        positions=Sinusoidal(),
        head=TextLabels(FROM_DATA),
    ),
    run=Path("runs/topics"),
    tokenizer=ByteLevelBPE(vocab_size=1000),
    batches=Batches(tokens=8192, max_length=512, buckets=3),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=50)),
    steps=300,
    evaluate_every=100,
    patience=2,
    keep_checkpoints=3,
)
