"""The implementations of updates, by the name that `--implementations` takes, with the same AdamW settings.

All train the same parameters from the same weights. Only their random dropout masks differ.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from benchmarks.bench import machine
from benchmarks.bench.attempt import WHOLE
from benchmarks.bench.marian import marian_mt
from benchmarks.bench.program import Program, there_already
from benchmarks.training.case import TrainingCase
from benchmarks.training.torch_transformer import torch_transformer
from seqattn.interop.huggingface import from_huggingface
from train.devices.parallel import Replicated
from train.objectives.sequences import SequenceToSequence
from train.update.optimizer import AdamW, Optimizer
from train.update.schedules import Constant
from train.update.step import make_update, start

FORWARD, GRADIENT, UPDATE = PARTS = ("forward", "gradient", WHOLE)
"""The loss; the loss and its gradient; the loss, its gradient and AdamW. Each part contains the one before."""

PreparePart = Callable[[TrainingCase, Mapping[str, np.ndarray], str], Program]
"""Makes a program from a case, weights by Marian's names, and a part. The update program advances its state per call.

An update returns the loss and the norm of its gradient, both before the update. Raises ImportError if the library is
not installed, NotImplementedError if it does not support the device.
"""

RATE, ADAMW = 1e-3, AdamW()
_IGNORED = -100  # torch's label for positions without a target


def seqattn(case: TrainingCase, weights: Mapping[str, np.ndarray], part: str) -> Program:
    """The objective and update of `python -m train` on one device, without clipping; donates the state."""
    optimizer = Optimizer(ADAMW, Constant(RATE), clip_norm=None).make(steps=1)
    graph, state = start(from_huggingface(case.config, weights), optimizer)
    if part != UPDATE:
        return _before_update(case, graph, state.params, part)
    settings: dict[str, Any] = {"seed": 0, "label_smoothing": case.label_smoothing}
    update = make_update(graph, optimizer, SequenceToSequence.loss, **settings)
    placed = Replicated().spread(update, jax.local_devices()[:1])
    batch = case.batch()

    def run() -> dict[str, jax.Array]:
        nonlocal state
        state, metrics = placed.update(state, batch)
        return metrics

    return Program(run, jax.block_until_ready, lambda found: [np.asarray(found[x]) for x in ("loss", "gradient_norm")])


def _before_update(case: TrainingCase, graph: nnx.GraphDef, parameters: nnx.State, part: str) -> Program:
    """Returns the loss of our model, or the loss with its gradient, as a program."""

    def loss(parameters: nnx.State, batch: Any, key: jax.Array) -> jax.Array:
        settings: dict[str, Any] = {"label_smoothing": case.label_smoothing, "dropout_key": key}
        total, count = SequenceToSequence.loss(nnx.merge(graph, parameters), batch, **settings)
        return total / count

    compiled = jax.jit(jax.value_and_grad(loss) if part == GRADIENT else loss)
    batch, key = case.batch(), jax.random.key(0)
    return Program(lambda: compiled(parameters, batch, key), jax.block_until_ready, jax.tree.leaves)


def hugging_face(case: TrainingCase, weights: Mapping[str, np.ndarray], part: str) -> Program:
    """`MarianMTModel` of transformers in eager PyTorch, unmodified."""
    _check_torch("transformers")
    import torch

    network = marian_mt(case.config, weights).train()
    bias = network.final_logits_bias
    # A buffer in transformers, but Marian trains it, and so do the other implementations.
    del network.final_logits_bias
    network.final_logits_bias = torch.nn.Parameter(bias)

    def logits(source: Any, padding: Any, target: Any) -> Any:
        return network(source, ~padding, target, use_cache=False).logits

    return _eager(case, network, logits, part)


def pytorch(case: TrainingCase, weights: Mapping[str, np.ndarray], part: str) -> Program:
    """`torch.nn.Transformer`, in eager PyTorch."""
    _check_torch("torch")
    network = torch_transformer(case.config, weights).train()
    return _eager(case, network, network, part)


def _check_torch(name: str) -> None:
    machine.only_on_a_cpu(name)
    import torch

    torch.set_num_threads(machine.cores())
    torch.manual_seed(0)


def _eager(case: TrainingCase, network: Any, logits: Callable[[Any, Any, Any], Any], part: str) -> Program:
    """Returns a program for a PyTorch network, given a function from source, padding and target to logits."""
    import torch

    batch = {name: torch.from_numpy(x.astype(np.int64)) for name, x in case.batch().items()}
    source, inputs, labels = batch["source"], batch["target"][:, :-1], batch["target"][:, 1:]
    padding, empty = (
        torch.arange(tokens.shape[1])[None] >= lengths[:, None]
        for tokens, lengths in ((source, batch["source_length"]), (labels, batch["target_length"] - 1))
    )
    wanted = labels.masked_fill(empty, _IGNORED).flatten()
    criterion = torch.nn.CrossEntropyLoss(ignore_index=_IGNORED, label_smoothing=case.label_smoothing)
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    optimizer = _adamw(trained)

    def run() -> Any:
        optimizer.zero_grad()
        given = logits(source, padding, inputs)
        loss = criterion(given.flatten(0, 1), wanted)
        if part != FORWARD:
            loss.backward()
        if part == UPDATE:
            optimizer.step()
        return loss.detach()

    def arrays(loss: Any) -> list[np.ndarray]:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained.values()])
        return [loss.numpy(), norm.numpy()]

    return Program(run, there_already, arrays)


def _adamw(trained: Mapping[str, Any]) -> Any:
    """Returns torch's fused AdamW with weight decay on matrices only, as in ours."""
    import torch

    decays = {name: parameter.ndim > 1 and not name.endswith("bias") for name, parameter in trained.items()}
    matrices, others = ([trained[name] for name in trained if decays[name] is wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": ADAMW.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, RATE, (ADAMW.beta1, ADAMW.beta2), ADAMW.epsilon, fused=True)


NAMES: dict[str, PreparePart] = {"seqattn": seqattn, "transformers": hugging_face, "torch": pytorch}

PEERS = ("transformers", "torch")
"""The libraries we compare with."""
