"""Models of Hugging Face transformers: configs as fields and parameters as named arrays, in both directions.

`families.py` lists what can be converted. Each family is one file: its fields, the names of its arrays, their layouts.
"""

from seqattn.interop.huggingface.convert import from_huggingface, huggingface_config, to_huggingface
from seqattn.interop.huggingface.family import Family, Parameter
from seqattn.interop.huggingface.fields import Fields

__all__ = [
    "Family",
    "Fields",
    "Parameter",
    "from_huggingface",
    "huggingface_config",
    "to_huggingface",
]
