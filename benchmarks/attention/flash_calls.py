"""Calls of the FlashAttention packages of Dao et al., which have kernels of their own beside PyTorch's.

`flash_attn` is FlashAttention-2 (Dao 2023), `flash_attn_interface` FlashAttention-3 for Hopper (Shah 2024). Both take
`[B, T, N, D]` in float16 and bfloat16. Packed documents are one sequence `[B * T, N, D]` with the places where texts
begin, so no pair of two documents is computed.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.attention import patterns
from benchmarks.attention.case import AttentionCase


@dataclass(frozen=True)
class Package:
    """One of the packages."""

    module: str
    """The module to import."""
    has_slopes: bool
    """Whether its functions take ALiBi's slopes."""


PACKAGES = {
    "flash-2": Package("flash_attn", has_slopes=True),
    "flash-3": Package("flash_attn_interface", has_slopes=False),
}


def _call(package: Package, case: AttentionCase, device: str) -> tuple[Callable[..., Any], str]:
    """Returns the function of query, key and value for a case, and how its mask is written.

    Raises:
        ModuleNotFoundError: the package is not installed.
        NotImplementedError: the package cannot express the mask or the dtype, or there is no GPU.
    """
    library = importlib.import_module(package.module)
    if device != "cuda":
        raise NotImplementedError(f"{package.module} runs on NVIDIA GPUs only")
    if case.dtype not in ("bfloat16", "float16"):
        raise NotImplementedError(f"{package.module} takes bfloat16 and float16, not {case.dtype}")
    pattern, options, how = case.pattern, dict[str, Any](), []
    if pattern == "prefix":
        raise NotImplementedError(f"{package.module} has no prefix mask")
    if pattern != "full":
        options["causal"] = True
        how.append("causal")
    if size := patterns.window(pattern):
        options["window_size"] = (size - 1, 0)
        how.append("window_size")
    if cap := patterns.cap(pattern):
        options["softcap"] = cap
        how.append("softcap")
    if pattern == "alibi":
        if not package.has_slopes:
            raise NotImplementedError(f"{package.module} has no ALiBi")
        options["alibi_slopes"] = _on(device, patterns.slopes(pattern, case.shape).astype(np.float32))
        how.append("alibi_slopes")
    if pattern == "documents":
        options |= _packed(case, device)
        function = functools.partial(_flattened, functools.partial(library.flash_attn_varlen_func, **options))
        return function, ", ".join([*how, "cu_seqlens"])
    return functools.partial(_only_output, functools.partial(library.flash_attn_func, **options)), ", ".join(how)


def _packed(case: AttentionCase, device: str) -> dict[str, Any]:
    """Returns where the documents of all rows begin, and the length of the longest one."""
    segment = patterns.segments(case.shape)
    starts = np.flatnonzero(np.diff(segment, axis=1, prepend=0).reshape(-1))
    places = np.append(starts, segment.size).astype(np.int32)
    longest = int(np.diff(places).max())
    found: dict[str, Any] = dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), _on(device, places))
    return found | dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), longest)


def _flattened(function: Callable[..., Any], *arrays: Any) -> Any:
    """Calls a function of `[B * T, N, D]` with arrays `[B, T, N, D]`."""
    return _only_output(function, *(x.flatten(0, 1) for x in arrays)).unflatten(0, arrays[0].shape[:2])


def _only_output(function: Callable[..., Any], *arrays: Any) -> Any:
    """Returns the output alone: early versions of FlashAttention-3 return the log-sum-exp beside it."""
    found = function(*arrays)
    return found[0] if isinstance(found, tuple) else found


def _on(device: str, array: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(array).to(device)


CALLS = {name: functools.partial(_call, package) for name, package in PACKAGES.items()}
"""The calls, by the name of the implementation after `torch:`."""
