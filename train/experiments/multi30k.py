"""Translation of captions, English to German, by the small Transformer that is best on Multi30k (arXiv 2105.14462).

Command: `python -m train multi30k --task.data DIR`, where DIR has the files train, val and test_2016_flickr as .en and
.de, plain or .gz. Without `--task.data` the data is downloaded from the Hugging Face hub.
Time: 1 h 9 min 52 s on 2 CPU cores (AVX2, float32); other work took some of the CPU time.
Result: BLEU 39.16 (nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0), lower-cased 39.56 (the same except
case:lc), and chrF 63.94 (nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0) on the 1,000 captions of the 2016
test split, with the mean of the last ten checkpoints and a beam of 5 (seed 0, 4,000 updates).
A sample: "A man in an orange hat starring at something." gives "Ein Mann mit einem orangefarbenen Hut starrt auf
etwas." Learning curves: multi30k-curves.png. Attention: multi30k.png. More samples: docs/results.md.

The published 41.02 (lower-cased tokens) needs 8,000 updates with dropout 0.3 and a peak of 5e-3 after 2,000 updates,
which takes hours on two cores: `--steps 8000 --model.block.dropout-rate 0.3 --optimizer.schedule.peak 5e-3
--optimizer.schedule.warmup-steps 2000`. For half as many updates, dropout is 0.2 and the peak is earlier and lower.
"""

from pathlib import Path

from seqattn.models import TransformerConfig
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import Multi30k
from train.update.optimizer import Adam, Optimizer
from train.update.schedules import InverseSquareRoot

MULTI30K = Experiment(
    task=Multi30k(),
    model=TransformerConfig(
        vocab_size=FROM_TOKENIZER,
        num_encoder_layers=4,
        num_decoder_layers=4,
        block=BlockConfig(model_dim=128, hidden_dim=256, num_heads=4, dropout_rate=0.2),
    ),
    run=Path("runs/multi30k"),
    tokenizer=ByteLevelBPE(vocab_size=10_000),
    batches=Batches(tokens=8192, max_length=64, packed=True),
    optimizer=Optimizer(algorithm=Adam(), schedule=InverseSquareRoot(peak=4e-3, warmup_steps=1000)),
    steps=4000,
    evaluate_every=100,
    keep_checkpoints=10,
    average=10,
    beam_size=5,
    label_smoothing=0.1,
    bleu=True,
)
