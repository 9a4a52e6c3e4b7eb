"""Your own text, by a decoder-only Transformer, a recurrent language model or an encoder of hidden tokens."""

from pathlib import Path

from seqattn.models import LanguageModelConfig, Rotary
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import TextFiles
from train.update.optimizer import Cosine, Optimizer

OWN_TEXT = Experiment(
    task=TextFiles(),
    model=LanguageModelConfig(
        FROM_TOKENIZER,
        num_layers=2,
        block=BlockConfig(model_dim=96, hidden_dim=384, num_heads=4, norm_first=True, dropout_rate=0.1),
        positions=Rotary(),
    ),
    run=Path("runs/own_text"),
    tokenizer=ByteLevelBPE(vocab_size=1000),
    batches=Batches(tokens=4096, max_length=512, buckets=2),
    optimizer=Optimizer(schedule=Cosine(peak=3e-3, warmup_steps=50)),
    steps=200,
    evaluate_every=100,
)
