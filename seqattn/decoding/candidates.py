"""One step of beam search: ranks the continuations of all hypotheses and picks the ones that stay live."""

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
    """Diverse beam search: groups of hypotheses that avoid each other's tokens (Vijayakumar 2018, Algorithm 1; arXiv
    1610.02424).

    The beam of a row is split into groups. Within a step the groups choose in order, each with a beam search of its
    own. Before a later group chooses, each token loses `strength` times the number of live hypotheses of earlier groups
    that just chose it (the paper's Hamming diversity; `strength` is its lambda). This penalty accumulates in the
    objective that ranks live hypotheses. Final scores exclude it, so that groups are comparable.

    Attributes:
        count: the number of groups, at least 1; must divide the beam size; static.
        strength: the penalty per hypothesis, in nats; at least 0, one number for all rows; a leaf. Defaults to 0.5; the
            paper recommends 0.2 to 0.8.

    Raises:
        ValueError: `count` or `strength` is out of range.

    Two groups may finish the same sequence, which then appears twice in the results.
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
        objective: what ranks them: the log probability minus the diversity penalty; -inf for an impossible
            continuation.
        log_probability: the sum over all tokens, in nats.
        parent: the index of the continued hypothesis within its row.
        token: the token that continues it.
    """

    objective: Float[Array, "*B C"]
    log_probability: Float[Array, "*B C"]
    parent: Int[Array, "*B C"]
    token: Int[Array, "*B C"]

    def take(self, objective: Float[Array, "*B C"], count: int) -> "Candidates":
        """Returns the `count` best by another objective."""
        objective, places = top_k(objective, count)
        chosen = take(self, places)
        return dataclasses.replace(chosen, objective=objective)


Tree = TypeVar("Tree")


def take(tree: Tree, places: Int[Array, "*B C"]) -> Tree:
    """Returns the elements at these places of the last axis of each array."""
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
    """Returns the best continuations of each group `[B, G, C]`, and the ones that stay live `[B, G, K]`.

    The beam has G groups of K hypotheses. C is 2 K if the vocabulary allows: even if the K best candidates all end, K
    others remain. With a single hypothesis in the beam C is 1, so the search stops at its first end token and stays
    greedy.

    Args:
        scores: log probabilities, up to a constant per hypothesis: raw logits will do. The constant does not change the
            order within a hypothesis, so no normalised array of size V is written.
        normaliser: turns `scores` into log probabilities; its `log_total` is inf where the hypothesis cannot continue.
        objective: ranks the hypotheses before this step.
        log_probability: of the hypotheses before this step, in nats.
        groups: enables diverse beam search.
        end_token: ends a hypothesis.
        is_last: True for rows whose hypotheses all end with this step.
        floor: the lowest log probability a hypothesis may have, in nats; None for no limit.
    """
    num_groups, strength = (1, 0.0) if groups is None else (groups.count, groups.strength)
    size, vocab_size = scores.shape[1] // num_groups, scores.shape[-1]
    # Each hypothesis has one end-token continuation, so at most K of 2 K candidates end and K stay live. With only K
    # candidates, a step in which some end would shrink the beam for good.
    count = min(1 if scores.shape[1] == 1 else 2 * size, vocab_size * size)
    # `crowd` is the diversity penalty per token. None for the first group, which is a plain beam search.
    crowd: Array | None = None
    candidates, running = [], []
    for group in range(num_groups):
        # Groups choose one after the other, since each must see the tokens of the groups before it.
        of_group = slice(group * size, (group + 1) * size)
        own = Normaliser(normaliser.peak[:, of_group], normaliser.log_total[:, of_group])
        # C tokens per hypothesis are enough: in the worst case one hypothesis supplies all C candidates.
        continued = _continue(scores[:, of_group], own, crowd, min(count, vocab_size))
        best = _best(continued, objective[:, of_group], log_probability[:, of_group], count, floor)
        # The caller reorders whole rows, so parents are counted within the row, not the group.
        best = dataclasses.replace(best, parent=best.parent + group * size)
        # Ended candidates stay in `candidates` but not in `running`: nothing may follow an end token.
        is_over = (best.token == end_token) | is_last[:, None]
        going_on = best.take(jnp.where(is_over, -jnp.inf, best.objective), size)
        candidates.append(best)
        running.append(going_on)
        # Counting tokens takes an array of the vocabulary's size, which the last group would not use.
        if group + 1 < num_groups:
            lowered = scalar(strength) * _count_tokens(going_on, vocab_size)
            crowd = lowered if crowd is None else crowd + lowered
    return _stack(candidates), _stack(running)


def _continue(
    scores: Float[Array, "B K V"], normaliser: Normaliser, crowd: Float[Array, "B V"] | None, count: int
) -> tuple[Array, Array, Array]:
    """Returns the best tokens of each hypothesis and what they add to its objective and to its log probability."""
    # Dead hypotheses rank last at -inf. Their logits may be NaN, which would compare arbitrarily.
    gone = jnp.isposinf(normaliser.log_total)[..., None]
    if crowd is None:
        # Rank first and normalise the few survivors: the normaliser is a constant per hypothesis.
        best, tokens = top_k(scores, count)
        gain = jnp.where(gone, -jnp.inf, normaliser.log_probabilities(best))
        return gain, gain, tokens
    # The penalised score decides which tokens are chosen ...
    best, tokens = top_k(scores.astype(jnp.float32) - crowd[:, None], count)
    # ... and the plain one goes into the log probability, so that final scores exclude the penalty.
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
    """Returns the best of all continuations of one group."""
    gain, plain, tokens = continued
    rows, hypotheses, each = gain.shape
    parent = jnp.arange(hypotheses, dtype=jnp.int32)[None, :, None]
    # Flat over hypotheses and tokens, earlier hypotheses first: `top_k` then breaks ties as documented.
    every = Candidates(
        objective=(objective[..., None] + gain).reshape(rows, hypotheses * each),
        log_probability=(log_probability[..., None] + plain).reshape(rows, hypotheses * each),
        parent=jnp.broadcast_to(parent, gain.shape).reshape(rows, hypotheses * each),
        token=tokens.astype(jnp.int32).reshape(rows, hypotheses * each),
    )
    possible = every.objective
    if floor is not None:
        # Pruning uses the log probability: a diversity penalty must not push a probable hypothesis below the floor.
        possible = jnp.where(every.log_probability < floor[:, None], -jnp.inf, possible)
    return every.take(possible, min(count, hypotheses * each))


def _count_tokens(running: Candidates, vocab_size: int) -> Float[Array, "B V"]:
    """Returns how many live hypotheses chose each token."""
    same = running.token[..., None] == jnp.arange(vocab_size, dtype=jnp.int32)[None, None]
    # Empty places hold arbitrary tokens, which must not repel later groups.
    return jnp.sum(same & (running.objective > -jnp.inf)[..., None], axis=1).astype(jnp.float32)


def _stack(groups: list[Candidates]) -> Candidates:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *groups)
