"""The model that a run begins with: drawn from the seed, then filled with what was learned elsewhere."""

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
    """The model of a resolved experiment before its first update.

    Raises:
        ValueError: nothing of the run to start from fits, or word vectors of another size or of no token.
    """
    model: Any = run.build(experiment.model, seed=experiment.seed)
    if experiment.initializer is not None:
        model = redraw(model, experiment.initializer, seed=experiment.seed)
    if experiment.word_vectors is not None:
        _put_vectors(model, experiment.word_vectors, tokenizer)
    return model if experiment.start_from is None else _filled(model, experiment.start_from)


def _put_vectors(model: Any, file: Path, tokenizer: Tokenizer) -> None:
    # A token of byte-level BPE that begins a word is shown with the space before it.
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
    """The model with the parameters of the run in a folder, where path and shape are the same."""
    params = nnx.state(model, nnx.Param)
    given = dict(nnx.to_flat_state(nnx.state(run.load(folder, average=1).model, nnx.Param)))
    flat, taken = [], 0
    for path, leaf in list(nnx.to_flat_state(params)):
        fits = path in given and given[path].shape == leaf.shape
        flat.append((path, given[path] if fits else leaf))
        taken += fits
    if not taken:
        raise ValueError(f"--start-from: no parameter of {folder} has a path and shape of this model")
    log.warning("%s: %d of %d parameters begin with its values", folder, taken, len(flat))
    nnx.update(model, nnx.from_flat_state(flat))
    return model
