"""The result of one implementation of attention on one case."""

from dataclasses import dataclass
from typing import Any

from benchmarks.attention.case import AttentionCase
from benchmarks.attention.exact import Error
from benchmarks.attention.product import ProductRate
from benchmarks.bench.record import Record
from benchmarks.bench.timing import Times


@dataclass(frozen=True, kw_only=True)
class AttentionRecord(Record):
    """A record with the error, the form of the mask, and speeds."""

    case: AttentionCase
    how: str = ""
    error: Error | None = None
    product: ProductRate | None = None
    baseline: str = ""
    baseline_times: Times | None = None

    @property
    def speed(self) -> float | None:
        """Speed relative to the baseline, by the medians."""
        return self.speed_by(self.baseline_times)

    @property
    def flops(self) -> float | None:
        """Useful floating-point operations per second."""
        return self.case.flops / self.times.median if self.times else None

    @property
    def product_share(self) -> float | None:
        """Useful operations per second, relative to the matrix product."""
        return self.flops / self.product.flops if self.flops and self.product else None

    def own_fields(self) -> dict[str, Any]:
        """Returns speeds and errors, in base units."""
        return {
            "mask_as": self.how,
            "baseline": self.baseline,
            "speed": self.speed,
            "flop_per_second": self.flops,
            "product_size": self.product.size if self.product else None,
            "product_flop_per_second": self.product.flops if self.product else None,
            "product_share": self.product_share,
            "largest_error": self.error.largest if self.error else None,
            "relative_error": self.error.relative if self.error else None,
        }
