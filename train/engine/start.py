"""The initial model of a run: drawn from the seed, then filled with pre-trained word vectors or parameters.

What is read from files comes first (`given`). The rest is a pure function (`fresh`), so that it can be compiled for a
mesh, on which no device holds the whole model.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from seqattn.models import CaptionerConfig, TransformerConfig
from train.checkpoints import run
from train.config import Experiment
from train.data.tokenizer import Tokenizer
from train.data.word_vectors import as_rows, load_table
from train.devices.parallel import Given, Placed, Sharded
from train.devices.processes import check_same
from train.update.initializers import redraw
from train.update.parameters import paths
from train.update.step import TrainState, start

log = logging.getLogger(__name__)


def given(
    experiment: Experiment, tokenizer: Tokenizer, *, shardings: Callable[[TrainState], Any] | None = None
) -> Given:
    """Reads the parameters that a run takes from files: word vectors, or those of another run.

    Args:
        experiment: the resolved experiment.
        tokenizer: its tokenizer, which names the rows of the embedding.
        shardings: returns the sharding of each array of a state; see `train.checkpoints.run.load`.

    Returns:
        Parameters by path; empty if the model is only drawn. Word vectors are on the host.

    Raises:
        ValueError: no parameter of `start_from` fits, or the word vectors have another size or cover no token.
    """
    params = nnx.state(nnx.eval_shape(lambda: run.build(experiment.model, seed=experiment.seed)), nnx.Param)
    shapes = dict(zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True))
    found: dict[str, Any] = {}
    if experiment.word_vectors is not None:
        found |= _vectors(experiment, tokenizer, experiment.word_vectors, shapes)
    if experiment.start_from is not None:
        found |= _of_run(experiment.start_from, shapes, shardings)
    return found


def fresh(experiment: Experiment, given: Given) -> nnx.Module:
    """Builds the model of a resolved experiment before its first update.

    Args:
        experiment: the resolved experiment.
        given: parameters by path, which replace those that are drawn.

    Returns:
        The model, on the default device; inside `jax.jit`, wherever its output shardings say.
    """
    # Redrawing comes first: it would overwrite word vectors.
    model: Any = run.build(experiment.model, seed=experiment.seed)
    if experiment.initializer is not None:
        model = redraw(model, experiment.initializer, seed=experiment.seed)
    if not given:
        return model

    def filled(drawn: jax.Array, path: str) -> jax.Array:
        if path not in given:
            return drawn
        values, rows = given[path]
        return jnp.asarray(values) if rows is None else jnp.where(rows[:, None], values, drawn)

    graph, params, *others = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(filled, params, paths(params)), *others)


def sharded(experiment: Experiment, placed: Placed) -> Callable[[TrainState], Any] | None:
    """Where another model's state goes: over the mesh, or to the default device (None) if devices are replicas."""
    return placed.shardings if isinstance(experiment.parallel, Sharded) else None


def drawn(
    experiment: Experiment, tokenizer: Tokenizer, optimizer: optax.GradientTransformation, placed: Placed
) -> TrainState:
    """Draws the state before the first update, on a mesh in parts."""
    found = given(experiment, tokenizer, shardings=sharded(experiment, placed))

    def make(given: Given) -> TrainState:
        return start(fresh(experiment, given), optimizer, average=experiment.ema is not None)[1]

    # Replicas that start from different parameters would never agree, and no error would show it.
    check_same({"the parameters that they start from": _digest(found)})
    state = placed.draw(make, found)
    check_same({"the initial parameters": _digest(state.params)})
    return state


def _digest(params: Any) -> str:
    """A SHA-256 digest of the arrays that this process holds whole; of nothing if there is only one process."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params) if jax.process_count() > 1 else ():
        # What is spread over processes was made or read by all of them together.
        if getattr(leaf, "is_fully_addressable", True):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _vectors(
    experiment: Experiment, tokenizer: Tokenizer, file: Path, shapes: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Yields the path of each table of tokens, its rows, and which of them have a vector."""
    # A token of byte-level BPE at the start of a word includes the space before it, which files of vectors lack.
    tokens = [token.removeprefix("␣") or token for token in tokenizer.tokens(list(range(tokenizer.vocab_size)))]
    config: Any = experiment.model
    where = ""
    if isinstance(config, CaptionerConfig):
        config, where = config.decoder, "decoder/"
    table, found = load_table(file, tokens, shapes[f"{where}embedding/table"].shape[1])
    if not found.any():
        raise ValueError(f"--word-vectors: {file} has a vector for none of the {len(tokens)} tokens")
    log.warning("%s: vectors of %d of %d tokens", file, found.sum(), len(tokens))
    # Only a Transformer may read its sources with a table of their own.
    tables = ("embedding", "source_embedding") if isinstance(config, TransformerConfig) else ("embedding",)
    for path in (f"{where}{name}/table" for name in tables):
        if path in shapes:
            yield path, as_rows(table, found, shapes[path])


def _of_run(
    folder: Path, shapes: dict[str, Any], shardings: Callable[[TrainState], Any] | None
) -> Iterator[tuple[str, Any]]:
    """Yields the parameters of a run that the model has with the same path and shape."""
    params = nnx.state(run.load(folder, average=1, shardings=shardings).model, nnx.Param)
    leaves = zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True)
    # Other parameters keep their initial values: a new head or a larger vocabulary is the reason to start elsewhere.
    taken = [(path, leaf) for path, leaf in leaves if path in shapes and shapes[path].shape == leaf.shape]
    # Nothing in common is a mistake in the command, not a choice.
    if not taken:
        raise ValueError(f"--start-from: no parameter of {folder} has a path and shape of this model")
    log.warning("%s: %d of %d parameters start from its values", folder, len(taken), len(shapes))
    yield from ((path, (leaf, None)) for path, leaf in taken)
