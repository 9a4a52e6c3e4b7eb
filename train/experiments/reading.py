"""Pictures of strings read by convolutions and a recurrent decoder that attends to their places (Xu 2015).

Commands: `python -m train reading`, over patches
`python -m train reading model.image:patches --run runs/reading_patches`, and by a Transformer's decoder, whose table
of tokens takes its size from `vocab_size` of the captioner,
`python -m train reading model.decoder:transformer-config --model.decoder.vocab-size 0
--model.decoder.num-encoder-layers 0 --model.decoder.num-decoder-layers 2 --model.decoder.block.model-dim 64
--model.decoder.block.hidden-dim 256 --model.decoder.block.num-heads 4 --run runs/reading_transformer`.
Time: 7 min 54 s, 4 min 28 s and 8 min 36 s on 2 CPU cores (AVX2, float32).
Result: 53.3 % exact match on 1,000 strings that were never trained on, 18.8 % of the characters wrong; over patches
0.0 % and 96.1 %, so nothing was learned; by the Transformer's decoder 68.0 % and 11.4 % (seed 0, 12,000 updates).
"""

from pathlib import Path

from seqattn.models import AttentionEncoder, CaptionerConfig, Convolutional, Seq2SeqConfig
from seqattn.nn import Cell, Score
from train.batches import Batches
from train.config import FROM_TOKENIZER, Experiment
from train.optimizer import Cosine, Optimizer
from train.tasks import RenderedText

READING = Experiment(
    task=RenderedText(max_length=6),
    model=CaptionerConfig(
        vocab_size=FROM_TOKENIZER,
        image=Convolutional(channels=(16, 32, 64)),
        decoder=Seq2SeqConfig(
            vocab_size=FROM_TOKENIZER,
            embedding_dim=64,
            hidden_dim=128,
            cell=Cell.GRU,
            attention=Score.SCALED_GENERAL,
            dropout_rate=0.0,
            attention_encoder=AttentionEncoder(num_layers=0, positions=None),
        ),
    ),
    run=Path("runs/reading"),
    # 32 pictures, each of 32 rows of pixels and at most 8 characters, start and end included.
    batches=Batches(tokens=1280, max_length=64, buckets=1),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=100)),
    steps=12000,
    evaluate_every=2000,
    log_every=20,
)
