"""Counts the operations of a program from its jaxpr.

Compilers count a kernel as nothing and the body of a loop once, so their numbers say little of tiled attention. Here
loops count all their iterations, and primitives that hide a program have a rule in `RULES`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.interpreters import partial_eval

from train.reports.flops import inner, of_product

EXACT, AT_LEAST, AT_MOST, ABOUT = "", ">=", "<=", "~"


@dataclass(frozen=True)
class Work:
    """Floating-point operations of matrix products; multiplications and additions both count."""

    flop: float = 0.0
    bound: str = EXACT
    """How the true number compares with `flop`: `EXACT`, `AT_LEAST` where the iterations of a loop are not known and it
    counts once, `AT_MOST` where a kernel may skip tiles that are counted, `ABOUT` for both."""

    def __add__(self, other: "Work") -> "Work":
        bounds = {self.bound, other.bound} - {EXACT}
        return Work(self.flop + other.flop, bounds.pop() if len(bounds) == 1 else ABOUT if bounds else EXACT)

    def __mul__(self, times: float) -> "Work":
        return Work(self.flop * times, self.bound)

    def to_at_least(self) -> "Work":
        """Marks the work as a lower bound, unless there is none."""
        return Work(self.flop, ABOUT if self.bound == AT_MOST else AT_LEAST) if self.flop else self

    def to_at_most(self) -> "Work":
        """Marks the work as an upper bound, unless there is none."""
        return Work(self.flop, ABOUT if self.bound == AT_LEAST else AT_MOST) if self.flop else self


class Counter:
    """Counts the work of jaxprs on one platform.

    Args:
        platform: "cpu", "gpu" or "tpu"; decides between the branches of `seqattn.platforms.by_platform`.
        rules: what primitives cost, by name, in place of `RULES`.
    """

    def __init__(self, platform: str, rules: Mapping[str, "Rule"] | None = None) -> None:
        self._names = {"gpu": ("cuda", "rocm", "gpu")}.get(platform, (platform,))
        self._rules = RULES if rules is None else rules

    def __call__(self, jaxpr: Any) -> Work:
        """Returns the work of a jaxpr: that of all devices, where it has a `jax.shard_map`."""
        branch: dict[Any, int] = {}
        total = Work()
        for equation in jaxpr.eqns:
            if equation.primitive.name == "platform_index":
                branch |= {equation.outvars[0]: self._branch(equation.params["platforms"])}
            total += self._of(equation, branch)
        return total

    def _branch(self, platforms: Any) -> int:
        found = [i for i, names in enumerate(platforms) if names is None or set(names) & set(self._names)]
        return found[0] if found else len(platforms) - 1

    def _of(self, equation: Any, branch: Mapping[Any, int]) -> Work:
        name, params = equation.primitive.name, equation.params
        if name in self._rules:
            return self._rules[name](self, equation)
        if (product := of_product(equation)) is not None:
            return Work(product)
        if name == "cond":
            chosen, choice = params["branches"], equation.invars[0]
            if not isinstance(choice, jax.extend.core.Literal) and choice in branch:
                return self(chosen[branch[choice]].jaxpr)
            return max((self(each.jaxpr) for each in chosen), key=lambda work: work.flop)
        return sum((self(program) for program in inner(params)), Work())


Rule = Callable[[Counter, Any], Work]
"""`rule(counter, equation)` returns the work of one equation of a jaxpr."""


def _scan(counter: Counter, equation: Any) -> Work:
    return counter(equation.params["jaxpr"].jaxpr) * equation.params["length"]


def _while(counter: Counter, equation: Any) -> Work:
    """Counts one iteration: how many there are is known only at run time."""
    return counter(equation.params["body_jaxpr"].jaxpr).to_at_least()


def _shard_map(counter: Counter, equation: Any) -> Work:
    """Counts the inner program for each device of the axes that it splits."""
    params = equation.params
    # The newer name is that of jax 0.10; an inner `shard_map` splits only the axes that are new there.
    axes = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]
    return counter(params["jaxpr"]) * math.prod(params["mesh"].shape[axis] for axis in axes)


def _pallas_call(counter: Counter, equation: Any) -> Work:
    """Counts what the kernel says of itself, or every step of the grid as if it skipped nothing."""
    grid, said = equation.params["grid_mapping"].grid, equation.params["cost_estimate"]
    if said is not None:
        # A grid whose size is known at run time only says what it computes at most.
        exact = all(isinstance(size, int) for size in grid)
        return Work(said.flops) if exact else Work(said.flops).to_at_most()
    work = counter(equation.params["jaxpr"])
    known = [size for size in grid if isinstance(size, int)]
    work = (work * math.prod(known)).to_at_most() if math.prod(known) != 1 else work
    return work if len(known) == len(grid) else work.to_at_least()


def _on_tpu(counter: Counter, equation: Any) -> Work:
    """Traces the program, which is not traced elsewhere."""
    types = (jax.ShapeDtypeStruct(x.aval.shape, x.aval.dtype) for x in equation.invars)
    return counter(jax.make_jaxpr(equation.params["run"])(*types).jaxpr)


RULES: dict[str, Rule] = {
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
    "on_tpu": _on_tpu,
}
"""What primitives with an inner program cost, by their names. A primitive that hides its program needs an entry."""


def of_function(platform: str, function: Callable[..., Any], *arguments: Any) -> Work:
    """Counts the work of a function for arguments, arrays or shapes; it is traced, not computed.

    >>> import jax.numpy as jnp
    >>> x = jnp.ones((3, 3))
    >>> of_function("cpu", lambda x: jax.lax.fori_loop(0, 7, lambda _, y: y @ x, x), x)
    Work(flop=378.0, bound='')
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    # Compilers drop what no result needs, such as the log-sum-exp of attention.
    used, _ = partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return Counter(platform)(used)
