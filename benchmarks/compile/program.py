"""A program that can be compiled for devices: what to lower, and how much work it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from benchmarks.compile.targets import Target
from benchmarks.compile.work import Work


@dataclass(frozen=True)
class Built:
    """A program for some devices, traced but not compiled."""

    lowered: jax.stages.Lowered
    work: Work
    """The operations of all devices together."""
    kernel_bytes: float | None = None
    """The bytes that its kernels copy, if they are counted; see `benchmarks.compile.pipelines`."""


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        name: words with slashes between them; a beginning of it selects all programs that begin in this way.
        counts: the numbers of devices that it is made for.
        build: lowers it for devices of a platform, "tpu" or "gpu". Raises NotImplementedError, with the reason, if the
            library cannot serve it there.
        sizes: everything that determines the computation, in base units, for the JSON line.
        seconds: time limit for one compilation.
        platforms: the platforms that it is made for.
        kinds: the kinds of device that it is made for, such as "v5e"; all if empty. Long compilations are for one kind
            of each platform.
    """

    name: str
    counts: tuple[int, ...]
    build: Callable[[Sequence[Any], str], Built]
    sizes: dict[str, Any] = field(default_factory=dict)
    seconds: int = 300
    platforms: tuple[str, ...] = ("tpu", "gpu")
    kinds: tuple[str, ...] = ()

    def is_for(self, target: Target) -> bool:
        """Whether the program is made for the kind and the number of devices of a target."""
        kind = not self.kinds or target.kind in self.kinds
        return kind and target.platform in self.platforms and target.count in self.counts

    @property
    def group(self) -> str:
        """The first word of the name."""
        return self.name.split("/")[0]


def first_line(error: Exception) -> str:
    """Returns the type and the first line of an error, without the words that say only that XLA failed."""
    line = next((" ".join(line.split()) for line in str(error).splitlines() if line.strip()), "no message")
    if isinstance(error, NotImplementedError):
        return line
    return f"{type(error).__name__}: {line}"


def matching(given: Sequence[str], programs: dict[str, Program]) -> list[Program]:
    """Returns the programs whose names are given, or begin with a given name and a slash.

    Raises:
        ValueError: no program has such a name. The message tells the names.
    """
    for name in given:
        if not any(_begins(program, name) for program in programs):
            firsts = dict.fromkeys("/".join(program.split("/")[:2]) for program in programs)
            raise ValueError(f"no program {name!r}: give {', '.join(firsts)}, or longer names, see --list")
    return [program for name, program in programs.items() if any(_begins(name, start) for start in given)]


def _begins(name: str, start: str) -> bool:
    return name == start or name.startswith(f"{start}/")
