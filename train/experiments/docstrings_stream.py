"""The first line of a function's docstring after its body in one sequence of at most 4,000 tokens, decoder-only.

The data is the Python standard library of this machine, split by file. See Liu 2018: Transformer-D, L = 4000.

Command: `python -m train docstrings_stream`.
Time: 13 min 6 s on 2 CPU cores (AVX2, float32).
Result: perplexity 175, 2.45 bits per character and ROUGE-L 11.5 on 507 functions of held-out files (seed 0, 300
updates).
"""

import dataclasses
from pathlib import Path

from seqattn.models import LanguageModelConfig, Sinusoidal
from train.config import FROM_TOKENIZER
from train.data.batches import Batches
from train.experiments.docstrings_transformer import BLOCK, DOCSTRINGS_TRANSFORMER
from train.tasks import Docstrings

MODEL = LanguageModelConfig(FROM_TOKENIZER, num_layers=5, block=BLOCK, positions=Sinusoidal())
DOCSTRINGS_STREAM = dataclasses.replace(
    DOCSTRINGS_TRANSFORMER,
    task=Docstrings(max_source=12_000),
    model=MODEL,
    batches=Batches(tokens=8192, max_length=4000, buckets=6),
    run=Path("runs/docstrings_stream"),
)
