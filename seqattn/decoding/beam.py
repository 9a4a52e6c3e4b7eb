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
    """What `beam_search` found, the best first.

    A row that offers fewer than `n_best` sequences has empty ones at the end: length 0 and scores of -inf.

    Attributes:
        tokens: `[B, n_best, max_length]` int32, without the first token, with the end token; `pad_token` follows.
        length: tokens of each `[B, n_best]`, the end token counted.
        score: log probability after all penalties `[B, n_best]`, float32.
        log_probability: the sum over the tokens `[B, n_best]`, float32, in nats.
        ended: `[B, n_best]`, whether it has its end token; otherwise its limit cut it.
        failed: `[B]`, whether every hypothesis met logits with NaN or inf, or of -inf alone, or fell below
            `min_log_probability`, before any had ended; such a row has found nothing.
        alignment: what `alignment` said of each step `[B, n_best, max_length, S]`, 0 behind the end; or None.
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
    """The best sequences among those that a beam of `beam_size` hypotheses meets.

    One `lax.while_loop`, for any pure step function; it ends when every row is done, and what a row finds does not
    depend on the others. The `beam_size` best hypotheses by log probability run on; those that end are kept by their
    penalised score, and so are those that the limit cuts. With `beam_size` 1 it is greedy: `generate`.

    What was cut competes with what ended by the score alone, as in Hugging Face: a cut sequence may come first, and
    `Beams.ended` tells them apart. (t5x returns what ended, and what was cut only where nothing ended.)

    Equal scores: the earlier hypothesis, then the lower token. A hypothesis with logits of NaN or inf dies.
    Like `generate` it compiles anew at every call outside `jit`.

    Args:
        step: `step(tokens [R], state) -> (logits [R, V], state)` for the R = B * beam_size hypotheses, row by row.
        state: any pytree, B rows first; widened to the hypotheses here (`Branching` for what is not to be copied).
        first_token: the token `[B]` that is fed first.
        beam_size: hypotheses of a row; it may exceed the vocabulary.
        max_length: most tokens of a sequence, the end token counted.
        end_token: ends a sequence.
        pad_token: fills it up behind its end; it is also fed for what has ended.
        n_best: how many sequences of a row to return.
        length_penalty: how lengths compare; a leaf.
        stopping: when a row is done.
        processors: applied in turn to the log probabilities, which are not normalised again. By default the tokens of
            a `ForcedPrefix` cost what the model says. In Hugging Face, t5x and JoeyNMT they cost nothing, which is
            `PrefixCost.NOTHING`.
        row_limit: most tokens of a sequence, one number or one for each row `[B]`, integers from 1 to `max_length`,
            which is the size of the result. A row finds what it finds alone with that `max_length`. Traced values
            are clipped to this range.
        min_log_probability: hypotheses with a lower total log probability are dropped; one number or one for each row
            `[B]`, in nats. The processor `MinLogProbability` forbids single tokens instead.
        groups: diverse beam search.
        alignment: `alignment(state) -> [R, S]`, the weights of the step that led to this state, to be returned.
        coverage: penalty for a source that was not read, by the sum of `alignment` over the steps.

    Raises:
        ValueError: a size or limit is out of its range, end and pad token are the same, or an array of the state has
            not B rows.

    Going on with 4 is the most probable first step, but all that follows it is worse:

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
    """The hypotheses that go on. Dead ones, and those that are not used at first, have an objective of -inf.

    `objective` is what they compete by: the log probability less what diversity cost. `covered` is the attention that
    the source was given so far, `said` the tokens so far; each only where something looks at it.
    """

    objective: Float[Array, "B beams"]
    log_probability: Float[Array, "B beams"]
    covered: Float[Array, "B beams S"] | None
    said: Int[Array, "B beams L"] | None


