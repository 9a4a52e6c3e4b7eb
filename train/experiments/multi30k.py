"""Translation of captions, English to German, by the small Transformer that is best on Multi30k (arXiv 2105.14462).

Command: `python -m train multi30k --task.data DIR`, where DIR holds train, val and test_2016_flickr as .en and .de; the
data come from the Hugging Face hub without it. Time and result: not measured yet.
"""

from pathlib import Path

from seqattn.models import TransformerConfig
from seqattn.nn import BlockConfig
from train.batches import Batches
from train.config import FROM_TOKENIZER, Experiment
from train.optimizer import Adam, InverseSquareRoot, Optimizer
from train.tasks import Multi30k
from train.tokenizer import ByteLevelBPE

MULTI30K = Experiment(
    task=Multi30k(),
    model=TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        num_encoder_layers=4,
        num_decoder_layers=4,
        block=BlockConfig(model_dim=128, hidden_dim=256, num_heads=4, dropout_rate=0.3),
    ),
    run=Path("runs/multi30k"),
    tokenizer=ByteLevelBPE(vocab_size=10_000),
    batches=Batches(tokens=8192, max_length=128, buckets=6),
    optimizer=Optimizer(algorithm=Adam(), schedule=InverseSquareRoot(peak=5e-3, warmup_steps=2000)),
    steps=8000,
    evaluate_every=500,
    keep_checkpoints=10,
    average=10,
    beam_size=5,
    label_smoothing=0.1,
    bleu=True,
)
