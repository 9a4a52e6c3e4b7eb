"""Text to text with a trained model: `python -m train.translate RUN [TEXT ...]`.

Standard output holds translations and nothing else, in the order of the texts, each as soon as it is known: a line for
each text, or, with `--n_best N` above 1, exactly N lines, the best first: score, tab, translation. The score is the log
probability in nats after the length penalty. An empty text has an empty translation, with the score 0; where fewer
than N were found, the score is -inf; where the model's logits were not finite, it is nan and the translation [FAILED].
A line break inside a translation becomes a space.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from seqattn.checks import check_seed, check_sizes
from seqattn.decoding import (
    GNMT,
    AverageLength,
    Greedy,
    LengthPenalty,
    LogitsProcessor,
    MinLength,
    MinP,
    NoPenalty,
    NoRepeatNgram,
    RepetitionPenalty,
    Sample,
    Stopping,
    Temperature,
    TopK,
    TopP,
)
from seqattn.models import Seq2SeqConfig
from train import objectives
from train.checkpoints.run import Run
from train.data.standard_input import lines_as_they_come, lines_left, standard_input
from train.data.tokenizer import Tokenizer
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import exported
from train.hub.exported import Exported
from train.inference.translator import Beam, Output, Search, Translator
from train.objectives import pictures
from train.reports.progress import Progress

_KINDS: dict[str, Callable[..., LengthPenalty]] = {"average": AverageLength, "gnmt": GNMT}
_FILTERS: dict[str, Callable[[Any], LogitsProcessor]] = {
    "temperature": Temperature,
    "top_k": TopK,
    "top_p": TopP,
    "min_p": MinP,
}
_BATCHES_READ = 16


def penalty_of(text: str) -> LengthPenalty:
    """The length penalty that a user writes: "none", or a kind, and a number behind a colon.

    >>> penalty_of("gnmt:0.7"), penalty_of("average"), penalty_of("none")
    (GNMT(alpha=0.7), AverageLength(power=1.0), NoPenalty())
    """
    kind, colon, number = text.partition(":")
    try:
        if text == "none":
            return NoPenalty()
        return _KINDS[kind](float(number)) if colon else _KINDS[kind]()
    except (KeyError, ValueError) as error:
        raise ValueError(f"length_penalty ({text}) must be average:NUMBER, gnmt:NUMBER or none") from error


def _written(penalty: LengthPenalty) -> list[str]:
    if isinstance(penalty, GNMT):
        return [f"gnmt:{penalty.alpha}"]
    return [f"average:{penalty.power}" if isinstance(penalty, AverageLength) else "none"]


_PENALTY = tyro.constructors.PrimitiveConstructorSpec[LengthPenalty](
    nargs=1,
    metavar="average:POWER|gnmt:ALPHA|none",
    instance_from_str=lambda words: penalty_of(words[0]),
    is_instance=lambda value: isinstance(value, LengthPenalty),
    str_from_instance=_written,
)


@dataclass(frozen=True)
class Arguments(OwnCode):
    """Translates texts, or standard input line by line, with the latest model of a run: the most probable token first,
    a beam of hypotheses (--beam_size), or at random (any of --temperature, --top_k, --top_p, --min_p, --seed)."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to translate; without any, lines of standard input."""
    beam_size: int = 1
    """Hypotheses of a text; 1 is greedy."""
    length_penalty: Annotated[LengthPenalty, _PENALTY] = AverageLength(1.0)
    """How the hypotheses of a beam compare: log probability / length ** POWER, / ((5 + length) / 6) ** ALPHA (Wu 2016),
    or as it is."""
    stopping: Stopping = Stopping.EXACT
    """When a beam is done: as soon as so many have ended, when a better one is unlikely, or when there can be none."""
    n_best: int = 1
    """Translations of a text, at most beam_size; above 1 so many lines for each text: score, tab, translation."""
    max_length: int | None = None
    """Most tokens of a translation, its end counted; by default twice as many as the text has, and some
    more; never more than the model has learned positions."""
    min_length: int = 0
    """Fewest tokens of a translation, its end counted."""
    temperature: float | None = None
    """Sample with the logits divided by this: below 1 what is probable becomes more so."""
    top_k: int | None = None
    """Sample from so many most probable tokens."""
    top_p: float | None = None
    """Sample from the fewest tokens that are so probable together."""
    min_p: float | None = None
    """Sample from tokens that are at least so probable, as a share of the most probable one."""
    seed: int | None = None
    """Sample with this seed, 0 to 2**32 - 1; 0 where another of these flags is given."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens less probable that were said before."""
    no_repeat_ngram: int | None = None
    """Never say so many tokens in a row twice."""
    batch_size: int = 64
    """Most texts translated together."""
    average: int | None = None
    """Translate with the mean of the parameters of so many of the latest checkpoints (Vaswani 2017, section 6.1); by
    default of as many as the run's figures are of."""
    plot: Path | None = None
    """Draw where the model looks while it translates the texts of the command line: FILE.png and FILE.svg, and all
    heads beside it; FILE-1 and so on of several texts."""


