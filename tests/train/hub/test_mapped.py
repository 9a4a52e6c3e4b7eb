"""Arrays of a safetensors file, as views of it."""

import gc
import json
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from train.hub.mapped import Mapped

DTYPES = ("float64", "float32", "float16", "bfloat16", "int8", "uint8", "int16", "uint32", "int64", "bool")


def test_values_are_those_that_safetensors_reads(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {name: (9 * rng.normal(size=(3, 5))).astype(jnp.dtype(name)) for name in DTYPES}
    arrays |= {"number": np.array(2.5, np.float32), "nothing": np.zeros((3, 0), np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "a", metadata={"format": "pt"})
    mapped, read = Mapped(tmp_path / "a"), safetensors.numpy.load_file(tmp_path / "a")
    assert set(mapped) == set(read) == set(arrays)
    assert len(mapped) == len(arrays)
    for name, x in read.items():
        assert (mapped[name].dtype, mapped[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(mapped[name], x)


def test_an_array_is_the_file_and_is_unmapped_when_it_is_gone(tmp_path):
    safetensors.numpy.save_file({"x": np.ones((3, 5), np.float32)}, tmp_path / "a")
    array = Mapped(tmp_path / "a")["x"]
    assert not array.flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    file = array
    while not isinstance(file, np.memmap):
        file = file.base
    alive = weakref.ref(file._mmap)
    del array, file
    gc.collect()
    assert alive() is None


def stored(path: Path, dtype: str) -> Path:
    header = json.dumps({"x": {"dtype": dtype, "shape": [8], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return path


def test_a_dtype_that_numpy_lacks_is_refused_with_the_name_of_the_array(tmp_path):
    assert Mapped(stored(tmp_path / "a", "I8"))["x"].tolist() == [0] * 8
    with pytest.raises(ValueError, match=r"b: x has the dtype F8_E4M3; known are F64, F32"):
        Mapped(stored(tmp_path / "b", "F8_E4M3"))["x"]
