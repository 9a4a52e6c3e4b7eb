"""Short strings to their reverse by a small Transformer, with a budget that makes single choices visible.

Command: `python -m train ablations`. To change one choice, add the flags below and another `--run`.
Time: 43 to 88 s each on 2 CPU cores (AVX2, float32).
Result (seed 0, 400 updates): exact match on 1,000 held-out strings, and the loss. Learning rates were chosen by hand,
one or two for each optimizer. With one seed, differences of a few percent are not significant. Accuracy, loss, flags::

    baseline (AdamW, norm first, RoPE)  94.4 %  0.046
    SGD                                 44.9 %  0.442  optimizer.algorithm:sgd --optimizer.schedule.peak 1.0
    momentum                            85.0 %  0.118  optimizer.algorithm:momentum --optimizer.schedule.peak 0.1
    AdaGrad                             45.2 %  0.478  optimizer.algorithm:ada-grad --optimizer.schedule.peak 0.3
    AdaGrad, a lower rate                5.3 %  2.105  optimizer.algorithm:ada-grad --optimizer.schedule.peak 0.05
    Adam                                96.0 %  0.040  optimizer.algorithm:adam
    Muon                                36.8 %  0.671  optimizer.algorithm:muon
    Muon, a higher rate                 97.7 %  0.012  optimizer.algorithm:muon --optimizer.schedule.peak 0.01
    constant rate                       92.8 %  0.037  optimizer.schedule:constant --optimizer.schedule.rate 2e-3
                                                       --optimizer.schedule.warmup-steps 50
    inverse square root                 93.2 %  0.052  optimizer.schedule:inverse-square-root
                                                       --optimizer.schedule.peak 2e-3
                                                       --optimizer.schedule.warmup-steps 50
    Noam                                90.5 %  0.048  optimizer.schedule:noam --optimizer.schedule.model-dim 64
                                                       --optimizer.schedule.warmup-steps 100
                                                       --optimizer.schedule.factor 0.2
    inverse time                        98.4 %  0.020  optimizer.schedule:inverse-time --optimizer.schedule.rate 2e-3
                                                       --optimizer.schedule.every 100
    no weight decay                     96.0 %  0.040  --optimizer.algorithm.weight-decay 0.0
    ten times the weight decay          95.1 %  0.043  --optimizer.algorithm.weight-decay 0.1
    matrices uniform                    99.1 %  0.029  initializer:uniform
    matrices normal                     99.2 %  0.083  initializer:normal
    Xavier                              93.5 %  0.052  initializer:xavier
    Kaiming                             82.8 %  0.117  initializer:kaiming
    norm last                           99.3 %  0.021  --model.block.norm-first False
    no layer norm                       91.2 %  0.046  --model.block.use-norm False
    norm without gain and bias          95.6 %  0.058  --model.block.norm-gain False --model.block.norm-bias False
    no residual sum                      0.1 %  2.154  --model.block.use-residual False
    sinusoidal positions                97.9 %  0.029  model.positions:sinusoidal
    learned positions                   50.9 %  0.406  model.positions:learned
    ALiBi                               76.3 %  0.149  model.positions:linear-biases
    T5 buckets                          34.4 %  0.704  model.positions:bucket-biases
    Shaw, relative keys                 46.4 %  0.508  model.positions:relative-keys
    Music Transformer, keys by head     50.3 %  0.443  model.positions:relative-keys --model.positions.by-head True
    no positions                         8.8 %  1.363  model.positions:none
    label smoothing 0.1                 96.4 %  0.143  --label-smoothing 0.1
    dropout 0.1                         62.8 %  0.257  --model.block.dropout-rate 0.1
"""

import dataclasses
from pathlib import Path

from train.data.batches import Batches
from train.experiments.reverse import REVERSE
from train.tasks import Reverse
from train.update.optimizer import Optimizer
from train.update.schedules import Cosine

ABLATIONS = dataclasses.replace(
    REVERSE,
    task=Reverse(max_length=12),
    run=Path("runs/ablations"),
    batches=Batches(tokens=2048, max_length=16, buckets=1),
    optimizer=Optimizer(schedule=Cosine(peak=2e-3, warmup_steps=50)),
    steps=400,
    evaluate_every=50,
)
