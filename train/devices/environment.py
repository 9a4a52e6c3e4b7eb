"""Process setup before JAX computes: a workaround for wrong results on CPU, and a cache of compiled programs.

From jaxlib 0.10.2 on, XLA uses YNNPACK for reductions on the CPU. A matrix product followed by a reduction can then be
wrong without an error (https://github.com/jax-ml/jax/issues/39103), and reductions of high rank can crash
(https://github.com/jax-ml/jax/issues/39257). Excluding reductions from YNNPACK avoids both and keeps its fast products.
"""

import hashlib
import importlib.metadata
import os
import platform
import re
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# Checked: 0.10.2, 0.11.0, 0.11.1, 0.11.2 and 0.12.0.1 give wrong results and know the flag. XLA aborts on unknown
# flags, so later versions run without it; a test in test_environment.py fails if they give wrong results.
_FIRST, _BEYOND = (0, 10, 2), (0, 13)

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_LESS = (
    "To use less memory in a new run: fewer --batches.tokens, or more --pieces for the same update; "
    "--model.block.remat True; --compute-dtype bfloat16; a lower --batches.max-length"
)


def configure() -> None:
    """Sets `XLA_FLAGS` for the installed jaxlib.

    Must be called before the first computation, since XLA reads the variable once. If the user has set the same flag,
    its value is kept.
    """
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""), importlib.metadata.version("jaxlib"))


def keep_programs() -> None:
    """Enables JAX's persistent compilation cache, in the user's cache folder.

    `JAX_COMPILATION_CACHE_DIR` names another folder; an empty value disables the cache. If the folder cannot be used,
    prints the reason and continues without a cache. Must be called before the first compilation.
    """
    if _CACHE in os.environ:
        if not os.environ[_CACHE]:
            del os.environ[_CACHE]
            _tell_jax(None)
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # Machines may share a home folder, and a program compiled on one may use instructions that another lacks.
        folder = base / "seqattn" / "xla" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        print(f"compiled programs are not cached: {error}", file=sys.stderr)
        return
    os.environ[_CACHE] = str(folder)
    _tell_jax(str(folder))


def _tell_jax(folder: str | None) -> None:
    if "jax" in sys.modules:  # it has already read the environment
        sys.modules["jax"].config.update("jax_compilation_cache_dir", folder)


def _processor() -> str:
    """A name for the instruction set of this processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def command(main: Callable[[], int | None]) -> None:
    """Runs the main function of a command and exits. Errors that the user can fix are one sentence on stderr.

    The exit code is that of `main`, 2 for ValueError and OSError, 1 if a device runs out of memory, and 130 after
    Ctrl-C.

    Args:
        main: the function; returns the exit code, or None for 0.
    """
    configure()
    keep_programs()
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except RuntimeError as error:  # includes the errors of XLA
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"error: the device has too little memory: {reason}\n{_LESS}", file=sys.stderr)
        _leave(1)
    except KeyboardInterrupt:  # outside the training loop, where there is nothing to save
        sys.exit(128 + signal.SIGINT)


def _leave(code: int) -> NoReturn:
    """Exits a failed process without waiting for other processes, as JAX would for minutes."""
    distributed = sys.modules.get("train.devices.processes")
    if distributed is not None:
        distributed.leave(code)
    sys.exit(code)


def xla_flags(flags: str, jaxlib: str) -> str:
    """Returns the value of `XLA_FLAGS` with which a version of jaxlib gives correct results.

    Args:
        flags: the current value.
        jaxlib: the version of jaxlib.

    >>> xla_flags("--xla_dump_to=/tmp/hlo", jaxlib="0.10.2")
    '--xla_dump_to=/tmp/hlo --xla_cpu_experimental_ynn_fusion_type=-reduce'
    >>> xla_flags("--xla_dump_to=/tmp/hlo", jaxlib="0.10.1")
    '--xla_dump_to=/tmp/hlo'
    """
    version = tuple(int(part) for part in re.findall(r"\d+", jaxlib)[:3])
    if _FLAG in flags or not _FIRST <= version < _BEYOND:
        return flags
    return f"{flags} {_FLAG}=-reduce".strip()
