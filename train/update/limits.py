"""Allowed ranges for the settings of optimizers and schedules, by the name of the setting."""

from typing import Any

from seqattn.checks import check_number


class Checked:
    """A base class for dataclasses of settings: checks every number against the range of its name.

    Raises:
        ValueError: a number is out of its range; the message names both.
    """

    def __post_init__(self) -> None:
        # One table for all classes: `beta1` has the same range in Adam, AdamW and Muon, and the same message.
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
"""Arguments of `check_number` by the name of the setting; bounds are inclusive except `above` and `below`."""
