"""Labels of your own texts, or of each of their characters, by a Transformer encoder."""

from pathlib import Path

from seqattn.models import EncoderConfig, Rotary, TextLabels
from seqattn.nn import BlockConfig
from train.config import FROM_DATA, FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import LabelledFiles
from train.update.optimizer import Cosine, Optimizer

LABELLED_TEXT = Experiment(
    task=LabelledFiles(),
    model=EncoderConfig(
        FROM_TOKENIZER,
        num_layers=2,
        block=BlockConfig(model_dim=64, hidden_dim=256, num_heads=4, norm_first=True, dropout_rate=0.2),
        positions=Rotary(),
        head=TextLabels(FROM_DATA),
    ),
    run=Path("runs/labelled_text"),
    tokenizer=ByteLevelBPE(vocab_size=1000),
    batches=Batches(tokens=4096, max_length=512, buckets=2),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=50)),
    steps=200,
    evaluate_every=50,
    patience=2,
    keep_checkpoints=3,
)
