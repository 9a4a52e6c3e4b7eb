"""Models as JSON values and named arrays, and conversion from and to other libraries. Opens no files."""

from seqattn.interop.pytorch import recurrent_from_torch
from seqattn.interop.saved import ModelConfig, from_arrays, from_dict, model_type, to_arrays, to_dict

__all__ = [
    "ModelConfig",
    "from_arrays",
    "from_dict",
    "model_type",
    "recurrent_from_torch",
    "to_arrays",
    "to_dict",
]
