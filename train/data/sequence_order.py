"""The order of tokens in a batch whose texts are split over devices: causal attention is even work in it."""

import numpy as np

from seqattn import zigzag
from train.data.batches import Batch


def zigzagged(batch: Batch, devices: int) -> Batch:
    """Returns a batch of source and target texts with the targets in the order of `seqattn.zigzag`.

    A causal mask gives the last tokens of a text the most work, so parts of equal length are uneven. Coordinates tell
    where each token is, in any order. Inputs and labels are therefore spelled out, as in a packed batch. Sources keep
    their order: a token of an encoder sees all others.

    Args:
        batch: `source` and `target` with their lengths, or a packed batch. Lengths are multiples of `2 * devices`.
        devices: the number of parts of a text.

    Returns:
        A batch with the arrays of a packed one.

    >>> batch = {"source": np.ones((1, 4), np.int32), "source_length": np.array([3]),
    ...          "target": np.array([[1, 6, 7, 8]]), "target_length": np.array([4])}
    >>> ordered = zigzagged(batch, devices=2)
    >>> {name: ordered[name][0].tolist() for name in ("target", "label", "target_position", "target_segment")}
    {'target': [1, 0, 6, 7], 'label': [6, 0, 7, 8], 'target_position': [0, 3, 1, 2], 'target_segment': [1, 0, 1, 1]}
    """
    packed = batch if "label" in batch else _spelled_out(batch)
    order, _ = zigzag(packed["target"].shape[1], devices)
    moved = ("target", "label", "target_position", "target_segment")
    return {name: array[:, order] if name in moved else array for name, array in packed.items()}


def _spelled_out(batch: Batch) -> Batch:
    """Returns the arrays of a packed batch for one text in each row."""
    target = batch["target"]
    # A label is the token after its input. The last place has none: it is padding, which keeps the length divisible.
    inputs, labels = np.zeros_like(target), np.zeros_like(target)
    inputs[:, :-1], labels[:, :-1] = target[:, :-1], target[:, 1:]
    packed = {"source": batch["source"], "target": inputs, "label": labels}
    for side, lengths in (("source", batch["source_length"]), ("target", batch["target_length"] - 1)):
        position = np.arange(batch[side].shape[1], dtype=np.int32)[None]
        packed[f"{side}_position"] = np.broadcast_to(position, batch[side].shape)
        packed[f"{side}_segment"] = (position < lengths[:, None]).astype(np.int32)
    return packed
