"""The first line of a function's docstring from its body, by the Transformer encoder-decoder.

The source is the first 1,500 characters of the function, about 500 tokens. The data is the Python standard library of
this machine, split by file. See Liu 2018: Transformer-ED, L = 500.

Command: `python -m train docstrings_transformer`.
Time: 5 min 9 s on 2 CPU cores (AVX2, float32).
Result: perplexity 170, 2.43 bits per character and ROUGE-L 10.6 on 507 functions of held-out files (seed 0, 300
updates).
"""

import dataclasses
from pathlib import Path

from seqattn.models import Sinusoidal, TransformerConfig
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER
from train.experiments.docstrings_recurrent import DOCSTRINGS_RECURRENT

BLOCK = BlockConfig(model_dim=128, hidden_dim=512, num_heads=4, norm_first=True, dropout_rate=0.2)
DOCSTRINGS_TRANSFORMER = dataclasses.replace(
    DOCSTRINGS_RECURRENT,
    model=TransformerConfig(
        FROM_TOKENIZER,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=BLOCK,
        positions=Sinusoidal(),
    ),
    run=Path("runs/docstrings_transformer"),
)