@pytree
@dataclasses.dataclass(frozen=True)
class _Ended:
    """The best sequences of each group so far, best first; where there is none, the score is -inf.

    `last` is the last token and `parent` the hypothesis that said it: from there the trace leads back.
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
    """What a step changes; `done` says of which groups nothing changes any more."""

    index: Int[Array, ""]
    fed: Int[Array, "R"]
    state: Any
    running: _Running
    ended: _Ended
    trace: Trace
    done: Bool[Array, "B G"]


def _or_gone(normaliser: Normaliser, works: Bool[Array, "B beams"]) -> Normaliser:
    return dataclasses.replace(normaliser, log_total=jnp.where(works, normaliser.log_total, jnp.inf))


@dataclasses.dataclass(frozen=True)
class _Search:
    """What all steps of one search have in common."""

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
        rows, beams = self.first.shape
        count = 1 if self.groups is None else self.groups.count
        return rows, count, beams // count

    def start(self, state: Any) -> _Loop:
        rows, num_groups, group_size = self.group_shape
        beams = self.first.shape[1]
        state = states.branch(state, beams)
        source = self._source_length(state)
        # One hypothesis of each group is enough: the others would repeat it.
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
        if self.alignment is None:
            return 0
        _, state = jax.eval_shape(self.step, self.first.reshape(-1), state)
        weights = jax.eval_shape(self.alignment, state)
        if getattr(weights, "shape", ())[:-1] != (self.first.size,):
            raise ValueError(f"alignment must give weights [R, S] for {self.first.size} hypotheses, got {weights}")
        return weights.shape[-1]

    def is_unfinished(self, loop: _Loop) -> Bool[Array, ""]:
        return (loop.index < self.max_length) & ~jnp.all(loop.done)

    def advance(self, loop: _Loop) -> _Loop:
        logits, state = self.step(loop.fed, loop.state)
        weights, covered = self._attended(state, loop.running)
        adjustment = self._adjustment(covered)
        scores, normaliser = self._scores(logits, loop)
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
        ended = self._merge(loop, candidates, adjustment)
        done = loop.done | self._is_done(loop.index + 1, going_on, ended, adjustment)
        token, parent = (leaf.reshape(self.first.shape) for leaf in (going_on.token, going_on.parent))
        is_fed = (going_on.objective > -jnp.inf) & ~done[..., None]
        return _Loop(
            index=loop.index + 1,
            fed=jnp.where(is_fed, going_on.token, self.pad_token).reshape(-1),
            state=states.select(state, parent),
            running=self._run_on(loop, going_on, covered, done),
            ended=ended,
            trace=loop.trace.write(Trace(token, parent, weights), loop.index),
            done=done,
        )

    def _attended(self, state: Any, running: _Running) -> tuple[Array | None, Array | None]:
        """What this step attended to, and what all have, this one included."""
        if self.alignment is None:
            return None, None
        weights = self.alignment(state).astype(jnp.float32)
        weights = weights.reshape(*self.first.shape, weights.shape[-1])
        return weights, None if running.covered is None else running.covered + weights

    def _adjustment(self, covered: Array | None) -> Float[Array, "B beams"]:
        """What is added to the penalised scores of the hypotheses."""
        if self.coverage is None or covered is None:
            return jnp.zeros(self.first.shape, jnp.float32)
        return self.coverage(covered)

    def _scores(self, logits: Array, loop: _Loop) -> tuple[Float[Array, "B beams V"], Normaliser]:
        """What the tokens compete by, and what makes log probabilities of it: of -inf where a hypothesis must die."""
        check_logits(logits, self.first.size, self.end_token)
        logits = logits.reshape(*self.first.shape, logits.shape[-1])
        normaliser = Normaliser.of(logits.astype(jnp.float32))
        if loop.running.said is None:
            return logits, _or_gone(normaliser, normaliser.is_finite)
        history = History(loop.running.said, loop.index, self.first)
        scores = process(self.processors, normaliser.log_probabilities(logits), history)
        works = normaliser.is_finite & jnp.isfinite(scores.max(axis=-1))
        zero = jnp.zeros(works.shape, jnp.float32)
        return scores, _or_gone(Normaliser(zero, zero), works)

    def _merge(self, loop: _Loop, candidates: Candidates, adjustment: Float[Array, "B beams"]) -> _Ended:
        """The best that have ended so far.

        Of the candidates only as many as may run are looked at; the others are there to replace those that end.
        """
        _, _, size = self.group_shape
        length = loop.index + 1
        is_among_best = jnp.arange(candidates.token.shape[-1])[None, None] < size
        has_ended = (candidates.token == self.end_token) | (length >= self.limit)[:, None, None]
        counts = has_ended & is_among_best & (candidates.objective > -jnp.inf) & ~loop.done[..., None]
        score = self._score(candidates, length, adjustment)
        new = _Ended(
            score=jnp.where(counts, score, -jnp.inf),
            log_probability=candidates.log_probability,
            length=jnp.broadcast_to(length, counts.shape),
            parent=candidates.parent,
            last=candidates.token,
        )
        both = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), loop.ended, new)
        return both.best(size)

    def _score(
        self, candidates: Candidates, length: Int[Array, ""], adjustment: Float[Array, "B beams"]
    ) -> Float[Array, "B G C"]:
        rows, num_groups, count = candidates.parent.shape
        parents = candidates.parent.reshape(rows, num_groups * count)
        adjusted = take(adjustment, parents).reshape(candidates.parent.shape)
        return self.length_penalty(candidates.log_probability, length.reshape(1, 1, 1)) + adjusted

    def _is_done(
        self, length: Int[Array, ""], running: Candidates, ended: _Ended, adjustment: Float[Array, "B beams"]
    ) -> Bool[Array, "B G"]:
        alive = running.objective > -jnp.inf
        worst = ended.score[..., -1]  # -inf as long as fewer have ended than may
        nothing_left = ~jnp.any(alive, axis=-1)
        if self.stopping is Stopping.FIRST:
            return nothing_left | (worst > -jnp.inf)
        if self.stopping is Stopping.LIKELY:
            scores = jnp.where(alive, self._score(running, length, adjustment), -jnp.inf)
            return nothing_left | (scores.max(axis=-1) <= worst)
        # The coverage penalty is never above 0, and may come to be that.
        best = jnp.where(alive, running.log_probability, -jnp.inf).max(axis=-1)
        bound = reachable(self.length_penalty, best, length, self.max_length, limit=self.limit, gain=self.gain)
        return nothing_left | (bound <= worst)

    def _run_on(self, loop: _Loop, going_on: Candidates, covered: Array | None, done: Bool[Array, "B G"]) -> _Running:
        # A group that is done says nothing more: what its hypotheses would say must not steer the other groups.
        going_on = dataclasses.replace(going_on, objective=jnp.where(done[..., None], -jnp.inf, going_on.objective))
        token, parent, objective, log_probability = (
            leaf.reshape(self.first.shape)
            for leaf in (going_on.token, going_on.parent, going_on.objective, going_on.log_probability)
        )
        said = loop.running.said
        if said is not None:
            said = of_hypotheses(said, parent)
            said = jax.lax.dynamic_update_slice_in_dim(said, token[..., None], loop.index, axis=2)
        return _Running(objective, log_probability, None if covered is None else of_hypotheses(covered, parent), said)

    def result(self, loop: _Loop, n_best: int) -> Beams:
        """The best of all groups, with their tokens from the trace."""
        every = jax.tree.map(lambda leaf: leaf.reshape(self.first.shape), loop.ended)
        best = every.best(n_best)
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
