"""Beam search over any step function, in one jitted loop."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from seqattn import hypotheses as states
from seqattn.decoding.arguments import (
    check_limits,
    check_logits,
    check_sizes,
    checked_first_token,
    checked_floor,
    checked_processors,
    checked_row_limit,
)
from seqattn.decoding.candidates import Candidates, DiverseGroups, choose, take
from seqattn.decoding.generate import Step
from seqattn.decoding.penalties import AverageLength, CoveragePenalty, LengthPenalty
from seqattn.decoding.processors import History, LogitsProcessor, Number, highest_after, process
from seqattn.decoding.stopping import Stopping, reachable
from seqattn.decoding.trace import Trace, of_hypotheses
from seqattn.pytrees import pytree
from seqattn.top_k import Normaliser, top_k


@pytree
@dataclasses.dataclass(frozen=True)
class Beams:
    """The sequences that `beam_search` found, best first.

    If a row finds fewer than `n_best` sequences, the remaining places have length 0 and scores of -inf.

    Attributes:
        tokens: `[B, n_best, max_length]` int32. Excludes the first token, includes the end token; `pad_token` follows.
        length: `[B, n_best]` int32, the number of tokens including the end token.
        score: `[B, n_best]` float32, the log probability after the length and coverage penalties.
        log_probability: `[B, n_best]` float32, the sum over the tokens, in nats.
        ended: `[B, n_best]` bool. True if the sequence has its end token, False if the length limit cut it.
        failed: `[B]` bool. True if the row found nothing: before any hypothesis finished, each one met logits with NaN
            or inf, met logits of -inf only, or fell below `min_log_probability`.
        alignment: `[B, n_best, max_length, S]` float32, the weights that `alignment` returned at each step, 0 after the
            end; None without `alignment`.
    """

    tokens: Int[Array, "*B n_best L"]
    length: Int[Array, "*B n_best"]
    score: Float[Array, "*B n_best"]
    log_probability: Float[Array, "*B n_best"]
    ended: Bool[Array, "*B n_best"]
    failed: Bool[Array, "*B"]
    alignment: Float[Array, "*B n_best L S"] | None


_AVERAGE = AverageLength(1.0)


def beam_search(
    step: Step,
    state: Any,
    first_token: Int[Array, "B"],
    *,
    beam_size: int,
    max_length: int,
    end_token: int,
    pad_token: int = 0,
    n_best: int = 1,
    length_penalty: LengthPenalty = _AVERAGE,
    stopping: Stopping = Stopping.EXACT,
    processors: Sequence[LogitsProcessor] = (),
    row_limit: Number | None = None,
    min_log_probability: Number | None = None,
    groups: DiverseGroups | None = None,
    alignment: Callable[[Any], Float[Array, "R S"]] | None = None,
    coverage: CoveragePenalty | None = None,
) -> Beams:
    """Searches for the sequences with the highest score, with `beam_size` hypotheses per row.

    Works with any pure step function (Sutskever 2014, section 3.2). The search is one `lax.while_loop` that ends when
    every row is done; rows do not affect each other. At each step the `beam_size` best continuations by log probability
    stay live. A hypothesis that ends, or that reaches the limit, moves to a separate list, ranked by its penalised
    score. With `beam_size` 1 the search is greedy and equals `generate`.

    Cut and ended sequences compete by score alone, as in Hugging Face, so a cut sequence may come first. `Beams.ended`
    tells them apart. (t5x returns cut sequences only if none ended.)

    Ties go to the earlier hypothesis, then to the lower token. A hypothesis whose logits contain NaN or inf dies. Each
    call outside `jit` compiles the loop again, as for `generate`.

    Args:
        step: `step(tokens [R], state) -> (logits [R, V], state)` for the R = B * beam_size hypotheses, row by row.
        state: any pytree with B rows on the leading axis. `beam_search` widens it to R; a `Branching` node decides for
            itself what to copy.
        first_token: `[B]` integers, the token that is fed first.
        beam_size: live hypotheses per row, at least 1. May exceed the vocabulary size.
        max_length: maximum number of tokens per sequence, including the end token; at least 1.
        end_token: ends a sequence.
        pad_token: fills a sequence after its end; also fed for finished hypotheses. Must differ from `end_token`.
        n_best: sequences to return per row, from 1 to `beam_size`.
        length_penalty: computes the score from log probability and length; a leaf. Defaults to the mean log probability
            of the tokens.
        stopping: when a row is done.
        processors: applied in order to the log probabilities, which are not normalised again. By default the tokens of
            a `ForcedPrefix` add their model log probability; in Hugging Face, t5x and JoeyNMT they add 0, which is
            `PrefixCost.NOTHING`.
        row_limit: maximum number of tokens, one number or one per row `[B]`, integers from 1 to `max_length`. A row
            finds the same as it does alone with this `max_length`. Traced values are clipped to the range. The result
            keeps the size `max_length`.
        min_log_probability: drops hypotheses with a lower total log probability, in nats; one number or one per row
            `[B]`. To forbid single tokens instead, use the processor `MinLogProbability`.
        groups: enables diverse beam search.
        alignment: `alignment(state) -> [R, S]` returns the attention weights of the step that produced this state.
        coverage: penalises hypotheses that left part of the source unread, by the sum of `alignment` over the steps.
            Requires `alignment`.

    Returns:
        The `n_best` sequences of each row.

    Raises:
        TypeError: `first_token` or `row_limit` is not of integers, or `processors` is not a sequence of processors.
        ValueError: a size or limit is out of range, the end and pad tokens are equal, an array of the state does not
            have B rows, or `step` or `alignment` returns the wrong shape.

    Token 4 is the most probable first step, but every continuation of it is improbable. A beam of 2 avoids the trap:

    >>> table = jnp.log(jnp.full((5, 5), 0.01).at[0, 4].set(0.55).at[0, 3].set(0.42).at[3, 1].set(0.96))
    >>> def step(tokens, state):
    ...     return table[tokens], state
    >>> for size in 1, 2:
    ...     found = beam_search(step, (), jnp.array([0]), beam_size=size, max_length=2, end_token=1)
    ...     print(found.tokens[0, 0], f"{jnp.exp(found.log_probability[0, 0]):.2f}")
    [4 0] 0.11
    [3 1] 0.40
    """
    first_token = checked_first_token(first_token)
    check_limits(max_length, end_token, pad_token)
    check_sizes(beam_size, n_best, groups, alignment, coverage)
    states.check_rows(state, first_token.shape[0])
    processors = checked_processors(processors)
    search = _Search(
        step=step,
        max_length=max_length,
        end_token=end_token,
        pad_token=pad_token,
        length_penalty=length_penalty,
        stopping=stopping,
        processors=processors,
        limit=checked_row_limit(row_limit, max_length, first_token.shape[0]),
        floor=checked_floor(min_log_probability, first_token.shape[0]),
        # Processors bound what a step can add before the loop starts: the stopping rule needs it at every step.
        gain=highest_after(processors, first_token.shape[0]),
        groups=groups,
        alignment=alignment,
        coverage=coverage,
        first=jnp.repeat(first_token[:, None], beam_size, axis=1),
    )
    loop = jax.lax.while_loop(search.is_unfinished, search.advance, search.start(state))
    return search.result(loop, n_best)


@pytree
@dataclasses.dataclass(frozen=True)
class _Running:
    """The live hypotheses. Dead hypotheses, and those unused at the first step, have an objective of -inf.

    `objective` ranks them: the log probability minus the diversity penalty. `covered` is the sum of attention weights
    on each source token so far; `said` holds the tokens so far. Both are None if nothing reads them.
    """

    objective: Float[Array, "B beams"]
    log_probability: Float[Array, "B beams"]
    covered: Float[Array, "B beams S"] | None
    said: Int[Array, "B beams L"] | None


@pytree
@dataclasses.dataclass(frozen=True)
class _Ended:
    """The best finished sequences of each group so far, best first; empty places have a score of -inf.

    `last` is the last token and `parent` the hypothesis that chose it; the trace recovers the rest from there.
    """

    score: Float[Array, "*B K"]
    log_probability: Float[Array, "*B K"]
    length: Int[Array, "*B K"]
    parent: Int[Array, "*B K"]
    last: Int[Array, "*B K"]

    def best(self, count: int) -> "_Ended":
        score, places = top_k(self.score, count)
        return dataclasses.replace(take(self, places), score=score)


@pytree
@dataclasses.dataclass(frozen=True)
class _Loop:
    """The loop carry. `done` marks groups whose results are final."""

    index: Int[Array, ""]
    fed: Int[Array, "R"]
    state: Any
    running: _Running
    ended: _Ended
    trace: Trace
    done: Bool[Array, "B G"]


def _or_gone(normaliser: Normaliser, works: Bool[Array, "B beams"]) -> Normaliser:
    # An infinite normaliser is how `choose` recognises a dead hypothesis: every continuation of it gets -inf.
    return dataclasses.replace(normaliser, log_total=jnp.where(works, normaliser.log_total, jnp.inf))


@dataclasses.dataclass(frozen=True)
class _Search:
    """The constants of one search, and the steps of its loop."""

    step: Step
    max_length: int
    end_token: int
    pad_token: int
    length_penalty: LengthPenalty
    stopping: Stopping
    processors: tuple[LogitsProcessor, ...]
    limit: Int[Array, "B"]
    floor: Float[Array, "#B"] | None
    gain: Float[Array, "B"]
    groups: DiverseGroups | None
    alignment: Callable[[Any], Array] | None
    coverage: CoveragePenalty | None
    first: Int[Array, "B beams"]

    @property
    def group_shape(self) -> tuple[int, int, int]:
        """Returns the numbers of rows, of groups, and of hypotheses per group."""
        rows, beams = self.first.shape
        count = 1 if self.groups is None else self.groups.count
        return rows, count, beams // count

    def start(self, state: Any) -> _Loop:
        """Returns the carry before the first step."""
        rows, num_groups, group_size = self.group_shape
        beams = self.first.shape[1]
        state = states.branch(state, beams)
        # The carry of a while_loop has fixed shapes, so S must be known before the first step.
        source = self._source_length(state)
        # All hypotheses start equal. If all were live, the first step would fill the beam with copies of one sequence,
        # so each group starts from one live hypothesis.
        is_used = jnp.broadcast_to(jnp.arange(beams) % group_size == 0, (rows, beams))
        no_score = jnp.full(self.group_shape, -jnp.inf, jnp.float32)
        none = jnp.zeros(self.group_shape, jnp.int32)
        steps = jnp.zeros((self.max_length, rows, beams), jnp.int32)
        return _Loop(
            index=jnp.zeros((), jnp.int32),
            fed=self.first.reshape(-1),
            state=state,
            running=_Running(
                objective=jnp.where(is_used, 0.0, -jnp.inf),
                log_probability=jnp.zeros((rows, beams), jnp.float32),
                covered=None if self.coverage is None else jnp.zeros((rows, beams, source), jnp.float32),
                said=jnp.zeros((rows, beams, self.max_length), jnp.int32) if self.processors else None,
            ),
            ended=_Ended(no_score, no_score, none, none, none),
            trace=Trace(
                steps, steps, None if self.alignment is None else jnp.zeros((*steps.shape, source), jnp.float32)
            ),
            done=jnp.zeros((rows, num_groups), bool),
        )

    def _source_length(self, state: Any) -> int:
        """Returns S of the alignment; 0 without one."""
        if self.alignment is None:
            return 0
        _, state = jax.eval_shape(self.step, self.first.reshape(-1), state)
        weights = jax.eval_shape(self.alignment, state)
        # Unchecked, a wrong shape would fail later in the loop, far from its cause.
        if getattr(weights, "shape", ())[:-1] != (self.first.size,):
            raise ValueError(f"alignment must give weights [R, S] for {self.first.size} hypotheses, got {weights}")
        return weights.shape[-1]

    def is_unfinished(self, loop: _Loop) -> Bool[Array, ""]:
        # The index bounds the loop: a model may never produce the end token.
        return (loop.index < self.max_length) & ~jnp.all(loop.done)

    def advance(self, loop: _Loop) -> _Loop:
        # One model call serves all hypotheses of all rows. Dead ones are fed padding and ignored below.
        """Takes one step: expand, prune, record finished sequences, apply the stopping rule, reorder the state."""
        logits, state = self.step(loop.fed, loop.state)
        weights, covered = self._attended(state, loop.running)
        adjustment = self._adjustment(covered)
        scores, normaliser = self._scores(logits, loop)
        # The expansion: rank every continuation of every hypothesis, and keep the best per group.
        candidates, going_on = choose(
            scores,
            normaliser,
            loop.running.objective,
            loop.running.log_probability,
            groups=self.groups,
            end_token=self.end_token,
            is_last=loop.index + 1 >= self.limit,
            floor=self.floor,
        )
        # Finished sequences go to a list of their own. In the beam they would take up places and grow past their end.
        ended = self._merge(loop, candidates, adjustment)
        # Once done, always done: a later, worse set of live hypotheses must not reopen a row.
        done = loop.done | self._is_done(loop.index + 1, going_on, ended, adjustment)
        token, parent = (leaf.reshape(self.first.shape) for leaf in (going_on.token, going_on.parent))
        # A fixed token for dead hypotheses keeps their arbitrary choices out of the step function.
        is_fed = (going_on.objective > -jnp.inf) & ~done[..., None]
        return _Loop(
            index=loop.index + 1,
            fed=jnp.where(is_fed, going_on.token, self.pad_token).reshape(-1),
            # Caches follow the hypothesis that was continued, else a survivor would read another one's past.
            state=states.select(state, parent),
            running=self._run_on(loop, going_on, covered, done),
            ended=ended,
            trace=loop.trace.write(Trace(token, parent, weights), loop.index),
            done=done,
        )

    def _attended(self, state: Any, running: _Running) -> tuple[Array | None, Array | None]:
        """Returns the weights of this step `[B, beams, S]` and the coverage including it; None for either if unused."""
        if self.alignment is None:
            return None, None
        weights = self.alignment(state).astype(jnp.float32)
        weights = weights.reshape(*self.first.shape, weights.shape[-1])
        return weights, None if running.covered is None else running.covered + weights

    def _adjustment(self, covered: Array | None) -> Float[Array, "B beams"]:
        """Returns the coverage penalty, which is added to the length-penalised scores."""
        if self.coverage is None or covered is None:
            return jnp.zeros(self.first.shape, jnp.float32)
        return self.coverage(covered)

    def _scores(self, logits: Array, loop: _Loop) -> tuple[Float[Array, "B beams V"], Normaliser]:
        """Returns the ranking scores and their normaliser, whose `log_total` is inf for hypotheses that must die."""
        check_logits(logits, self.first.size, self.end_token)
        logits = logits.reshape(*self.first.shape, logits.shape[-1])
        normaliser = Normaliser.of(logits.astype(jnp.float32))
        # Without processors, raw logits rank as log probabilities do. Skipping the log-softmax saves an array of the
        # vocabulary's size per hypothesis.
        if loop.running.said is None:
            return logits, _or_gone(normaliser, normaliser.is_finite)
        history = History(loop.running.said, loop.index, self.first)
        scores = process(self.processors, normaliser.log_probabilities(logits), history)
        # The second test catches processors that forbid every token the model allows.
        works = normaliser.is_finite & jnp.isfinite(scores.max(axis=-1))
        # Not normalised again: that would hand the probability of forbidden tokens to the others.
        zero = jnp.zeros(works.shape, jnp.float32)
        return scores, _or_gone(Normaliser(zero, zero), works)

    def _merge(self, loop: _Loop, candidates: Candidates, adjustment: Float[Array, "B beams"]) -> _Ended:
        """Merges newly finished candidates into the best finished sequences.

        Only the first K candidates count, where K is the group size; the rest only replace finished ones in the beam.
        """
        _, _, size = self.group_shape
        length = loop.index + 1
        # An end token ranked below K would not have survived in a beam of K, so keeping it would search a wider beam
        # than requested.
        is_among_best = jnp.arange(candidates.token.shape[-1])[None, None] < size
        # A sequence that the limit cuts is also final: it enters the ranking instead of vanishing.
        has_ended = (candidates.token == self.end_token) | (length >= self.limit)[:, None, None]
        counts = has_ended & is_among_best & (candidates.objective > -jnp.inf) & ~loop.done[..., None]
        # Penalties apply only now. Live hypotheses have equal lengths, so a length penalty cannot reorder them.
        score = self._score(candidates, length, adjustment)
        new = _Ended(
            score=jnp.where(counts, score, -jnp.inf),
            log_probability=candidates.log_probability,
            length=jnp.broadcast_to(length, counts.shape),
            parent=candidates.parent,
            last=candidates.token,
        )
        # Older sequences come first, so that ties keep the one found earlier.
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), loop.ended, new)
        return both.best(size)

    def _score(
        self, candidates: Candidates, length: Int[Array, ""], adjustment: Float[Array, "B beams"]
    ) -> Float[Array, "B G C"]:
        """Returns the final scores of candidates of this length."""
        rows, num_groups, count = candidates.parent.shape
        # The step belongs to the parent: coverage is indexed by it, not by the new hypothesis.
        parents = candidates.parent.reshape(rows, num_groups * count)
        adjusted = take(adjustment, parents).reshape(candidates.parent.shape)
        return self.length_penalty(candidates.log_probability, length.reshape(1, 1, 1)) + adjusted

    def _is_done(
        self, length: Int[Array, ""], running: Candidates, ended: _Ended, adjustment: Float[Array, "B beams"]
    ) -> Bool[Array, "B G"]:
        """Returns the groups that the stopping rule ends."""
        alive = running.objective > -jnp.inf
        # -inf until K sequences have finished: before that, any live hypothesis can still enter the list.
        worst = ended.score[..., -1]
        nothing_left = ~jnp.any(alive, axis=-1)
        if self.stopping is Stopping.FIRST:
            return nothing_left | (worst > -jnp.inf)
        if self.stopping is Stopping.LIKELY:
            # A heuristic: a longer hypothesis may still score better, if the penalty rewards length.
            scores = jnp.where(alive, self._score(running, length, adjustment), -jnp.inf)
            return nothing_left | (scores.max(axis=-1) <= worst)
        # The bound leaves coverage out: it is at most 0 and may still rise to 0 as the source gets read.
        best = jnp.where(alive, running.log_probability, -jnp.inf).max(axis=-1)
        bound = reachable(self.length_penalty, best, length, self.max_length, limit=self.limit, gain=self.gain)
        return nothing_left | (bound <= worst)

    def _run_on(self, loop: _Loop, going_on: Candidates, covered: Array | None, done: Bool[Array, "B G"]) -> _Running:
        # A finished group must not choose tokens: its choices would push later groups away from them.
        """Returns the live hypotheses for the next step."""
        going_on = dataclasses.replace(going_on, objective=jnp.where(done[..., None], -jnp.inf, going_on.objective))
        token, parent, objective, log_probability = (
            leaf.reshape(self.first.shape)
            for leaf in (going_on.token, going_on.parent, going_on.objective, going_on.log_probability)
        )
        said = loop.running.said
        if said is not None:
            # Processors read whole hypotheses, so here, unlike in the trace, tokens move with their hypothesis.
            said = of_hypotheses(said, parent)
            said = jax.lax.dynamic_update_slice_in_dim(said, token[..., None], loop.index, axis=2)
        return _Running(objective, log_probability, None if covered is None else of_hypotheses(covered, parent), said)

    def result(self, loop: _Loop, n_best: int) -> Beams:
        """Returns the best sequences over all groups, with their tokens recovered from the trace."""
        every = jax.tree.map(lambda leaf: leaf.reshape(self.first.shape), loop.ended)
        best = every.best(n_best)
        # Empty places must not expose leftovers of the buffers as tokens or scores.
        found = best.score > -jnp.inf
        length = jnp.where(found, best.length, 0)
        tokens, alignment = loop.trace.walk_back(best.last, best.parent, length, self.pad_token)
        return Beams(
            tokens=tokens,
            length=length,
            score=best.score,
            log_probability=jnp.where(found, best.log_probability, -jnp.inf),
            ended=found & (best.last == self.end_token),
            failed=~jnp.any(found, axis=-1),
            alignment=alignment,
        )
