"""How every test and doctest runs: loaded by `-p tests.plugin`, as no conftest.py is heard outside its own folder.

- On eight CPU devices, so that code for several devices is tested on any machine; `pytest -m gpu` runs on the GPU.
- Ranks never broadcast by accident, anywhere. Dtypes never mix by accident in the library. Training code is exempt, as
  optax mixes integers and floats, and so may a test of flax's norms in bfloat16 be: `jax.numpy_dtype_promotion`.
- Shapes in signatures are checked (`--jaxtyping-packages` in pyproject.toml), warnings are errors, and the examples
  that hypothesis draws are the same in every run.

- `make test` skips XLA's most expensive passes, but for the tiled kernel's tests, and for all tests MLIR's emitters of
  fused loops, half of the compiling that is left: compiling is most of the time. `make test-all` compiles as for users.
- Compiled programs are kept in .pytest_cache: no worker compiles what another one has, and a second run nearly nothing.

64-bit floats are off, as for users; an oracle switches them on: `with jax.enable_x64(True)`.
"""

import importlib.metadata
import os
from collections.abc import Generator
from pathlib import Path

import hypothesis
import jax
import pytest

from train.devices import environment

ROOT = Path(__file__).parents[1]
_LEFT_OUT = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
_QUICK, _TILED = (
    "not slow and not gpu and not aot",
    ROOT / "tests" / "seqattn" / "kernels" / "chunked" / "test_kernel.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.markexpr == _QUICK:
        # XLA aborts on unknown flags, and that of jaxlib 0.12 does not know these.
        left_out = _LEFT_OUT if importlib.metadata.version("jaxlib") == "0.10.2" else ""
        os.environ["XLA_FLAGS"] = f"{left_out} {os.environ.get('XLA_FLAGS', '')}"
    environment.configure()
    if config.option.markexpr != "gpu":
        jax.config.update("jax_platforms", "cpu")
    else:
        # Several workers share the GPU; by default each process takes most of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    if (cache := getattr(config, "cache", None)) is not None:
        # Also for processes that tests start.
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache.mkdir("programs"))
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    hypothesis.settings.register_profile("seqattn", derandomize=True, deadline=None, max_examples=25, database=None)
    hypothesis.settings.load_profile("seqattn")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    quick = item.config.option.markexpr == _QUICK and item.path != _TILED
    jax.config.update("jax_disable_most_optimizations", quick)
    with jax.numpy_dtype_promotion("strict" if _is_library(item.path) else "standard"):
        return (yield)


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Forgets the programs of a file once it is done: each holds memory and maps pages, of which a process has few."""
    if nextitem is None or nextitem.path != item.path:
        jax.clear_caches()


def _is_library(path: Path) -> bool:
    return path.is_relative_to(ROOT / "seqattn") or path.is_relative_to(ROOT / "tests" / "seqattn")
