"""How a model generates text unless a command says otherwise."""

import dataclasses

from seqattn.decoding import AverageLength, LengthPenalty, Stopping


@dataclasses.dataclass(frozen=True)
class Decoding:
    """The defaults of a model. Models of this program have the values below."""

    beam_size: int = 1
    """Number of hypotheses per text; 1 is greedy search."""
    length_penalty: LengthPenalty = AverageLength(1.0)
    """How scores of hypotheses of different lengths are compared."""
    stopping: Stopping = Stopping.EXACT
    """When the search of a text stops."""
    max_length: int | None = None
    """Maximum number of tokens of an output, including the end token. If None, it depends on the text."""
    min_length: int = 0
    """Minimum number of tokens of an output, including the end token."""
    repetition_penalty: float | None = None
    """Above 1, makes tokens that were already generated less probable."""
    no_repeat_ngram: int | None = None
    """Never generate the same sequence of this many tokens twice."""
    banned: tuple[int, ...] = ()
    """Tokens that are never generated."""
    temperature: float | None = None
    """Divides the logits in sampling."""
    top_k: int | None = None
    """Sample from the k most probable tokens."""
    top_p: float | None = None
    """Sample from the fewest tokens whose probabilities sum to at least this."""
