"""Settings of optimizers and schedules: each number follows the rule of its name."""

from typing import Any

from seqattn.checks import check_number


class Checked:
    """Settings of which each number follows the rule of its name."""

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            if hasattr(self, name):
                check_number(name, getattr(self, name), **limits)


_LIMITS: dict[str, dict[str, Any]] = {
    name: limits
    for names, limits in (
        (("rate", "peak", "factor", "weight_decay", "initial", "warmup_steps"), {"minimum": 0}),
        (("beta1", "beta2", "momentum"), {"minimum": 0, "below": 1}),
        (("epsilon", "root_mean_square"), {"above": 0}),
        (("final",), {"minimum": 0, "maximum": 1}),
        (("model_dim", "every"), {"minimum": 1}),
    )
    for name in names
}
"""What a number must be, by its name."""
