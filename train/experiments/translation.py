"""Translation of your own parallel text in minutes, by a small Transformer.

Command: `python -m train translation --task.source train.en --task.target train.de`, optionally with
`--task.validation-source`, `--task.test-source` and their targets. A dataset of the Hugging Face hub:
`python -m train translation task:hub-translation --task.name NAME --task.source-column en --task.target-column de`.
Multi30k from the hub, or from a folder: `python -m train translation task:multi30k --task.data DIR`.
Time: 9 min 36 s on 2 CPU cores (AVX2, float32).
Result: BLEU 27.4 (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0) and chrF 51.3
(nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0) on the 2016 test split of Multi30k, English to German,
with greedy search, from the six files of its first task (seed 0, 1,000 updates).
"""

from pathlib import Path

from seqattn.models import TransformerConfig
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import ParallelFiles
from train.update.optimizer import Adam, Optimizer
from train.update.schedules import Cosine

TRANSLATION = Experiment(
    task=ParallelFiles(),
    model=TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        num_encoder_layers=4,
        num_decoder_layers=4,
        block=BlockConfig(model_dim=128, hidden_dim=256, num_heads=4, norm_first=True),
    ),
    run=Path("runs/translation"),
    tokenizer=ByteLevelBPE(vocab_size=10_000),
    batches=Batches(tokens=4096, max_length=128, buckets=4),
    optimizer=Optimizer(algorithm=Adam(), schedule=Cosine(peak=3e-3, warmup_steps=100)),
    steps=1000,
    evaluate_every=250,
    label_smoothing=0.1,
    bleu=True,
)
