"""Python source, character by character, by a decoder-only Transformer.

The data is the Python standard library of this machine, split by file, in pieces of 128 characters.

Commands: `python -m train language`, and with other position encodings
`python -m train language model.positions:relative-keys --run runs/language_relative_keys`, where `relative-keys` may
also be `sinusoidal`, `learned`, `linear-biases`, `bucket-biases` or `none`.
To continue a text: `python -m train.complete runs/language "def __init__(self"`.
Time: 2 min 20 s on 2 CPU cores (AVX2, float32).
Result: perplexity 5.58 and 2.48 bits per character on 1,000 pieces of held-out files (seed 0, 200 updates).
"""

from pathlib import Path

from seqattn.models import LanguageModelConfig, Rotary
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.tasks import PythonCode
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

LANGUAGE = Experiment(
    task=PythonCode(characters=128),
    model=LanguageModelConfig(
        FROM_TOKENIZER,
        num_layers=3,
        block=BlockConfig(model_dim=128, hidden_dim=512, num_heads=4, norm_first=True, dropout_rate=0.0),
        positions=Rotary(),
    ),
    run=Path("runs/language"),
    batches=Batches(tokens=8192, max_length=129, buckets=1),
    optimizer=Optimizer(schedule=Cosine(peak=3e-3, warmup_steps=50)),
    steps=200,
    evaluate_every=50,
)
