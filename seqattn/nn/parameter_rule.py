"""What is known of a parameter beside its numbers: how devices split it, whether it decays, which axis has its outputs.

Each file of modules that have parameters says it in its `RULES`; `seqattn.models.parameter_rules` has them all. The
rules are about paths, since a tree of parameters, or of what an optimizer keeps of them, has no modules any more.
"""

import dataclasses
import enum

from jax.sharding import PartitionSpec as P

INTO, OUT_OF = P("fsdp", "tensor"), P("tensor", "fsdp")
"""How a kernel `[in, out]` is split whose outputs are computed in parts, and one that brings parts together again."""


class Kind(enum.Enum):
    """What a parameter is to an optimizer."""

    VECTOR = "vector"
    """A bias or a gain, also where several are stacked: it does not decay."""
    MATRIX = "matrix"
    """It maps hidden vectors to hidden vectors, or a stack of such: it decays, and Muon orthogonalises it."""
    TABLE = "table"
    """Vectors by a number: tokens, positions, distances. It decays."""
    LOGITS = "logits"
    """A matrix whose outputs are logits. It decays."""
    STATISTIC = "statistic"
    """Measured in training: no optimizer moves it, and it does not decay."""


@dataclasses.dataclass(frozen=True)
class ParameterRule:
    """What is known of the parameters of some paths.

    Attributes:
        glob: of whole paths, such as "encoder/0/attention/query/kernel", in which `*` stands for any characters, "/"
            too.
        kind: what it is to an optimizer.
        split: the mesh axes of each dim, from the first one on; dims beyond it are not split. `fsdp` splits a parameter
            to save memory, `tensor` for what is computed with it, and `expert` by the experts of a mixture.
        outputs: the axis of the outputs: -1 for `[in, out]`, -2 for `[out, in]` and for tables `[V, D]`, as if their
            rows made logits.
    """

    glob: str
    kind: Kind
    split: P = P()
    outputs: int = -1
