"""Counts the bytes that Pallas kernels for TPUs copy between the main memory and the memory for vectors.

Pallas copies a block of each operand before a step of the grid, and a block of each result after it, but not if the
next step has the same block. It counts as main memory even where the compiler holds a whole array in the memory for
vectors. The index maps of a kernel tell the blocks. They may read lists that are made before the
kernel starts, so the program is evaluated as far as its values are known without computing any attention.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax._src.state.discharge import discharge_state
from jax.extend import core

_CALLS = ("jit", "pjit", "closed_call", "custom_vjp_call", "custom_jvp_call", "remat2", "checkpoint")
_MOST = 2**24
"""Larger arrays are not computed: no list of tiles is as large."""


def moved_by_kernels(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the bytes that the kernels of a program for a TPU copy. A block that reaches past the end counts whole.

    Args:
        function: the function.
        *arguments: arrays, or shapes where no index map depends on the values.

    Raises:
        NotImplementedError: an index map, or the size of a grid, depends on values that are not known; a kernel is
            inside of a loop or of `jax.shard_map`; or a kernel copies an operand by itself.
    """
    types = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(arguments)]
    tree = jax.tree.structure(arguments)
    program = jax.make_jaxpr(lambda *leaves: function(*jax.tree.unflatten(tree, leaves)))(*types)
    known = [None if isinstance(x, jax.ShapeDtypeStruct) else x for x in jax.tree.leaves(arguments)]
    counter = _Counter()
    counter.evaluate(program.jaxpr, program.consts, known)
    return counter.total


class _Counter:
    """Evaluates what is known of a program; a value that is not known is None."""

    def __init__(self) -> None:
        self.total = 0.0

    def evaluate(self, jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Returns the results of a jaxpr, and adds the bytes of its kernels."""
        values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

        def read(x: Any) -> Any:
            return x.val if isinstance(x, core.Literal) else values.get(x)

        for equation in jaxpr.eqns:
            results = self._equation(equation, [read(x) for x in equation.invars])
            values |= dict(zip(equation.outvars, results, strict=True))
        return [read(x) for x in jaxpr.outvars]

    def _equation(self, equation: Any, given: list[Any]) -> Sequence[Any]:
        name, params = equation.primitive.name, equation.params
        nothing = [None] * len(equation.outvars)
        if name == "pallas_call":
            self.total += _bytes(equation, given)
            return nothing
        if name == "platform_index":
            return [next(i for i, names in enumerate(params["platforms"]) if names is None or "tpu" in names)]
        if name == "on_tpu":
            types = (jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars)
            inner = jax.make_jaxpr(params["run"])(*types)
            return self.evaluate(inner.jaxpr, inner.consts, given)
        if name == "cond" and given[0] is not None:
            inner = params["branches"][int(given[0])]
            return self.evaluate(inner.jaxpr, inner.consts, given[1:])
        if name == "optimization_barrier":
            return given  # one for many arrays, of which some may be known
        if name in _CALLS:
            inner = params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]
            consts = inner.consts if hasattr(inner, "consts") else ()
            return self.evaluate(getattr(inner, "jaxpr", inner), consts, given)
        if any(map(_holds_kernel, params.values())):
            raise NotImplementedError(f"a kernel inside of {name} is not counted")
        sizes = (math.prod(x.aval.shape) for x in equation.outvars if hasattr(x.aval, "shape"))
        if any(x is None for x in given) or max(sizes, default=0) > _MOST:
            return nothing
        found = equation.primitive.bind(*given, **params)
        return found if equation.primitive.multiple_results else [found]


def _holds_kernel(value: Any) -> bool:
    """Whether a parameter of an equation is a program with a kernel, or holds one."""
    if isinstance(value, tuple | list):
        return any(map(_holds_kernel, value))
    program = getattr(value, "jaxpr", value)
    found = getattr(program, "eqns", ())
    return any(each.primitive.name == "pallas_call" or any(map(_holds_kernel, each.params.values())) for each in found)


def _bytes(equation: Any, given: Sequence[Any]) -> float:
    """Returns the bytes that a kernel copies."""
    mapping = equation.params["grid_mapping"]
    number = sum(not isinstance(size, int) for size in mapping.grid)
    sizes, lists = iter(given[:number]), given[number : number + mapping.num_index_operands]
    grid = [size if isinstance(size, int) else next(sizes) for size in mapping.grid]
    if any(x is None for x in (*grid, *lists)):
        raise NotImplementedError("the steps of a kernel are not known before it runs")
    # The last dim of the grid runs fastest.
    numbers = [int(size) for size in grid]
    steps = np.indices(numbers, dtype=np.int32).reshape(len(grid), math.prod(numbers))
    if not math.prod(numbers):
        return 0.0
    total = sum(np.asarray(x).nbytes for x in lists)
    for block in mapping.block_mappings:
        if (space := str(block.transformed_block_aval.memory_space).lower()) in ("any", "hbm"):
            raise NotImplementedError(f"the kernel itself copies an operand (memory space {space})")
        array, shape = block.array_aval, block.transformed_block_aval.shape
        copies = _copies(block.index_map_jaxpr, steps, lists)
        total += copies * math.prod(shape) * array.dtype.itemsize
    return float(total)


def _copies(index_map: Any, steps: np.ndarray, lists: Sequence[Any]) -> int:
    """Returns how often the block of an operand changes from one step to the next, the first one included."""
    pure = discharge_state(index_map)  # the lists are references, which no index map writes to
    number = len(pure.out_avals) - len(lists)

    def index(*ids: Any) -> list[Any]:
        return jax.core.eval_jaxpr(pure.jaxpr, pure.consts, *ids, *lists)[:number]

    found = jax.jit(jax.vmap(index, axis_size=steps.shape[1]))(*steps)
    blocks = np.stack([np.broadcast_to(np.asarray(x), steps.shape[1:]) for x in found])
    return 1 + int((blocks[:, 1:] != blocks[:, :-1]).any(axis=0).sum())
