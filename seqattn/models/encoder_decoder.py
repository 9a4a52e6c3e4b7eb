"""What every sequence-to-sequence model can do: encode, decode with known targets, and decode step by step."""

from typing import Any, Protocol

from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.coordinates import Coordinates

State = Any
"""Everything that the next step needs: a pytree as `seqattn.decoding.Step` wants it."""


class EncoderDecoder(Protocol):
    """The protocol that training, decoding and evaluation rely on; `Seq2Seq` and `Transformer` follow it."""

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Any:
        """The memory of source tokens `[B, S]`: a pytree, batch first."""

    def decode(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: Any, *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T V"]:
        """Logits `[B, T, V]` of the token after each target token `[B, T]`: teacher forcing."""

    def room(self, source_length: int) -> int | None:
        """How many target tokens have a place behind a source of so many: None for any number, below 1 for none.

        Learned positions end; other models go on as long as memory does.
        """

    def start(self, memory: Any, max_length: int) -> State:
        """The state before the first step, with room for `max_length` steps."""

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: State
    ) -> tuple[Float[Array, "B T V"], State]:
        """Many target tokens at once, `lengths[i]` of row i: logits after each, and the state after the last.

        A state of one hypothesis a row: texts are read before a search branches.
        """

    def step(self, tokens: Int[Array, "R"], state: State) -> tuple[Float[Array, "R V"], State]:
        """Logits `[R, V]` of the token after `tokens` `[R]`, and the next state; equal to `decode` step by step.

        R is B, or B times the hypotheses of a row after `seqattn.decoding.branch`.
        """

    def alignment(self, target: Int[Array, "B T"], target_at: Coordinates, memory: Any) -> Float[Array, "B L T S"]:
        """Where each target token looks in the source: weights of L heads, `[B, L, T, S]`; L may be 0."""
