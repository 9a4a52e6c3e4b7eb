"""Counts the bytes that a compiled program reads and writes, from its text.

Each instruction reads its operands and writes its results once. What a fusion computes inside stays in registers. A
slice of an array counts as the slice, and an update in place as the update. A call of a kernel has no body, so it says
nothing of how often it reads an operand: `benchmarks.compile.pipelines` counts kernels for TPUs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from benchmarks.compile.hlo import Instruction, Module, Shape

_NOTHING = frozenset(
    (
        "parameter constant tuple get-tuple-element bitcast while conditional call after-all optimization-barrier "
        "partition-id replica-id iota"
    ).split()
)
"""Instructions that move nothing, or whose computations are counted by themselves."""

_KERNEL = "tpu_custom_call"
"""The call of a Pallas kernel for TPUs."""

_ONCE = "__cublas"
"""The calls of cuBLAS begin with this. They read each operand once."""

_NO_WORK = ("AllocateBuffer", "AssumeGatherIndicesInBound", "ConcatBitcast", "Sharding")
"""Calls that tell the compiler something, and move nothing."""

_SLICES = ("dynamic-slice", "slice", "gather")


@dataclass(frozen=True)
class Moved:
    """Bytes that one device reads and writes.

    Attributes:
        main: those in the main memory of the device.
        all: those in any memory: compilers for TPUs keep arrays that fit in the memory for vectors.
        exact: False if they are at least that many: a loop that runs an unknown number of times counts once, and a
            kernel reads its operands at least once. Every branch of a conditional counts, and a scatter as its arrays.
    """

    main: float = 0.0
    all: float = 0.0
    exact: bool = True

    def __add__(self, other: "Moved") -> "Moved":
        return Moved(self.main + other.main, self.all + other.all, self.exact and other.exact)


def moved(text: str, *, kernels: bool = True) -> Moved:
    """Counts the bytes of a compiled program, loops counted.

    Args:
        text: what `jax.stages.Compiled.as_text` returns.
        kernels: whether the calls of Pallas kernels for TPUs count, with their operands and results once.

    >>> import jax, jax.numpy as jnp
    >>> x = jnp.ones((3, 5))
    >>> moved(jax.jit(lambda x: jnp.exp(x) + 1).lower(x).compile().as_text()).main  # reads and writes 15 numbers
    120.0
    """
    module = Module(text)
    inside = _fused(module)
    total = Moved()
    for name, times in module.times.items():
        if name in inside:
            continue
        here = module.computations.get(name, {})
        for instruction in here.values():
            target = (instruction.attribute("custom_call_target") or "").strip('"')
            if target in _NO_WORK or (target == _KERNEL and not kernels):
                continue
            exact = times.exact and (instruction.opcode != "custom-call" or target.startswith(_ONCE))
            for shape, size in _of(instruction, here, module):
                main = 0 if shape.is_fast else size
                total += Moved(main * times.known, size * times.known, exact)
    return total


def _fused(module: Module) -> set[str]:
    """Returns the computations whose values are no arrays in memory: those of fusions and of reductions."""
    found: set[str] = set()
    for computation in module.computations.values():
        for instruction in computation.values():
            if instruction.opcode not in ("while", "conditional", "call"):
                found.update(instruction.called())
    return found


def _of(instruction: Instruction, here: Mapping[str, Instruction], module: Module) -> Iterator[tuple[Shape, float]]:
    """Yields each array that an instruction reads or writes, with the bytes of it that it does."""
    opcode = instruction.opcode
    if opcode in _NOTHING or opcode.endswith(("-start", "-update")):
        return
    operands = _arrays(instruction, here)
    if opcode.endswith("-done"):
        # An asynchronous instruction counts where it ends: its start has operands and flags beside its results.
        yield from _asynchronous(instruction, here, module)
    elif opcode in _SLICES:
        size = sum(shape.bytes for shape in instruction.result)
        yield operands[0], size
        yield instruction.result[0], size
    elif opcode == "dynamic-update-slice":
        yield operands[1], operands[1].bytes
        yield instruction.result[0], operands[1].bytes
    elif opcode == "fusion":
        yield from _fusion(instruction, operands, module)
    else:
        yield from ((shape, shape.bytes) for shape in (*operands, *instruction.result))


def _arrays(instruction: Instruction, here: Mapping[str, Instruction]) -> list[Shape]:
    """Returns the operands of an instruction."""
    return [here[name].result[0] for name in instruction.operands if name in here and here[name].result]


def _asynchronous(done: Instruction, here: Mapping[str, Instruction], module: Module) -> Iterator[tuple[Shape, float]]:
    """Yields what an asynchronous instruction reads and writes, given its end."""
    start = here.get(done.operands[0])
    while start is not None and not start.opcode.endswith("-start"):
        start = here.get(start.operands[0]) if start.operands else None
    if start is None:
        return
    body = [x for name in start.called() for x in module.computations.get(name, {}).values() if x.is_root]
    written = sum(shape.bytes for shape in done.result)
    for shape in _arrays(start, here):
        is_slice = start.opcode.removesuffix("-start") in _SLICES or any(x.opcode in _SLICES for x in body)
        yield shape, min(shape.bytes, written) if is_slice else shape.bytes
    yield from ((shape, shape.bytes) for shape in done.result)


def _fusion(instruction: Instruction, operands: list[Shape], module: Module) -> Iterator[tuple[Shape, float]]:
    """Yields the operands and the results of a fusion, of slices and updates only what they touch."""
    body = module.computations.get(instruction.called()[0], {})
    for i, shape in enumerate(operands):
        yield shape, min(_read(i, body, module), shape.bytes)
    root = next((each for each in body.values() if each.is_root), None)
    ends = [] if root is None else [body[name] for name in root.operands] if root.opcode == "tuple" else [root]
    for shape, end in zip(instruction.result, ends, strict=False):
        made = _through(end, body)
        yield shape, body[made.operands[1]].result[0].bytes if made.opcode == "dynamic-update-slice" else shape.bytes


def _read(i: int, body: Mapping[str, Instruction], module: Module) -> float:
    """Returns the bytes that a fusion reads of its operand `i`; each of its instructions that reads them counts."""
    given = {each.name: each for each in body.values() if each.opcode == "parameter" and int(each.operands[0]) == i}
    # A fusion may give an array another form before it takes a slice.
    for each in body.values():
        if each.opcode == "bitcast" and each.operands[0] in given:
            given[each.name] = each
    total = 0.0
    for user in body.values():
        for place, name in enumerate(user.operands):
            if name in given and user.name not in given:
                total += _used(user, place, given[name].result[0].bytes, module)
    return total


def _used(user: Instruction, place: int, whole: float, module: Module) -> float:
    """Returns the bytes that an instruction inside of a fusion reads of one of its operands."""
    if user.opcode in _SLICES and place == 0:
        return sum(shape.bytes for shape in user.result)
    if user.opcode == "dynamic-update-slice" and place == 0:
        return 0.0  # in place
    if user.opcode == "fusion":
        return min(whole, _read(place, module.computations.get(user.called()[0], {}), module))
    return whole


def _through(end: Instruction, body: Mapping[str, Instruction]) -> Instruction:
    """Follows bitcasts to the instruction that made a value."""
    while end.opcode == "bitcast" and end.operands[0] in body:
        end = body[end.operands[0]]
    return end
