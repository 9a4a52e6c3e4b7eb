"""Rules about parameters: how devices split them, whether weight decay applies, and which axis holds the outputs.

Each file that defines modules with parameters states its rules in `RULES`; `seqattn.models.parameter_rules` collects
them. Rules match paths, because a tree of parameters or of optimizer state no longer has modules.
"""

import dataclasses
import enum

from jax.sharding import PartitionSpec as P

INTO, OUT_OF = P("fsdp", "tensor"), P("tensor", "fsdp")
"""Splits of a kernel `[in, out]`: INTO parts of its outputs, and OUT_OF parts of its inputs, which it sums."""


class Kind(enum.Enum):
    """How an optimizer treats a parameter."""

    VECTOR = "vector"
    """A bias or a gain, or a stack of them. No weight decay."""
    MATRIX = "matrix"
    """Maps hidden vectors to hidden vectors, or a stack of such matrices. Weight decay; Muon orthogonalises it."""
    TABLE = "table"
    """Vectors looked up by index: tokens, positions, distances. Weight decay."""
    LOGITS = "logits"
    """A matrix whose outputs are logits. Weight decay."""
    STATISTIC = "statistic"
    """Measured in training, not learned. No optimizer update and no weight decay."""


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """Rule for the parameters whose paths match a pattern.

    Attributes:
        glob: pattern for whole paths such as "encoder/0/attention/query/kernel". `*` matches any characters, including
            "/".
        kind: how an optimizer treats the parameter.
        split: mesh axes of the leading dimensions; further dimensions are not split. `fsdp` splits a parameter to save
            memory, `tensor` splits the computation with it, and `expert` splits the experts of a mixture.
        outputs: axis of the outputs: -1 for `[in, out]`, and -2 for `[out, in]` and for tables `[V, D]`, whose rows
            give logits.
    """

    glob: str
    kind: Kind
    split: P = P()
    outputs: int = -1
