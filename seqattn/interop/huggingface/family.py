"""A family of models of transformers: how its configs and arrays become ours."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from seqattn.interop.huggingface.fields import Fields
from seqattn.interop.huggingface.layouts import SAME, Layout, Transposed
from seqattn.interop.saved import ModelConfig

Path = str
"""The dotted path of one of our parameters, such as `encoder.0.attention.query.kernel`."""


@dataclasses.dataclass(frozen=True)
class Parameter:
    """An array of a checkpoint and the parameters of ours that it holds.

    Attributes:
        name: the name of the array.
        paths: our parameters.
        layout: the relation between both.
    """

    name: str
    paths: tuple[Path, ...]
    layout: Layout = SAME


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models, by the `model_type` of its `config.json`.

    Attributes:
        model_type: the name of the family.
        kind: the class of our configs.
        defaults: the values of missing fields that `read` asks for.
        read: returns our config for the fields of a `config.json`.
        write: returns the fields for one of our configs, the inverse of `read`. It may return the fields of another
            config where ours cannot be expressed; `to_huggingface` notices.
        parameters: yields all arrays of a checkpoint with one of our configs.
        same: for names that a checkpoint may also give to an array, its name in `parameters`. Both must be equal.
        untied: name of an array of logits that a checkpoint may have although its config says that logits are tied.
            If it differs from the table of tokens, they are not.
        zeros: names in `parameters` that a checkpoint may lack. Their values are then 0.
        ignored: patterns of names that hold no parameters, such as sinusoids. `*` matches any characters.
        prefix: what all names but those of a head begin with, and what checkpoints of a bare model leave out.
        architecture: returns the class of transformers for one of our configs.
    """

    model_type: str
    kind: type
    defaults: Mapping[str, Any]
    read: Callable[[Fields], ModelConfig]
    write: Callable[[Any], dict[str, Any]]
    parameters: Callable[[Any], Iterable[Parameter]]
    same: Callable[[Any], Mapping[str, str]] = lambda config: {}
    untied: str = ""
    zeros: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    prefix: str = ""
    architecture: Callable[[Any], str] = lambda config: ""


def linear(theirs: str, ours: Path, *, bias: bool = True) -> Iterator[Parameter]:
    """Yields the arrays of a linear layer of PyTorch."""
    yield Parameter(f"{theirs}.weight", (f"{ours}.kernel",), Transposed())
    if bias:
        yield Parameter(f"{theirs}.bias", (f"{ours}.bias",))


def norm(theirs: str, ours: Path, *, bias: bool = True, layout: Layout = SAME) -> Iterator[Parameter]:
    """Yields the arrays of a norm. `layout` is that of its gain."""
    yield Parameter(f"{theirs}.weight", (f"{ours}.scale",), layout)
    if bias:
        yield Parameter(f"{theirs}.bias", (f"{ours}.bias",))
