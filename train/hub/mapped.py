"""Arrays of a safetensors file as views of the file, which take no memory of the process."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import safetensors

_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    **{
        f"{kind}{bits}": f"{name}{bits}" for kind, name in {"I": "int", "U": "uint"}.items() for bits in (8, 16, 32, 64)
    },
    "BOOL": np.bool_,
}


class Mapped(Mapping[str, np.ndarray]):
    """The arrays of a file by name. Each is mapped into memory when it is asked for, until its last view is gone.

    Args:
        path: the file. It must not change while a view exists.

    Raises:
        ValueError: the file is damaged, or no safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # safetensors checks the header: sizes fit dtypes and shapes, and arrays fill the file.
            with safetensors.safe_open(path, framework="np"):
                pass
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            self._header = json.loads(file.read(size))
        self._header.pop("__metadata__", None)
        self._start = 8 + size

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a view of the file, which cannot be written to.

        Raises:
            ValueError: NumPy has no such dtype.
        """
        entry = self._header[name]
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"{self._path}: {name} has the dtype {entry['dtype']}; known are {', '.join(_DTYPES)}")
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        if not math.prod(shape):
            return np.empty(shape, dtype)  # nothing cannot be mapped
        offset = self._start + entry["data_offsets"][0]
        return np.asarray(np.memmap(self._path, dtype, "r", offset, shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._header)

    def __len__(self) -> int:
        return len(self._header)
