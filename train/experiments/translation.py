"""Translation of parallel text, by the small Transformer that is best on Multi30k (arXiv 2105.14462).

Command: `python -m train translation --task.source train.en --task.target train.de`, and likewise
`--task.validation-source`, `--task.test-source` and their targets; from the hub by name:
`python -m train translation task:hub-translation --task.name NAME --task.source-column en --task.target-column de`.
Time and result: not measured. Its 8,000 updates take hours on 2 CPU cores; 20 of them were run on Multi30k.
"""

from pathlib import Path

from seqattn.models import TransformerConfig
from seqattn.nn import BlockConfig
from train.batches import Batches
from train.config import FROM_TOKENIZER, Experiment
from train.optimizer import Adam, InverseSquareRoot, Optimizer
from train.tasks import ParallelFiles
from train.tokenizer import ByteLevelBPE

TRANSLATION = Experiment(
    task=ParallelFiles(),
    model=TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        num_encoder_layers=4,
        num_decoder_layers=4,
        block=BlockConfig(model_dim=128, hidden_dim=256, num_heads=4, dropout_rate=0.3),
    ),
    run=Path("runs/translation"),
    tokenizer=ByteLevelBPE(vocab_size=10_000),
    batches=Batches(tokens=8192, max_length=128, buckets=6),
    optimizer=Optimizer(algorithm=Adam(), schedule=InverseSquareRoot(peak=5e-3, warmup_steps=2000)),
    steps=8000,
    evaluate_every=1000,
    label_smoothing=0.1,
    bleu=True,
)
