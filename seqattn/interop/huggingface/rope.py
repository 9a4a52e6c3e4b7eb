"""Rotations in the fields of decoder-only families: `rope_parameters` of transformers 5, and the older fields."""

from collections.abc import Mapping
from typing import Any

from seqattn.checks import check_integer, check_number
from seqattn.interop.codec import shown
from seqattn.interop.huggingface.fields import Fields
from seqattn.nn.rotary import LinearScaling, Llama3Scaling, Rotary, RotaryScaling, YarnScaling

DEFAULTS: Mapping[str, Any] = {
    "rope_parameters": None,
    "rope_scaling": None,
    "rope_theta": 10_000.0,
    "partial_rotary_factor": 1.0,
    "max_position_embeddings": 2048,
}


def read_rotary(fields: Fields) -> Rotary:
    """Reads the rotation of queries and keys.

    Raises:
        NotImplementedError: the kind of scaling is one that we lack, such as `dynamic`, whose frequencies change with
            the length of the text.
    """
    # The older field replaces the newer one, as in transformers 5. Both may hold what is a field of its own in others.
    older, newer = fields["rope_scaling"], fields["rope_parameters"]
    given = older or newer or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_scaling and rope_parameters must be objects, got {shown(given)}")
    values = {name: fields[name] for name in ("rope_theta", "partial_rotary_factor")} | dict(given)
    base, fraction = values.pop("rope_theta"), values.pop("partial_rotary_factor")
    check_number("rope_theta", base, above=0)
    if fraction not in (None, 1):
        # These families rotate whole heads in transformers, some of them whatever this field says.
        raise NotImplementedError(f"partial_rotary_factor must be 1, got {shown(fraction)}")
    return Rotary(float(base), _scaling(values, fields.size("max_position_embeddings")))


def _scaling(values: dict[str, Any], longest: int) -> RotaryScaling | None:
    kind = values.pop("rope_type", values.pop("type", "default"))
    values.pop("type", None)

    def number(name: str, default: float | None = None) -> float:
        given = values.pop(name, None)
        value: Any = default if given is None else given
        check_number(name, value)
        return float(value)

    def length() -> int:
        value = values.pop("original_max_position_embeddings", None)
        value = longest if value is None else value
        check_integer("original_max_position_embeddings", value, 1)
        return int(value)

    made: RotaryScaling | None = None
    if kind == "linear":
        made = LinearScaling(number("factor"))
    elif kind == "llama3":
        made = Llama3Scaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), length())
    elif kind == "yarn":
        attention = values.pop("attention_factor", None)
        made = YarnScaling(number("factor"), length(), number("beta_slow", 1.0), number("beta_fast", 32.0), attention)
    elif kind != "default":
        raise NotImplementedError(f"rope_type must be default, linear, llama3 or yarn, got {shown(kind)}")
    for name, value in sorted(values.items()):
        # A factor beside the default kind has no effect; any other field would.
        if value is not None and not (kind == "default" and name in ("factor", "original_max_position_embeddings")):
            raise NotImplementedError(f"{name} ({shown(value)}) of {kind} rotations is unknown")
    return made


def write_rotary(rotary: Rotary) -> dict[str, Any]:
    """Returns `rope_parameters` for a rotation."""
    values: dict[str, Any] = {"rope_theta": rotary.base, "rope_type": "default"}
    scaling = rotary.scaling
    if isinstance(scaling, LinearScaling):
        values |= {"rope_type": "linear", "factor": scaling.factor}
    elif isinstance(scaling, Llama3Scaling):
        values |= {"rope_type": "llama3", "factor": scaling.factor, "low_freq_factor": scaling.low}
        values |= {"high_freq_factor": scaling.high, "original_max_position_embeddings": scaling.original_length}
    elif isinstance(scaling, YarnScaling):
        values |= {"rope_type": "yarn", "factor": scaling.factor, "beta_slow": scaling.slow, "beta_fast": scaling.fast}
        values |= {"original_max_position_embeddings": scaling.original_length}
        values |= {} if scaling.attention_factor is None else {"attention_factor": scaling.attention_factor}
    return {"rope_parameters": values}
