"""tokamax's kernels for NVIDIA GPUs and TPUs, under seqattn's contract. `chunked` computes the log-sum-exp.

tokamax chooses among its kernels by itself, and XLA may be its choice. Here each kernel is named, so that a call runs
on it or is refused.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.kernels import chunked
from seqattn.kernels.call import Call, Result, refuse_unknown
from seqattn.kernels.guard import (
    guarded,
    lse_note,
    refuse_assembler,
    refuse_mesh_axes,
    refuse_unsupported,
    refuse_wide_integers,
    relaxed,
)
from seqattn.kernels.native import Native, native_of
from seqattn.platforms import by_platform, on_gpu, on_tpu
from seqattn.score_mods import SoftCap

_OLDEST = (0, 0, 17)

_NAMES = {"gpu": "mosaic_gpu", "tpu": "mosaic_tpu"}
"""tokamax's name for its kernel on each platform."""

_DTYPES = {"gpu": (jnp.float16, jnp.bfloat16), "tpu": (jnp.float32, jnp.bfloat16)}

_BLOCK = 128

# The largest dim of keys and values for each compute capability. With larger ones the tiles of some pass exceed the
# shared memory, which tokamax 0.0.17 reports as a ValueError: of the backward pass on 10, of the forward pass on 9.
_DIMS = {"8": 256, "9": 256, "10": 192}


def refuse(call: Call) -> None:
    """Raises NotImplementedError, with the reason, if `attend` cannot serve the call."""
    if call.platform not in (*_NAMES, None):
        raise NotImplementedError(f"tokamax runs on a gpu or a tpu, and this is a {call.platform}")
    native = _native(call)
    length, size = call.query.shape[1], call.key.shape[1]
    if length % _BLOCK or size % _BLOCK:
        # The kernel for TPUs raises a ValueError. Those for GPUs fill tiles with zeros; in the backward pass their
        # scores of 0 count, and overflow where all scores of a row are far below 0.
        raise NotImplementedError(f"T ({length}) and S ({size}) must be multiples of {_BLOCK}")
    for platform in _platforms(call):
        if call.query.dtype not in _DTYPES[platform]:
            names = " and ".join(jnp.dtype(x).name for x in _DTYPES[platform])
            raise NotImplementedError(f"tokamax takes {names} on a {platform}, not {call.query.dtype}")
        if platform == "gpu":
            _refuse_gpu(max(call.query.shape[-1], call.value.shape[-1]))
        else:
            _refuse_on_tpu(native)


def note(call: Call) -> str:
    """Returns the note for `explain` on the cost of the log-sum-exp, and on who computes the gradients."""
    by_chunked = call.platform == "gpu" and _lacks_gradients()
    return lse_note(call) + ("; chunked computes the gradients" if by_chunked else "")


def attend(call: Call, *, on: str | None = None) -> Result:
    """Returns the output and the log-sum-exp of the logits, as `reference.attend`.

    Args:
        call: the call.
        on: the implementation of tokamax that serves the call, on any platform; for tests.
    """
    if on is None:
        refuse(call)
    native = _native(call)
    if call.is_empty:
        return call.nothing()
    kernels = {each: _Kernel.of(call, native, each, on) for each in (_platforms(call) if on is None else ("cpu",))}

    def compute(query: Array, key: Array, value: Array) -> tuple[Array, Array]:
        # The kernel for TPUs multiplies by the scale in the dtype of the queries, and those for GPUs need a number.
        # Scaled here, the queries are rounded once, and the scale may be traced.
        scaled = (query.astype(call.high) * jnp.asarray(call.scale, call.high)).astype(query.dtype)
        # What derivative rules close over must not be traced.
        unscaled = dataclasses.replace(call, scale=1.0, dropout=None)
        branches = {each: functools.partial(_output, kernel, unscaled) for each, kernel in kernels.items()}
        # A shared branch of several platforms knows none, so the choice is made again.
        only = next(iter(branches.values())) if len(branches) == 1 else functools.partial(by_platform, branches)
        return only(scaled, key, value), chunked.attend(call)[1]

    return guarded(compute, call.query, call.key, call.value, native)


def _platforms(call: Call) -> tuple[str, ...]:
    """Returns the platforms that the program may run on, among those of tokamax."""
    return tuple(_NAMES) if call.platform is None else (call.platform,)


