"""The first line of a docstring by local and memory-compressed attention with a mixture of experts in each block.

The data is the Python standard library of this machine, split by file. See Liu 2018: T-DMCA with a mixture.

Command: `python -m train docstrings_experts`.
Time: 17 min 17 s on 2 CPU cores (AVX2, float32).
Result: perplexity 219, 2.55 bits per character and ROUGE-L 11.0 on 507 functions of held-out files. In the last
updates, 1.5 % of the routing choices exceeded the capacity of their expert (seed 0, 300 updates).
"""

import dataclasses
from pathlib import Path

from seqattn.nn import MixtureConfig
from train.experiments.docstrings_compressed import DOCSTRINGS_COMPRESSED, MODEL

_BLOCK = dataclasses.replace(MODEL.block, mixture=MixtureConfig(num_experts=8, top_k=2))

DOCSTRINGS_EXPERTS = dataclasses.replace(
    DOCSTRINGS_COMPRESSED,
    model=dataclasses.replace(MODEL, block=_BLOCK),
    run=Path("runs/docstrings_experts"),
)
