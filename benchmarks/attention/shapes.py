"""The benchmarked shapes, each with its origin."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The sizes of one attention call: queries `[B, T, N, D]`, keys and values `[B, S, K, D]`."""

    name: str
    batch: int
    length: int
    num_heads: int
    head_dim: int
    origin: str
    num_kv_heads: int = 0
    """0 means the number of query heads."""
    num_keys: int = 0
    """0 means the number of queries."""

    def __post_init__(self) -> None:
        if min(self.batch, self.length, self.size, self.num_heads, self.head_dim, self.kv_heads) < 1:
            raise ValueError(f"shape {self.name}: all sizes must be at least 1")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"shape {self.name}: {self.num_heads} heads are no multiple of {self.kv_heads} key heads")

    @property
    def size(self) -> int:
        """S, the number of keys."""
        return self.num_keys or self.length

    @property
    def kv_heads(self) -> int:
        """K, the number of key heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def query(self) -> tuple[int, int, int, int]:
        """`[B, T, N, D]`."""
        return self.batch, self.length, self.num_heads, self.head_dim

    @property
    def key(self) -> tuple[int, int, int, int]:
        """`[B, S, K, D]`."""
        return self.batch, self.size, self.kv_heads, self.head_dim


_TARGETS = "the acceptance cases on a CPU"
_LONG = "linear growth of memory with the length"
_FLASH_3 = "FlashAttention-3, section 4.1: 16k tokens, model dim 2048 (arXiv 2407.08608)"
_HOPPER = "the table of one Hopper GPU (benchmarks/on_gpu.sh)"
_FLEX = "FlexAttention's own benchmark: attention-gym, examples/benchmark.py"
_MULTI30K = "Multi30k: 4 heads, model dim 128, some 8,000 tokens a batch (arXiv 2105.14462)"
_TRANSFORMER = (
    "Transformer base: 8 heads, model dim 512, 25,000 tokens a batch (arXiv 1706.03762, sections 3.2.2 and 5.1)"
)

_ALL = [
    Shape("cpu-t4096", 1, 4096, 8, 64, _TARGETS),
    Shape("cpu-t2048", 1, 2048, 8, 64, _TARGETS),
    Shape("cpu-t512", 4, 512, 8, 64, _TARGETS),
    Shape("cpu-t64", 32, 64, 8, 64, _TARGETS),
    *(Shape(f"long-t{length}", 1, length, 8, 64, _LONG) for length in (8192, 16384, 32768)),
    *(
        Shape(f"fa3-t{length}-d{head_dim}", 16384 // length, length, 2048 // head_dim, head_dim, _FLASH_3)
        for head_dim in (64, 128, 256)
        for length in (512, 1024, 2048, 4096, 8192, 16384)
    ),
    Shape("hopper-t8192", 1, 8192, 8, 128, _HOPPER),
    Shape("flex-t8192", 16, 8192, 16, 64, _FLEX),
    Shape("flex-t32768", 16, 32768, 16, 64, f"{_FLEX}, of documents"),
    Shape(
        "llama3-8b", 1, 8192, 32, 128, "Llama 3 8B, trained on 8k tokens (arXiv 2407.21783, table 3)", num_kv_heads=8
    ),
    Shape(
        "gemma2-9b", 1, 8192, 16, 256, "Gemma 2 9B, trained on 8k tokens (arXiv 2408.00118, table 1)", num_kv_heads=8
    ),
    Shape("gpt2-small", 8, 1024, 12, 64, "GPT-2, 117M parameters (Radford 2019, table 2: 12 layers, model dim 768)"),
    Shape("bert-base", 8, 512, 12, 64, "BERT base, 512 tokens (arXiv 1810.04805, section 3 and appendix A.2)"),
    Shape("transformer-base", 384, 64, 8, 64, _TRANSFORMER),
    Shape("decode", 1, 1, 8, 64, "one new token against a cache of 4,096 keys", num_keys=4096),
    Shape("multi30k-target", 256, 32, 4, 32, _MULTI30K),
    Shape("multi30k-memory", 256, 32, 4, 32, _MULTI30K + ", decoder to encoder", num_keys=28),
]

SHAPES = {shape.name: shape for shape in _ALL}

GROUPS = {
    "acceptance": ("cpu-t4096", "cpu-t2048", "cpu-t512", "cpu-t64"),
    "long": tuple(name for name in SHAPES if name.startswith("long-")),
    "fa3": tuple(name for name in SHAPES if name.startswith("fa3-")),
    "flex": tuple(name for name in SHAPES if name.startswith("flex-")),
    "gpu": tuple(f"fa3-t{length}-d{head_dim}" for head_dim in (64, 128) for length in (1024, 4096, 16384)),
    "models": ("llama3-8b", "gemma2-9b", "gpt2-small", "bert-base"),
    "seq2seq": ("transformer-base", "multi30k-target", "multi30k-memory"),
}
"""Names that `--shapes` takes besides single shapes."""

_LITERAL = re.compile(r"b(\d+)-t(\d+)(?:-s(\d+))?-n(\d+)(?:-k(\d+))?-d(\d+)")


def named(name: str) -> list[Shape]:
    """Returns the shapes of a name: a group, one shape, or sizes such as "b1-t512-s512-n8-k2-d64".

    >>> [shape.length for shape in named("long")]
    [8192, 16384, 32768]
    >>> named("b2-t64-n4-d32")[0].query
    (2, 64, 4, 32)
    """
    if name in GROUPS:
        return [SHAPES[member] for member in GROUPS[name]]
    if name in SHAPES:
        return [SHAPES[name]]
    sizes = _LITERAL.fullmatch(name)
    if not sizes:
        raise ValueError(f"no shape {name!r}: give {', '.join([*GROUPS, *SHAPES])}, or sizes such as b2-t64-n4-d32")
    batch, length, num_keys, num_heads, num_kv_heads, head_dim = (int(size or 0) for size in sizes.groups())
    return [Shape(name, batch, length, num_heads, head_dim, "the command line", num_kv_heads, num_keys)]
