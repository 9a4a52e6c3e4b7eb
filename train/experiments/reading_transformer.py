"""Pictures of strings read by a Transformer from strips of pixels (Dosovitskiy 2020).

Commands: `python -m train reading_transformer`, and with convolutions, to which its decoder attends without encoder
layers, `python -m train reading_transformer model.image:convolutional --model.image.channels 16 32 64
--model.decoder.num-encoder-layers 0 --steps 8000 --run runs/reading_transformer_convolutions`.
Time: 13 min 49 s on 2 CPU cores (AVX2, float32), and 4 min 35 s with convolutions.
Result: 89.5 % exact match on 1,000 held-out strings, with a character error rate of 3.6 %; with convolutions 64.6 % and
14.0 % (seed 0, 16,000 and 8,000 updates).
"""

import dataclasses
from pathlib import Path

from seqattn.models import CaptionerConfig, Patches, TransformerConfig
from seqattn.nn import BlockConfig
from train.config import FROM_TOKENIZER
from train.experiments.reading import READING

READING_TRANSFORMER = dataclasses.replace(
    READING,
    model=CaptionerConfig(
        vocab_size=FROM_TOKENIZER,
        # As high as a picture and narrower than most letters.
        image=Patches((32, 4)),
        decoder=TransformerConfig(
            vocab_size=FROM_TOKENIZER,
            num_encoder_layers=3,
            num_decoder_layers=2,
            block=BlockConfig(model_dim=96, hidden_dim=384, num_heads=4, norm_first=True, dropout_rate=0.0),
        ),
    ),
    run=Path("runs/reading_transformer"),
)
