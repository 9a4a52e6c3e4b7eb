"""The initial model of a run: drawn from the seed, then filled with pre-trained word vectors or parameters.

What is read from files comes first (`given`). The rest is a pure function (`fresh`), so that it can be compiled for a
mesh, on which no device holds the whole model.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from seqattn.models import CaptionerConfig, TransformerConfig
from train.checkpoints import run
from train.config import Experiment, Model
from train.data.tokenizer import Tokenizer
from train.data.word_vectors import as_rows, load_table
from train.devices.parallel import Given, Placed, Sharded
from train.devices.processes import check_same
from train.hub.origin import Origin, Shardings
from train.objectives import Objective
from train.update.initializers import redraw
from train.update.parameters import paths
from train.update.step import TrainState, start

log = logging.getLogger(__name__)

_HEAD = "head/"
"""The paths of what follows an encoder: its parameters are those of one task."""
_NAMED = 3


def given(
    experiment: Experiment,
    tokenizer: Tokenizer,
    *,
    labels: tuple[str, ...] = (),
    origin: Origin | None = None,
    shardings: Shardings | None = None,
) -> Given:
    """Reads the parameters that a run takes from files: word vectors, or those of another model.

    Args:
        experiment: the resolved experiment.
        tokenizer: its tokenizer, which names the rows of the embedding.
        labels: its labels, in the order of their ids.
        origin: the model to start from.
        shardings: returns the sharding of each array of a state; see `train.checkpoints.run.load`.

    Returns:
        Parameters by path; empty if the model is only drawn. Word vectors are on the host.

    Raises:
        ValueError: the model to start from is another one, or the word vectors have another size or cover no token.
    """
    found: dict[str, Any] = {}
    if experiment.word_vectors is not None:
        found |= _vectors(experiment, tokenizer, experiment.word_vectors, _shapes(experiment.model))
    if origin is not None:
        taken = check_origin(experiment, origin, labels)
        others = "" if taken.issuperset(_shapes(experiment.model)) else " but those of the head, which is drawn"
        log.warning("%s: all parameters start from its values%s", origin.name, others)
        arrays = _by_path(origin.load(shardings)).items()
        found |= {path: (array, None) for path, array in arrays if path in taken}
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
        # A copy: on a CPU, an array of JAX may share memory with one of NumPy.
        values = values if isinstance(values, jax.Array) else jnp.array(values)
        return values if rows is None else jnp.where(rows[:, None], values, drawn)

    graph, params, *others = nnx.split(model, nnx.Param, ...)
    return nnx.merge(graph, jax.tree.map(filled, params, paths(params)), *others)


def sharded(experiment: Experiment, placed: Placed) -> Shardings | None:
    """Where another model's state goes: over the mesh, or to the default device (None) if devices are replicas."""
    return placed.shardings if isinstance(experiment.parallel, Sharded) else None


def drawn(
    experiment: Experiment,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    placed: Placed,
    origin: Origin | None,
) -> TrainState:
    """Draws the state before the first update, or takes its parameters from a model; on a mesh in parts."""
    where = sharded(experiment, placed)
    found = given(experiment, objective.tokenizer, labels=objective.labels, origin=origin, shardings=where)

    def make(given: Given) -> TrainState:
        return start(fresh(experiment, given), optimizer, **run.starting(experiment))[1]

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
    experiment: Experiment, tokenizer: Tokenizer, file: Path, shapes: Mapping[str, Any]
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


def check_origin(experiment: Experiment, origin: Origin, labels: tuple[str, ...]) -> set[str]:
    """Checks that a run can start from a model, and returns the paths of the parameters that it takes.

    It takes all of them, or all but those of a head that differs, or whose labels do.

    Args:
        experiment: the resolved experiment.
        origin: the model to start from.
        labels: the labels of the run, in the order of their ids.

    Raises:
        ValueError: other parameters differ in path or shape, of which the message has the first; or a head is drawn
            that would not be trained, since the run trains adapters.
    """
    here, there = (
        {path: leaf.shape for path, leaf in _shapes(config).items()} for config in (experiment.model, origin.config)
    )
    sides = [{path: shape for path, shape in side.items() if not path.startswith(_HEAD)} for side in (here, there)]
    different = sorted(path for path, _ in sides[0].items() ^ sides[1].items())
    if names := list(dict.fromkeys(different)):
        described = (f"{path} is {_described(there, path)} there and {_described(here, path)} here" for path in names)
        more = f", and {len(names) - _NAMED} others differ" if len(names) > _NAMED else ""
        raise ValueError(
            f"--start-from: the model of {origin.name} is another one than that of the run: "
            f"{', '.join(list(described)[:_NAMED])}{more}"
        )
    taken = set(here if here == there and labels == origin.labels else sides[0])
    patterns = ("*",) if experiment.adapters is None else experiment.adapters.train
    if not all(any(fnmatchcase(path, pattern) for pattern in patterns) for path in here.keys() - taken):
        raise ValueError(
            f"--start-from: the head of {origin.name} is for another task or other labels, so it is drawn, and beside "
            'adapters it would stay so: give --adapters.train "head/*"'
        )
    return taken


def _described(shapes: Mapping[str, tuple[int, ...]], path: str) -> str:
    return str(list(shapes[path])) if path in shapes else "missing"


def _shapes(config: Model) -> dict[str, Any]:
    """The shape and dtype of each parameter of a model by its path."""
    return _by_path(nnx.eval_shape(lambda: run.build(config, seed=0)))


def _by_path(model: nnx.Module) -> dict[str, Any]:
    params = nnx.state(model, nnx.Param)
    return dict(zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True))
