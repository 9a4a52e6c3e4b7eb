"""Attention calls in PyTorch: fused attention, FlexAttention and the FlashAttention packages.

PyTorch's own calls take the layout `[B, N, T, D]`, the FlashAttention packages `[B, T, N, D]`.
"""

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from benchmarks.attention import flash_calls, patterns
from benchmarks.attention.case import AttentionCase
from benchmarks.bench import machine
from benchmarks.bench.program import Program, there_already


def prepare(case: AttentionCase, inputs: Iterable[np.ndarray], implementation: str) -> Program:
    """Prepares `scaled_dot_product_attention` ("sdpa"), FlexAttention ("flex") compiled for the case, or the packages
    FlashAttention-2 ("flash-2") and FlashAttention-3 ("flash-3").
    """
    import torch

    if machine.platform_name() == "gpu" and not torch.cuda.is_available():
        raise NotImplementedError(f"PyTorch {torch.__version__} sees no GPU")
    device = "cuda" if machine.platform_name() == "gpu" else "cpu"
    torch.set_num_threads(machine.cores())
    torch.cuda.empty_cache()  # releases cached memory of earlier programs, for JAX to use
    heads_first = implementation not in flash_calls.CALLS
    start = time.perf_counter()
    attention, how = _CALLS[implementation](case, device)
    tensors = [_tensor(x, device, heads_first=heads_first) for x in inputs]
    run = functools.partial(_with_gradients if case.backward else _forward, attention, *tensors)
    wait = (lambda result: torch.cuda.synchronize()) if device == "cuda" else there_already
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    wait(run())  # compiles, and raises if the case is not supported
    return Program(
        run=run,
        wait=wait,
        arrays=lambda result: [_array(x, heads_first=heads_first) for x in result],
        how=how,
        compile_seconds=time.perf_counter() - start if implementation == "flex" else None,
        planned_bytes=torch.cuda.max_memory_allocated() if device == "cuda" else None,
    )


def _tensor(array: np.ndarray, device: str, *, heads_first: bool) -> Any:
    import torch

    # Through float32, which is exact: PyTorch cannot read NumPy's bfloat16.
    placed = array.swapaxes(1, 2) if heads_first else array
    wide = torch.from_numpy(np.ascontiguousarray(placed).astype(np.float32))
    return wide.to(device, getattr(torch, str(array.dtype)))


def _array(tensor: Any, *, heads_first: bool) -> np.ndarray:
    """Returns a result as float64 `[B, T, N, D]`."""
    found = tensor.detach().double().cpu().numpy()
    return found.transpose(0, 2, 1, 3) if heads_first else found


def _forward(attention: Callable[..., Any], *inputs: Any) -> tuple[Any, ...]:
    import torch

    with torch.no_grad():
        return (attention(*inputs[:3]),)


def _with_gradients(attention: Callable[..., Any], *inputs: Any) -> tuple[Any, ...]:
    import torch

    query_key_value = [x.detach().requires_grad_() for x in inputs[:3]]
    output = attention(*query_key_value)
    return (output, *torch.autograd.grad(output, query_key_value, inputs[3]))


def _sdpa(case: AttentionCase, device: str) -> tuple[Callable[..., Any], str]:
    import torch

    patterns.refuse_cap(case.pattern, "PyTorch's scaled_dot_product_attention")
    options: dict[str, Any] = {"enable_gqa": case.shape.kv_heads != case.shape.num_heads}
    how = {"full": "", "causal": "is_causal"}.get(case.pattern, "dense bias")
    if case.pattern == "causal":
        options["is_causal"] = True
    elif case.pattern != "full":
        # A boolean mask would be converted to this bias on every call.
        bias = torch.from_numpy(patterns.dense_bias(case.pattern, case.shape))
        options["attn_mask"] = bias.to(device, getattr(torch, case.dtype))
    return functools.partial(torch.nn.functional.scaled_dot_product_attention, **options), how


def _flex(case: AttentionCase, device: str) -> tuple[Callable[..., Any], str]:
    import torch
    from torch.nn.attention import flex_attention as flex

    torch.compiler.reset()  # otherwise earlier cases count towards PyTorch's recompilation limit
    shape, options, how = case.shape, dict[str, Any](), []
    if case.pattern != "full":
        rows = shape.batch if case.pattern == "documents" else None
        visible = _mask_mod(case, device)
        options["block_mask"] = flex.create_block_mask(visible, rows, None, shape.length, shape.size, device=device)
        how.append("block_mask")
    if case.pattern == "alibi":
        slopes = torch.from_numpy(patterns.slopes(case.pattern, shape).astype(np.float32)).to(device)
        options["score_mod"] = lambda score, b, head, query, key: score - slopes[head] * (query - key)
        how.append("score_mod")
    if cap := patterns.cap(case.pattern):
        options["score_mod"] = lambda score, b, head, query, key: cap * torch.tanh(score / cap)
        how.append("score_mod")
    options["enable_gqa"] = shape.kv_heads != shape.num_heads
    return functools.partial(torch.compile(flex.flex_attention, dynamic=False), **options), ", ".join(how)


def _mask_mod(case: AttentionCase, device: str) -> Callable[..., Any]:
    import torch

    length, window = patterns.prefix_length(case.shape), patterns.window(case.pattern)
    if window:
        return lambda b, head, query, key: (query >= key) & (query - key < window)
    segment = torch.from_numpy(patterns.segments(case.shape)).to(device)
    return {
        "causal": lambda b, head, query, key: query >= key,
        "alibi": lambda b, head, query, key: query >= key,
        "cap": lambda b, head, query, key: query >= key,
        "prefix": lambda b, head, query, key: (query >= key) | (key < length),
        "documents": lambda b, head, query, key: (query >= key) & (segment[b, query] == segment[b, key]),
    }[case.pattern]


_CALLS: dict[str, Callable[[AttentionCase, str], tuple[Callable[..., Any], str]]] = {
    "sdpa": _sdpa,
    "flex": _flex,
    **flash_calls.CALLS,
}
"""Each makes the call for a case on a device, and says how the mask is written."""
