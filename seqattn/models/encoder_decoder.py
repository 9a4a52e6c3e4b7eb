"""The protocol of sequence-to-sequence models: encode, decode with known targets, and decode step by step."""

from typing import Any, Protocol

from jaxtyping import Array, Float, Int, PRNGKeyArray

from seqattn.coordinates import Coordinates

State = Any
"""Everything that the next step needs: a pytree in the form that `seqattn.decoding.Step` expects."""


class EncoderDecoder(Protocol):
    """Protocol that training, decoding and evaluation rely on. All sequence-to-sequence models follow it.

    Shapes use B for batch rows, S for source tokens, T for target tokens, V for the vocabulary, L for attention heads,
    and R for hypotheses: B, or B times the beam size after `seqattn.decoding.branch`.
    """

    def encode(
        self, source: Int[Array, "B S"], source_at: Coordinates, *, dropout_key: PRNGKeyArray | None = None
    ) -> Any:
        """Encodes a source.

        Args:
            source: tokens `[B, S]`.
            source_at: their coordinates. Padding has segment 0.
            dropout_key: if None, nothing is dropped.

        Returns:
            The memory: a pytree with the batch dimension first.
        """

    def decode(
        self, target: Int[Array, "B T"], target_at: Coordinates, memory: Any, *, dropout_key: PRNGKeyArray | None = None
    ) -> Float[Array, "B T V"]:
        """Computes logits with known targets (teacher forcing).

        Args:
            target: tokens `[B, T]`.
            target_at: their coordinates.
            memory: the result of `encode`.
            dropout_key: if None, nothing is dropped.

        Returns:
            Logits `[B, T, V]` of the token after each target token.
        """

    def room(self, source_length: int) -> int | None:
        """Returns how many target tokens fit after a source of `source_length` tokens.

        None if their number is unlimited; below 1 if none fit. Only learned positions set a limit.
        """

    def start(self, memory: Any, max_length: int) -> State:
        """Returns the state before the first step, with room for `max_length` steps."""

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], state: State
    ) -> tuple[Float[Array, "B T V"], State]:
        """Reads many target tokens at once, before a search branches. A text may be read in pieces of any size.

        Args:
            tokens: `[B, T]`.
            lengths: `[B]`, the number of tokens of each row. The rest is padding, which no token sees. In a cache it
                takes room; a recurrent model skips it.
            state: a state with one hypothesis per row.

        Returns:
            Logits `[B, T, V]` of the token after each of `tokens`, and the state after the last one.

        Raises:
            ValueError: the state has several hypotheses per row, or a cache is full. Inside `jit`, where a full cache
                cannot raise, the logits are NaN.
        """

    def step(self, tokens: Int[Array, "R"], state: State) -> tuple[Float[Array, "R V"], State]:
        """Reads one token per hypothesis. The results equal those of `decode`.

        Args:
            tokens: `[R]`.
            state: the state before these tokens.

        Returns:
            Logits `[R, V]` of the token after `tokens`, and the next state.
        """

    def alignment(self, target: Int[Array, "B T"], target_at: Coordinates, memory: Any) -> Float[Array, "B L T S"]:
        """Returns the attention weights `[B, L, T, S]` of L heads from target to source tokens; L may be 0."""
