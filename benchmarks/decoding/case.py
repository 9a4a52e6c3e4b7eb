"""One benchmark case of decoding."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks.bench.marian import END, Sizes


@dataclass(frozen=True)
class DecodingCase:
    """Sources, and how their targets are searched."""

    sizes: Sizes
    batch: int
    beam_size: int
    """1 is greedy."""
    length: int
    """Number of tokens of each target."""

    @property
    def name(self) -> str:
        """For example "64 sources, beam 4"."""
        sources = "1 source" if self.batch == 1 else f"{self.batch} sources"
        return f"{sources}, {f'beam {self.beam_size}' if self.beam_size > 1 else 'greedy'}"

    @property
    def tokens(self) -> int:
        """Number of tokens that a call returns, counting only the best hypotheses."""
        return self.batch * self.length

    def fields(self) -> dict[str, Any]:
        """Returns the sizes of the model, the search and the targets."""
        search = {"batch": self.batch, "beam_size": self.beam_size, "length": self.length}
        return asdict(self.sizes) | search | {"dtype": "float32"}

    def sources(self) -> np.ndarray:
        """Returns `[B, S]` int32 random tokens that finish with the end token; the same in every process."""
        shape = (self.batch, self.sizes.source_length)
        source = np.random.default_rng(shape).integers(END + 1, self.sizes.pad_token, shape, dtype=np.int32)
        source[:, -1] = END
        return source
