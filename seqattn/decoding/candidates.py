"""One step of a beam: which continuations of the hypotheses are the best, and which of those go on."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqattn.checks import check_integer, check_range
from seqattn.decoding.penalties import scalar
from seqattn.decoding.processors import Number
from seqattn.pytrees import pytree
from seqattn.top_k import Normaliser, top_k


@pytree
@dataclasses.dataclass(frozen=True)
class DiverseGroups:
    """The hypotheses of a row in groups that avoid one another (Vijayakumar 2016, Hamming diversity).

    Inside a step the groups choose one after the other, each by a beam search of its own, and for a later one a token's
    log probability is lowered by `strength` times the number of hypotheses of earlier groups that just went on with it.
    What that costs steers the group for good; the scores of what ended are without it, so that groups compare.

    Attributes:
        count: how many groups; the beam size is a multiple of it; static.
        strength: at least 0, one number; a leaf.

    Two groups may end with the same sequence, which then is twice among the best.
    """

    count: int = dataclasses.field(metadata={"static": True})
    strength: Number = 0.5

    def __post_init__(self) -> None:
        check_integer("count", self.count, minimum=1)
        check_range("strength", self.strength, minimum=0)


@pytree
@dataclasses.dataclass(frozen=True)
class Candidates:
    """Continuations of hypotheses by one token, best first.

    Attributes:
        objective: what they compete by: the log probability less what diversity cost; -inf for what cannot be.
        log_probability: of all tokens.
        parent: the hypothesis that is continued, counted in its row.
        token: with which it is.
    """

    objective: Float[Array, "*B C"]
    log_probability: Float[Array, "*B C"]
    parent: Int[Array, "*B C"]
    token: Int[Array, "*B C"]

    def take(self, objective: Float[Array, "*B C"], count: int) -> "Candidates":
        """The `count` best by another objective."""
        objective, places = top_k(objective, count)
        chosen = take(self, places)
        return dataclasses.replace(chosen, objective=objective)


Tree = TypeVar("Tree")


def take(tree: Tree, places: Int[Array, "*B C"]) -> Tree:
    """The elements at these places of the last axis of every array."""
    return jax.tree.map(lambda leaf: jnp.take_along_axis(leaf, places, axis=-1, mode="promise_in_bounds"), tree)


def choose(
    scores: Float[Array, "B beams V"],
    normaliser: Normaliser,
    objective: Float[Array, "B beams"],
    log_probability: Float[Array, "B beams"],
    *,
    groups: DiverseGroups | None,
    end_token: int,
    is_last: Bool[Array, "B"],
    floor: Float[Array, "#B"] | None,
) -> tuple[Candidates, Candidates]:
    """The best continuations of each group `[B, G, C]`, and those that go on `[B, G, K]`, of a beam of G * K.

    There are so many candidates that K can go on even if the K best end. A beam of one alone has no other: where it has
    ended, it is done, and so it is greedy.

    Args:
        scores: log probabilities plus the normaliser: raw logits do. What they have in common does not change their
            order, so nothing of size V is written for it.
        normaliser: of them; its log_total is inf where the hypothesis cannot go on.
        objective: of the hypotheses.
        log_probability: of the hypotheses.
        groups: diversity, if wanted.
        end_token: ends a hypothesis.
        is_last: whether this step ends all hypotheses of a row.
        floor: the least log probability of a hypothesis, if there is one; what has less cannot be.
    """
    num_groups, strength = (1, 0.0) if groups is None else (groups.count, groups.strength)
    size, vocab_size = scores.shape[1] // num_groups, scores.shape[-1]
    count = min(1 if scores.shape[1] == 1 else 2 * size, vocab_size * size)
    crowd: Array | None = None
    candidates, running = [], []
    for group in range(num_groups):
        of_group = slice(group * size, (group + 1) * size)
        own = Normaliser(normaliser.peak[:, of_group], normaliser.log_total[:, of_group])
        continued = _continue(scores[:, of_group], own, crowd, min(count, vocab_size))
        best = _best(continued, objective[:, of_group], log_probability[:, of_group], count, floor)
        best = dataclasses.replace(best, parent=best.parent + group * size)
        is_over = (best.token == end_token) | is_last[:, None]
        going_on = best.take(jnp.where(is_over, -jnp.inf, best.objective), size)
        candidates.append(best)
        running.append(going_on)
        if group + 1 < num_groups:
            lowered = scalar(strength) * _count_tokens(going_on, vocab_size)
            crowd = lowered if crowd is None else crowd + lowered
    return _stack(candidates), _stack(running)


def _continue(
    scores: Float[Array, "B K V"], normaliser: Normaliser, crowd: Float[Array, "B V"] | None, count: int
) -> tuple[Array, Array, Array]:
    """The best tokens of each hypothesis: what they add to its objective and to its log probability, and which."""
    gone = jnp.isposinf(normaliser.log_total)[..., None]
    if crowd is None:
        best, tokens = top_k(scores, count)
        gain = jnp.where(gone, -jnp.inf, normaliser.log_probabilities(best))
        return gain, gain, tokens
    best, tokens = top_k(scores.astype(jnp.float32) - crowd[:, None], count)
    plain = take(scores, tokens)
    gain, plain = (jnp.where(gone, -jnp.inf, normaliser.log_probabilities(values)) for values in (best, plain))
    return gain, plain, tokens


def _best(
    continued: tuple[Array, Array, Array],
    objective: Float[Array, "B K"],
    log_probability: Float[Array, "B K"],
    count: int,
    floor: Float[Array, "#B"] | None,
) -> Candidates:
    """Of all continuations of one group."""
    gain, plain, tokens = continued
    rows, hypotheses, each = gain.shape
    parent = jnp.arange(hypotheses, dtype=jnp.int32)[None, :, None]
    every = Candidates(
        objective=(objective[..., None] + gain).reshape(rows, hypotheses * each),
        log_probability=(log_probability[..., None] + plain).reshape(rows, hypotheses * each),
        parent=jnp.broadcast_to(parent, gain.shape).reshape(rows, hypotheses * each),
        token=tokens.astype(jnp.int32).reshape(rows, hypotheses * each),
    )
    possible = every.objective
    if floor is not None:
        possible = jnp.where(every.log_probability < floor[:, None], -jnp.inf, possible)
    return every.take(possible, min(count, hypotheses * each))


def _count_tokens(running: Candidates, vocab_size: int) -> Float[Array, "B V"]:
    """How many of the hypotheses that go on do so with each token."""
    same = running.token[..., None] == jnp.arange(vocab_size, dtype=jnp.int32)[None, None]
    return jnp.sum(same & (running.objective > -jnp.inf)[..., None], axis=1).astype(jnp.float32)


def _stack(groups: list[Candidates]) -> Candidates:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *groups)