def search_of(arguments: Arguments) -> Search:
    """How translations are found.

    Raises:
        ValueError: a value out of its range, or flags that exclude each other.
    """
    beam = Beam(arguments.beam_size, arguments.n_best, arguments.length_penalty, arguments.stopping)
    for name in ("length_penalty", "stopping") if beam.size == 1 else ():
        if getattr(arguments, name) != getattr(Arguments, name):
            raise ValueError(f"--{name} is of a beam of hypotheses, and beam_size is 1: it would do nothing")
    values = {name: getattr(arguments, name) for name in (*_FILTERS, "seed")}
    given = [name for name, value in values.items() if value is not None]
    if not given:
        return Greedy() if beam.size == 1 else beam
    if beam.size > 1:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"{flags}: sampling has one hypothesis, beam_size ({beam.size}) must be 1")
    check_seed(arguments.seed or 0)
    return Sample(tuple(_made(name, _FILTERS[name], values[name]) for name in given if name in _FILTERS))


def processors_of(arguments: Arguments) -> tuple[LogitsProcessor, ...]:
    """What translations may hold.

    Raises:
        ValueError: a value out of its range.
    """
    made: list[LogitsProcessor] = []
    if arguments.repetition_penalty is not None:
        made.append(_made("repetition_penalty", RepetitionPenalty, arguments.repetition_penalty))
    if arguments.no_repeat_ngram is not None:
        made.append(_made("no_repeat_ngram", NoRepeatNgram, arguments.no_repeat_ngram))
    if arguments.min_length:
        made.append(_made("min_length", lambda length: MinLength(length, Tokenizer.end_id), arguments.min_length))
    return tuple(made)


def _made(name: str, kind: Callable[[Any], LogitsProcessor], value: Any) -> LogitsProcessor:
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from error


def _check(arguments: Arguments) -> None:
    """Refuses what no model is needed to see."""
    longest, plot = arguments.max_length, arguments.plot
    given = {"batch_size": arguments.batch_size, "average": arguments.average, "max_length": longest}
    check_sizes(**{name: value for name, value in given.items() if value is not None})
    if longest is not None and arguments.min_length > longest:
        raise ValueError(f"min_length ({arguments.min_length}) must be at most max_length ({longest})")
    if plot is not None and not arguments.text:
        raise ValueError("--plot draws the texts of the command line, and there is none; standard input is not drawn")
    if plot is not None and not plot.name:
        raise ValueError(f"--plot ({plot}) must name a file")


def main(arguments: Arguments) -> int:
    """Prints the translations; returns the exit code."""
    _check(arguments)
    search, processors = search_of(arguments), processors_of(arguments)
    trained = exported.load_trained(arguments.run, average=arguments.average)
    exported.check_serves(trained, "translate", objectives.SequenceToSequence)
    exported.check_task(trained, arguments.experiment)
    config = trained.model.config
    if arguments.plot is not None and isinstance(config, Seq2SeqConfig) and config.attention is None:
        raise ValueError(f"--plot: the model of {arguments.run} has no attention (its attention is None): no map")
    translator = Translator(
        *(trained.model, trained.tokenizer),
        batch_size=arguments.batch_size,
        search=search,
        processors=processors,
        max_length=arguments.max_length,
        seed=arguments.seed or 0,
    )
    best: list[str] = []
    try:
        with _progress(arguments.text) as progress:
            for number, outputs in enumerate(translator.stream(_chunks(arguments)), 1):
                _print(outputs)
                if progress is not None:
                    progress.update(number)
                if arguments.plot is not None:
                    best.append(outputs[0].text)
    except BrokenPipeError:  # who reads the translations has enough of them
        # The interpreter flushes standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if arguments.plot is not None:
        _draw(trained, arguments.text, best, arguments.plot)
    return 0


def _print(outputs: list[Output]) -> None:
    for output in outputs:
        line = output.text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")
        print(line if len(outputs) == 1 else f"{output.score:.4f}\t{line}", flush=True)


def _draw(trained: Run | Exported, texts: Sequence[str], outputs: Sequence[str], file: Path) -> None:
    """Says on standard error where the maps are, or that there is none: of an empty text, or where the model failed."""
    stem = file.with_suffix("") if file.suffix in (".png", ".svg") else file
    for number, (text, output) in enumerate(zip(texts, outputs, strict=True), 1):
        path_stem = stem if len(texts) == 1 else stem.with_name(f"{stem.name}-{number}")
        paths = pictures.draw_attention(trained.model, trained.tokenizer, text, output, path_stem)
        drawn = " ".join(map(str, paths)) or "nothing to draw"
        print(f"{text!r}: {drawn}", file=sys.stderr)


def _chunks(arguments: Arguments) -> Iterable[Sequence[str]]:
    if arguments.text:
        return [arguments.text]
    return lines_as_they_come(standard_input(), _BATCHES_READ * arguments.batch_size)


def _progress(texts: Sequence[str]) -> AbstractContextManager[Progress | None]:
    """A bar on standard error, where it is a terminal, translations go elsewhere, and their number is known."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        return nullcontext()
    total = len(texts) or lines_left(standard_input())
    return nullcontext() if total is None else Progress(total, stream=sys.stderr)


if __name__ == "__main__":
    environment.command(
        lambda: main(tyro.cli(Arguments, prog="python -m train.translate", config=(tyro.conf.EnumChoicesFromValues,)))
    )
