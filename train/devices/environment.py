"""What the process needs before JAX computes: a CPU backend that computes rightly, and a cache of compiled programs.

jaxlib from 0.10.2 on hands reductions on the CPU to YNNPACK. A matrix product followed by a reduction can then come out
wrong without an error (https://github.com/jax-ml/jax/issues/39103), and reductions of high rank can crash
(https://github.com/jax-ml/jax/issues/39257). Keeping reductions away from it mends both and leaves the fast products.
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
# 0.10.2, 0.11.0, 0.11.1, 0.11.2 and 0.12.0.1 were seen to compute wrongly and to know the flag. XLA ends the process on
# a flag that it does not know, so later versions are left alone; a test in test_environment.py tells if they are wrong.
_FIRST, _BEYOND = (0, 10, 2), (0, 13)

_CACHE = "JAX_COMPILATION_CACHE_DIR"
_LESS = (
    "For less, in a new run: --batches.tokens, or --pieces for the same update in parts; --model.block.remat True; "
    "--compute-dtype bfloat16; --batches.max-length"
)


def configure() -> None:
    """Sets `XLA_FLAGS` for the installed jaxlib. Call it before the first computation: XLA reads the variable once.

    A value that the user gave to the same flag stays.
    """
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""), importlib.metadata.version("jaxlib"))


def keep_programs() -> None:
    """Has JAX keep compiled programs in the user's cache folder, for the next run of the same ones.

    `JAX_COMPILATION_CACHE_DIR` names another folder, or, empty, none. What cannot be used is told, and done without.
    Call it before the first compilation.
    """
    if _CACHE in os.environ:
        if not os.environ[_CACHE]:
            del os.environ[_CACHE]
            _tell_jax(None)
        return
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        # A home may be shared by machines, and a program of one use instructions that another lacks.
        folder = base / "seqattn" / "xla" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, RuntimeError) as error:  # the latter where there is no home
        print(f"compiled programs are not kept: {error}", file=sys.stderr)
        return
    os.environ[_CACHE] = str(folder)
    _tell_jax(str(folder))


def _tell_jax(folder: str | None) -> None:
    if "jax" in sys.modules:  # it has read its variables
        sys.modules["jax"].config.update("jax_compilation_cache_dir", folder)


def _processor() -> str:
    """A name for what this processor can do."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return f"{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}"


def command(main: Callable[[], int | None]) -> None:
    """Runs the main function of a command and ends the process; what the user can mend is one sentence on stderr."""
    configure()
    keep_programs()
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        _leave(2)
    except RuntimeError as error:  # of which XLA's are a kind
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).splitlines()[0]
        print(f"error: the device has too little memory: {reason}\n{_LESS}", file=sys.stderr)
        _leave(1)
    except KeyboardInterrupt:  # outside of training steps, where there is nothing to save
        sys.exit(128 + signal.SIGINT)


def _leave(code: int) -> NoReturn:
    """Ends a process that failed; one of several does not wait for the others, as JAX would for minutes."""
    distributed = sys.modules.get("train.devices.processes")
    if distributed is not None:
        distributed.leave(code)
    sys.exit(code)


def xla_flags(flags: str, jaxlib: str) -> str:
    """The value of `XLA_FLAGS` that makes a version of jaxlib compute rightly, given the value that is there.

    >>> xla_flags("--xla_dump_to=/tmp/hlo", jaxlib="0.10.2")
    '--xla_dump_to=/tmp/hlo --xla_cpu_experimental_ynn_fusion_type=-reduce'
    >>> xla_flags("--xla_dump_to=/tmp/hlo", jaxlib="0.10.1")
    '--xla_dump_to=/tmp/hlo'
    """
    version = tuple(int(part) for part in re.findall(r"\d+", jaxlib)[:3])
    if _FLAG in flags or not _FIRST <= version < _BEYOND:
        return flags
    return f"{flags} {_FLAG}=-reduce".strip()