def _native(call: Call) -> Native:
    """Returns the mask. Raises NotImplementedError for what no kernel of tokamax is asked for, on any platform."""
    if (reason := why_missing()) is not None:
        raise NotImplementedError(reason)
    refuse_unknown("tokamax", call.query.shape, call.key.shape)
    # tokamax caps scores itself.
    refuse_unsupported(dataclasses.replace(call, score_mod=None) if isinstance(call.score_mod, SoftCap) else call)
    if call.bias is not None:
        raise NotImplementedError("tokamax is given no bias: on a tpu it takes none, and on a gpu a dense one")
    refuse_wide_integers("tokamax")
    refuse_mesh_axes("tokamax", (call.query, call.key, call.value))
    return native_of(call)


@functools.cache
def why_missing() -> str | None:
    """Returns why tokamax cannot be used on this machine, or None if it can. The import would be slow."""
    try:
        found = importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return "tokamax is not installed: the extra `tokamax` does so on Python 3.12 and newer"
    # The third part may end in letters, as in 0.0.18rc1.
    parts = ("".join(itertools.takewhile(str.isdigit, part)) for part in found.split(".")[:3])
    if tuple(int(part or 0) for part in parts) >= _OLDEST:
        return None
    wanted = ".".join(map(str, _OLDEST))
    return f"tokamax {wanted} or newer is needed, which needs Python 3.12 or newer, and this is {found}"


def _refuse_gpu(dim: int) -> None:
    """Raises NotImplementedError if tokamax has no kernel for the machine's GPU and this dim of keys or values."""
    if (found := _capability()) is None:
        # tokamax asks for the machine's GPU while it is traced.
        raise NotImplementedError("tokamax compiles for a gpu on a machine with that gpu alone, and here is none")
    generation = found.split(".")[0]
    if generation not in _DIMS:
        raise NotImplementedError(
            f"tokamax has kernels for compute capability {', '.join(_DIMS)}, and this GPU has {found}"
        )
    if dim > _DIMS[generation]:
        raise NotImplementedError(f"H and V ({dim}) must be at most {_DIMS[generation]} on compute capability {found}")
    if generation == "8" and jax.__version_info__ <= (0, 11, 2):
        # tokamax 0.0.17 accepts them, and its kernel calls a function of Pallas that they lack.
        raise NotImplementedError(
            f"tokamax's kernel for compute capability 8 needs a JAX newer than 0.11.2, and this is {jax.__version__}"
        )
    refuse_assembler()


def _capability() -> str | None:
    """Returns the compute capability of the machine's GPU, such as "9.0", or None if it has none."""
    return str(jax.local_devices()[0].compute_capability) if jax.default_backend() == "gpu" else None


def _lacks_gradients() -> bool:
    """Returns whether tokamax has no backward pass for the machine's GPU."""
    return (_capability() or "").startswith("8.")


