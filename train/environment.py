"""What the process needs before JAX computes: a CPU backend that computes rightly.

jaxlib from 0.10.2 on hands reductions on the CPU to YNNPACK. A matrix product followed by a reduction can then come out
wrong without an error (https://github.com/jax-ml/jax/issues/39103), and reductions of high rank can crash
(https://github.com/jax-ml/jax/issues/39257). Keeping reductions away from it mends both and leaves the fast products.
"""

import importlib.metadata
import os
import re
import signal
import sys
from collections.abc import Callable

_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
# 0.10.2, 0.11.0, 0.11.1, 0.11.2 and 0.12.0.1 were seen to compute wrongly and to know the flag. XLA ends the process on
# a flag that it does not know, so later versions are left alone; a test in test_environment.py tells if they are wrong.
_FIRST, _BEYOND = (0, 10, 2), (0, 13)


def configure() -> None:
    """Sets `XLA_FLAGS` for the installed jaxlib. Call it before the first computation: XLA reads the variable once.

    A value that the user gave to the same flag stays.
    """
    os.environ["XLA_FLAGS"] = xla_flags(os.environ.get("XLA_FLAGS", ""), importlib.metadata.version("jaxlib"))


def command(main: Callable[[], int | None]) -> None:
    """Runs the main function of a command and ends the process; what the user can mend is one sentence on stderr."""
    configure()
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # outside of training steps, where there is nothing to save
        sys.exit(128 + signal.SIGINT)


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
