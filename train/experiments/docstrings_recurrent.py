"""The first line of a function's docstring from its body, by a recurrent encoder-decoder with additive attention.

The source is the first 1,500 characters of the function, about 500 tokens. The data is the Python standard library of
this machine, split by file. See Liu 2018: seq2seq-attention, L = 500.

Command: `python -m train docstrings_recurrent`.
Time: 3 min 36 s on 2 CPU cores (AVX2, float32).
Result: perplexity 113, 2.24 bits per character and ROUGE-L 13.0 on 507 functions of held-out files (seed 0, 300
updates).
"""

from pathlib import Path

from seqattn.models import Seq2SeqConfig
from seqattn.nn import Cell
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE
from train.tasks import Docstrings
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

DOCSTRINGS_RECURRENT = Experiment(
    task=Docstrings(max_source=12_000, first=1_500),
    model=Seq2SeqConfig(FROM_TOKENIZER, embedding_dim=128, hidden_dim=192, cell=Cell.GRU, dropout_rate=0.2),
    run=Path("runs/docstrings_recurrent"),
    tokenizer=ByteLevelBPE(vocab_size=2000),
    batches=Batches(tokens=8192, max_length=600, buckets=4),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=50)),
    steps=300,
    evaluate_every=150,
)
