"""The initial model of a run: drawn from the seed, then filled with pre-trained word vectors or parameters."""

import logging
from pathlib import Path
from typing import Any

from flax import nnx

from seqattn.models import Captioner, Transformer
from train.checkpoints import run
from train.config import Experiment
from train.data.tokenizer import Tokenizer
from train.data.word_vectors import load_table, put_vectors
from train.update.initializers import redraw

log = logging.getLogger(__name__)


def fresh(experiment: Experiment, tokenizer: Tokenizer) -> nnx.Module:
    """Builds the model of a resolved experiment before its first update.

    Args:
        experiment: the resolved experiment.
        tokenizer: its tokenizer, which names the rows of the embedding.

    Returns:
        The model, on the default device.

    Raises:
        ValueError: no parameter of `start_from` fits, or the word vectors have another size or cover no token.
    """
    # Redrawing comes first: it would overwrite word vectors.
    model: Any = run.build(experiment.model, seed=experiment.seed)
    if experiment.initializer is not None:
        model = redraw(model, experiment.initializer, seed=experiment.seed)
    if experiment.word_vectors is not None:
        _put_vectors(model, experiment.word_vectors, tokenizer)
    return model if experiment.start_from is None else _filled(model, experiment.start_from)


def _put_vectors(model: Any, file: Path, tokenizer: Tokenizer) -> None:
    # A token of byte-level BPE at the start of a word includes the space before it, which files of vectors lack.
    tokens = [token.removeprefix("␣") or token for token in tokenizer.tokens(list(range(tokenizer.vocab_size)))]
    words = model.decoder if isinstance(model, Captioner) else model
    table, found = load_table(file, tokens, words.embedding.table.shape[1])
    if not found.any():
        raise ValueError(f"--word-vectors: {file} has a vector for none of the {len(tokens)} tokens")
    put_vectors(words.embedding, table, found)
    if isinstance(words, Transformer) and words.source_embedding is not None:
        put_vectors(words.source_embedding, table, found)
    log.warning("%s: vectors of %d of %d tokens", file, found.sum(), len(tokens))


def _filled(model: nnx.Module, folder: Path) -> nnx.Module:
    """Copies the parameters of a run into a model wherever path and shape are equal."""
    params = nnx.state(model, nnx.Param)
    given = dict(nnx.to_flat_state(nnx.state(run.load(folder, average=1).model, nnx.Param)))
    flat, taken = [], 0
    # Other parameters keep their initial values: a new head or a larger vocabulary is the reason to start elsewhere.
    for path, leaf in list(nnx.to_flat_state(params)):
        fits = path in given and given[path].shape == leaf.shape
        flat.append((path, given[path] if fits else leaf))
        taken += fits
    # Nothing in common is a mistake in the command, not a choice.
    if not taken:
        raise ValueError(f"--start-from: no parameter of {folder} has a path and shape of this model")
    log.warning("%s: %d of %d parameters start from its values", folder, taken, len(flat))
    nnx.update(model, nnx.from_flat_state(flat))
    return model
