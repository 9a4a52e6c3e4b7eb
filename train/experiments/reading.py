"""Pictures of strings read by convolutions and a recurrent decoder that attends to their outputs (Xu 2015).

Commands: `python -m train reading`, and with strips of pixels and two layers of self-attention instead of convolutions
`python -m train reading model.image:patches --model.image.patch 32 4 --model.decoder.attention-encoder.num-layers 2
--model.decoder.attention-encoder.hidden-dim 512 --optimizer.schedule.peak 5e-4 --optimizer.schedule.warmup-steps 500
--run runs/reading_strips`. For a Transformer see `reading_transformer`.
Time: 7 min 14 s on 2 CPU cores (AVX2, float32), and 9 min 32 s with strips.
Result: 68.5 % exact match on 1,000 held-out strings, with a character error rate of 12.3 %; with strips 74.3 % and
10.1 % (seed 0, 16,000 updates). At the learning rate for convolutions this decoder learned nothing from strips in 7,000
updates. Without the self-attention layers it reached 0.3 % exact match in 16,000; lower rates were not tried there.
"""

from pathlib import Path

from seqattn.models import AttentionEncoder, CaptionerConfig, Convolutional, Seq2SeqConfig
from seqattn.nn import Cell, Score
from train.config import FROM_TOKENIZER, Experiment
from train.data.batches import Batches
from train.tasks import RenderedText
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

READING = Experiment(
    task=RenderedText(train_examples=100_000, max_length=6),
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
    # 32 pictures, each with 32 rows of pixels and at most 8 characters, including start and end.
    batches=Batches(tokens=1280, max_length=64, buckets=1),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=100)),
    steps=16000,
    evaluate_every=2000,
    log_every=20,
)
