"""Pictures of attention weights: one for the mean over heads, and one with all heads."""

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from seqattn import Coordinates
from seqattn.models import Encoder, EncoderDecoder
from train.data.batches import collate
from train.data.tokenizer import Tokenizer
from train.devices.layout import fetch
from train.inference.translator import FAILED, Translator
from train.reports.plots import attention_map

_DRAWN, _LETTERS = 2, 40


def draw_heads(model: Encoder, tokenizer: Tokenizer, texts: Sequence[str], folder: Path) -> list[Path]:
    """Draws the self-attention of the first two texts in every head of every layer; returns the paths."""
    paths: list[Path] = []
    for number, text in enumerate(texts[:_DRAWN], 1):
        shown = text.strip()[:_LETTERS]
        ids = tokenizer.encode(shown)
        if not ids:
            continue
        heads = fetch(_attention(model, jnp.asarray([ids], jnp.int32)))[0]
        folder.mkdir(parents=True, exist_ok=True)
        names = tokenizer.tokens(ids)
        paths += attention_map(heads, names, names, folder / f"{number}-heads", title=shown)
    return paths


def draw_texts(model: EncoderDecoder, tokenizer: Tokenizer, texts: Sequence[str], folder: Path) -> list[Path]:
    """Draws the attention to each text while the model writes its output; returns the paths."""
    paths: list[Path] = []
    outputs = Translator(model, tokenizer)(texts)
    for number, (text, output) in enumerate(zip(texts, outputs, strict=True), 1):
        paths += draw_attention(model, tokenizer, text, output, folder / str(number))
    return paths


def draw_attention(
    model: EncoderDecoder, tokenizer: Tokenizer, source: str, output: str, path_stem: Path
) -> list[Path]:
    """Draws the attention of each token of `output` to `source`: the mean over heads, and all heads.

    Returns:
        The paths of the pictures. There are none if the model has no attention, the source is empty or decoding failed.
    """
    ids = tokenizer.sources([source])[0]
    room = model.room(len(ids))
    # An output that fills all learned positions has no place left for its end token.
    target = tokenizer.targets([output])[0][: None if room is None else room + 1]
    if output == FAILED or ids == tokenizer.sources([""])[0]:
        return []
    return _draw(model, tokenizer, ids, target, path_stem, f"{source} → {output}")


def draw_reading(model: EncoderDecoder, tokenizer: Tokenizer, before: str, after: str, path_stem: Path) -> list[Path]:
    """Draws the attention of a language model to the text `before` while it reads `after`; returns the paths."""
    ids, target = tokenizer.prompts([before])[0], [*tokenizer.encode(after), tokenizer.end_id]
    # With its end token the text may need one position more than in training.
    room = model.room(len(ids))
    target = target[: None if room is None else max(0, room + 1)]
    return _draw(model, tokenizer, ids, target, path_stem, f"{before} → {after}") if len(target) > 1 else []


def _draw(
    model: EncoderDecoder, tokenizer: Tokenizer, ids: list[int], target: list[int], path_stem: Path, title: str
) -> list[Path]:
    batch = collate([(ids, target)])
    heads = fetch(_alignment(model, jnp.asarray(batch["source"]), jnp.asarray(batch["target"][:, :-1])))[0]
    if not len(heads):
        return []
    path_stem.parent.mkdir(parents=True, exist_ok=True)
    labels = (tokenizer.tokens(ids), tokenizer.tokens(target[1:]))
    paths = [*attention_map(heads.mean(axis=0), *labels, path_stem, title=title)]
    if len(heads) > 1:
        each = path_stem.with_name(f"{path_stem.name}-heads")
        paths += attention_map(heads, *labels, each, title=f"every head: {title}")
    return paths


# One program for each shape. Run one by one, the operations of a small model would be compiled for minutes.
@nnx.jit
def _alignment(model: EncoderDecoder, source: Int[Array, "1 S"], inputs: Int[Array, "1 T"]) -> Float[Array, "1 N T S"]:
    """Returns the attention of each target token to the source."""
    memory = model.encode(source, _whole(source))
    return model.alignment(inputs, _whole(inputs), memory)


@nnx.jit
def _attention(model: Encoder, text: Int[Array, "1 T"]) -> Float[Array, "1 N T T"]:
    """Returns the self-attention of all heads."""
    return model.attention(text, _whole(text))


def _whole(text: Int[Array, "1 T"]) -> Coordinates:
    """Returns the coordinates of one text without padding."""
    return Coordinates.from_lengths([text.shape[1]], text.shape[1])