def _refuse_on_tpu(native: Native) -> None:
    """Raises NotImplementedError for a mask that tokamax lacks on a TPU."""
    if native.query_lengths is not None or native.key_lengths is not None:
        raise NotImplementedError("tokamax takes no padding lengths on a tpu; splash and tpu skip tiles for masks")
    if native.left is not None or native.right not in (0, None):
        raise NotImplementedError("tokamax takes no window on a tpu, and no causal mask off the diagonal; splash does")
    abstract = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if native.right is None and jax.default_backend() != "tpu" and abstract is None:
        # Its kernel for a full mask divides integers, which JAX lowers differently for each generation.
        raise NotImplementedError(
            "without a mask the kind of TPU must be known: compile on one, or inside jax.sharding.use_abstract_mesh"
        )


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """One of tokamax's implementations, with the arguments that are known at trace time.

    Attributes:
        name: tokamax's name of it.
        options: keyword arguments of `tokamax.dot_product_attention`, hashable.
        lengths: how many keys each row sees, `[B]`, or None for all.
        platform: the one that it is compiled for, or None for any.
        by_chunked: whether `chunked` computes the gradients.
    """

    name: str
    options: tuple[tuple[str, Any], ...]
    lengths: np.ndarray | None
    platform: str | None
    by_chunked: bool

    @staticmethod
    def of(call: Call, native: Native, platform: str, on: str | None) -> "_Kernel":
        """Returns the kernel of a call on a platform."""
        batch, length, size = call.query.shape[0], call.query.shape[1], call.key.shape[1]
        name, where = (_NAMES[platform], platform) if on is None else (on, None)
        options = native.for_jax_nn(batch, length, size)
        # Padding queries see no key, and `guarded` clears their rows; no kernel has to be told.
        options = {option: x for option, x in options.items() if not option.endswith("lengths")}
        lengths = native.key_lengths
        odd = "local_window_size" in options or ("is_causal" in options and length < size)
        if lengths is None and odd and name != _NAMES["tpu"]:
            # With lengths tokamax 0.0.17 takes another path, around two faults. For a window and few tiles it splits
            # the keys on compute capability 10, and then refuses its own split. For causal keys after the last query
            # the pipeline of its backward pass on 9 has a negative number of steps.
            lengths = np.asarray([size])
        if lengths is not None:
            # The rows of length 0 are cleared as well.
            lengths = np.broadcast_to(np.maximum(lengths, 1), (batch,)).astype(np.int32)
        cap = {} if call.score_mod is None else {"logits_soft_cap": float(call.score_mod.cap)}
        by_chunked = name != _NAMES["tpu"] and _lacks_gradients()
        return _Kernel(name, tuple((options | cap).items()), lengths, where, by_chunked)

    @contextlib.contextmanager
    def settings(self, dtype: np.dtype) -> Iterator[None]:
        """Sets what tokamax reads while it is traced, forward and backward."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(relaxed(dtype))
            if self.name == _NAMES["tpu"] and jax.default_backend() != "tpu":
                # Without these tokamax refuses to be traced, or looks up tiles that were measured on this machine.
                config = _tokamax().config
                stack.enter_context(config.cross_compile(True))
                stack.enter_context(config.ignore_autotuning_cache(True))
            yield

    def __call__(self, fn: Callable[..., Any], *operands: Any) -> Any:
        """Calls the function in a program for the platform."""
        return {"gpu": on_gpu, "tpu": on_tpu, None: _call}[self.platform](fn, *operands)


def _output(kernel: _Kernel, call: Call, *arrays: Array) -> Array:
    """Runs a kernel on scaled queries, keys and values. The derivative rules are those that `splash` needs as well."""
    forward, pulled = _traced_once(kernel.name, kernel.options)

    def run(fn: Callable[..., Any], *arrays: Array) -> Any:
        lengths = () if kernel.lengths is None else (jnp.asarray(kernel.lengths),)
        with kernel.settings(call.query.dtype):
            return kernel(fn, *arrays, *lengths)

    @jax.custom_vjp
    def output(*arrays: Array) -> Array:
        return run(forward, *arrays)

    def own(*arrays: Array) -> tuple[Array, Any]:
        return run(pulled, *arrays)

    def own_gradients(pull: Callable[[Array], tuple[Array, ...]], direction: Array) -> tuple[Array, ...]:
        with kernel.settings(call.query.dtype):
            return kernel(_call, pull, direction)

    def by_chunked(arrays: tuple[Array, ...], direction: Array) -> tuple[Array, ...]:
        def again(query: Array, key: Array, value: Array) -> Array:
            return chunked.attend(dataclasses.replace(call, query=query, key=key, value=value))[0]

        return jax.vjp(again, *arrays)[1](direction)

    if kernel.by_chunked:
        output.defvjp(lambda *arrays: (output(*arrays), arrays), by_chunked)
    else:
        output.defvjp(own, own_gradients)
    return output(*arrays)


def _call(fn: Callable[..., Any], *operands: Any) -> Any:
    """Calls the function directly."""
    return fn(*operands)


@functools.lru_cache(maxsize=64)
def _traced_once(
    name: str, options: tuple[tuple[str, Any], ...]
) -> tuple[Callable[..., Array], Callable[..., tuple[Array, Any]]]:
    """Returns the kernel, and the kernel with its pullback. `jit` keeps the traced programs for a model's layers."""
    tokamax = _tokamax()

    def run(query: Array, key: Array, value: Array, lengths: Array | None = None) -> Array:
        return tokamax.dot_product_attention(
            query, key, value, scale=1.0, key_value_seq_lengths=lengths, implementation=name, **dict(options)
        )

    def pulled(*operands: Array) -> tuple[Array, Any]:
        arrays, lengths = operands[:3], operands[3:]
        return jax.vjp(lambda *arrays: run(*arrays, *lengths), *arrays)

    return jax.jit(run), jax.jit(pulled)


def _tokamax() -> Any:
    """Returns the library. Imported here, because the import is slow and only traced programs need it."""
    try:
        import tokamax
    except ImportError as error:
        raise NotImplementedError(f"tokamax cannot be imported: {error}") from error
    return tokamax
