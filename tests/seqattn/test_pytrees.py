"""Dataclasses as pytrees: what is a leaf, what is static, and that no type is taken for another."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

import seqattn
from seqattn import Causal, NotPadding, SameSegment
from seqattn.decoding import MinP, Temperature
from seqattn.pytrees import pytree, static


def _kind(name: str) -> type:
    fields = [("x", float), ("size", int, static(default=2))]
    return pytree(dataclasses.make_dataclass(name, fields, frozen=True))


def test_fields_are_leaves_and_static_fields_structure():
    kind = _kind("Kind")
    node = kind(np.float32(3), size=5)
    leaves, structure = jax.tree.flatten(node)
    assert leaves == [3]
    assert jax.tree.unflatten(structure, leaves) == node
    assert structure != jax.tree.structure(kind(np.float32(3), size=6))
    assert [str(path[0]) for path, _ in jax.tree_util.tree_leaves_with_path(node)] == [".x"]


def test_types_of_the_same_fields_have_other_structures():
    """That `jax.tree_util.register_dataclass` makes them equal is why `pytree` exists."""
    assert jax.tree.structure(_kind("A")(1.0)) != jax.tree.structure(_kind("B")(1.0))
    assert jax.tree.structure(_kind("A")(1.0)) != jax.tree.structure(_kind("A")(1.0)), "one of each"


def test_a_compiled_function_never_takes_one_type_for_another():
    kinds = [_kind(f"Kind{i}") for i in range(200)]
    number = {kind: i for i, kind in enumerate(kinds)}
    read = jax.jit(lambda node: node.x + number[type(node)])
    for i, kind in enumerate(kinds):
        assert read(kind(np.float32(0.5))) == i + 0.5


def test_masks_and_filters_of_the_same_fields_have_other_structures():
    for first, second in [(Causal(), SameSegment()), (Causal(), NotPadding()), (MinP(1), Temperature(1))]:
        assert jax.tree.structure(first) != jax.tree.structure(second)


def test_no_file_registers_its_dataclasses_otherwise():
    folder = Path(seqattn.__file__).parent
    files = [*folder.rglob("*.py"), *(folder.parent / "train").rglob("*.py")]
    assert len(files) > 50
    assert [path.name for path in files if "@jax.tree_util.register_dataclass" in path.read_text()] == []
