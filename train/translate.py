"""Translates texts with a trained model: `python -m train.translate RUN [TEXT ...]`.

Standard output has only translations, in the order of the texts, each as soon as it is known: one line per text. With
`--n_best N` above 1, each text has exactly N lines, best first: score, tab, translation. The score is the log
probability in nats after the length penalty.

An empty text has an empty translation with the score 0. If fewer than N hypotheses were found, the rest have the score
-inf. If the model's logits were not finite, the score is nan and the translation is [FAILED]. Line breaks inside a
translation become spaces.
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
    Banned,
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
from train.data.pretrained_tokenizer import PretrainedTokenizer
from train.data.standard_input import lines_as_they_come, lines_left, standard_input
from train.data.tokenizer import Tokenizer
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import hf_folder, loading
from train.hub.exported import Exported
from train.inference.decoding import Decoding
from train.inference.translator import Beam, Output, Search, Translator
from train.inference.weights import Weights, with_weights
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
_DEFAULTS = Decoding()


def penalty_of(text: str) -> LengthPenalty:
    """Parses a length penalty: "none", "average", "gnmt", or one of the latter two with ":NUMBER".

    Raises:
        ValueError: the text is none of these.

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
    """Translates texts, or standard input line by line, with the latest model of a run.

    Decodes greedily by default, with beam search if --beam-size is above 1, and by sampling if any of --temperature,
    --top-k, --top-p, --min-p or --seed is given. A model of Hugging Face transformers has its own defaults, in its
    generation_config.json.
    """

    run: tyro.conf.Positional[Path]
    """Run folder, folder of an exported model, or hf:FOLDER for a folder of Hugging Face transformers (hf:NAME for a
    model of the hub)."""
    text: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to translate. Without any, translates the lines of standard input."""
    beam_size: int | None = None
    """Number of beam-search hypotheses per text; 1 is greedy decoding. By default 1."""
    length_penalty: Annotated[LengthPenalty, _PENALTY] | None = None
    """Score of the hypotheses of a beam: average:POWER is log probability / length ** POWER, gnmt:ALPHA is log
    probability / ((5 + length) / 6) ** ALPHA (Wu 2016), none is the log probability. By default average:1."""
    stopping: Stopping | None = None
    """When beam search ends: as soon as enough hypotheses have finished, when a better one is unlikely, or when none
    can be better. By default when none can be better."""
    n_best: int = 1
    """Translations per text, at most beam_size. Above 1, each text has this many lines: score, tab, translation."""
    max_length: int | None = None
    """Maximum number of tokens in a translation, including the end token. By default a little over twice the
    tokens of the text; never more than the learned positions of the model."""
    min_length: int | None = None
    """Minimum number of tokens in a translation, including the end token. By default 0."""
    temperature: float | None = None
    """Sample with the logits divided by this. Below 1, probable tokens become more probable."""
    top_k: int | None = None
    """Sample from the k most probable tokens."""
    top_p: float | None = None
    """Sample from the fewest tokens whose probabilities sum to at least this (nucleus sampling)."""
    min_p: float | None = None
    """Sample from tokens with at least this share of the probability of the most probable token."""
    seed: int | None = None
    """Sample with this random seed, 0 to 2**32 - 1. Default when sampling: 0."""
    repetition_penalty: float | None = None
    """Above 1, makes tokens that were already generated less probable."""
    no_repeat_ngram: int | None = None
    """Never generate the same sequence of this many tokens twice."""
    source_language: str | None = None
    """Language of the texts, as the token that a model of many languages has for it, such as deu_Latn."""
    target_language: str | None = None
    """Language of the translations, as such a token."""
    weights: Weights = Weights.TRAINED
    """Numbers of the model: as trained, in bfloat16, or in int8 with less memory and small errors."""
    batch_size: int = 64
    """Maximum number of texts translated together."""
    average: int | None = None
    """Average the parameters of this many latest checkpoints (Vaswani 2017, section 6.1). By default as many as for
    the results of the run."""
    plot: Path | None = None
    """Draw the attention for the texts of the command line to FILE.png and FILE.svg, and all heads to files beside
    them. Several texts are numbered: FILE-1, FILE-2, ..."""


def search_of(arguments: Arguments, defaults: Decoding = _DEFAULTS) -> Search:
    """Returns the search method that the arguments select: greedy, beam search or sampling.

    Args:
        arguments: the arguments.
        defaults: the defaults of the model.

    Raises:
        ValueError: a value is out of its range, or flags exclude each other.
    """
    values = {name: getattr(arguments, name) for name in (*_FILTERS, "seed")}
    given = [name for name, value in values.items() if value is not None]
    # A request to sample comes before a beam that only the model asks for.
    usual = defaults.beam_size if not given else 1
    size = usual if arguments.beam_size is None else arguments.beam_size
    choices = {name: getattr(arguments, name) for name in ("length_penalty", "stopping")}
    for name, value in choices.items() if size == 1 else ():
        if value is not None:
            raise ValueError(f"--{name} is for beam search, and beam_size is 1: it would have no effect")
    filled = {name: getattr(defaults, name) if value is None else value for name, value in choices.items()}
    beam = Beam(size, arguments.n_best, **filled)
    if not given:
        return Greedy() if beam.size == 1 else beam
    if beam.size > 1:
        flags = ", ".join(f"--{name}" for name in given)
        raise ValueError(f"{flags}: sampling keeps one hypothesis, so beam_size ({beam.size}) must be 1")
    check_seed(arguments.seed or 0)
    return Sample(tuple(_made(name, _FILTERS[name], values[name]) for name in given if name in _FILTERS))


def processors_of(
    arguments: Arguments, end_id: int = Tokenizer.end_id, defaults: Decoding = _DEFAULTS
) -> tuple[LogitsProcessor, ...]:
    """Returns the logits processors that the arguments select: repetition penalty, n-gram ban, minimum length.

    Args:
        arguments: the arguments.
        end_id: the end token.
        defaults: the defaults of the model; the tokens that it bans are banned.

    Raises:
        ValueError: a value is out of its range.
    """
    kinds: dict[str, Callable[[Any], LogitsProcessor]] = {
        "repetition_penalty": RepetitionPenalty,
        "no_repeat_ngram": NoRepeatNgram,
        "min_length": lambda length: MinLength(length, end_id),
    }
    given = {name: getattr(arguments, name) for name in kinds}
    values = {name: getattr(defaults, name) if value is None else value for name, value in given.items()}
    # A minimum of 0 is no processor, so that a search need not ask it.
    made = [
        _made(name, kinds[name], value)
        for name, value in values.items()
        if value is not None and (name, value) != ("min_length", 0)
    ]
    return (*made, Banned(defaults.banned)) if defaults.banned else tuple(made)


def _made(name: str, kind: Callable[[Any], LogitsProcessor], value: Any) -> LogitsProcessor:
    try:
        return kind(value)
    except ValueError as error:
        raise ValueError(f"--{name}: {error}") from error


def _check(arguments: Arguments) -> None:
    """Checks the arguments before the model is loaded."""
    longest, plot = arguments.max_length, arguments.plot
    given = {"batch_size": arguments.batch_size, "average": arguments.average, "max_length": longest}
    check_sizes(**{name: value for name, value in given.items() if value is not None})
    if longest is not None and arguments.min_length is not None and arguments.min_length > longest:
        raise ValueError(f"min_length ({arguments.min_length}) must be at most max_length ({longest})")
    if plot is not None and not arguments.text:
        raise ValueError("--plot needs texts on the command line; it does not draw standard input")
    if plot is not None and not plot.name:
        raise ValueError(f"--plot ({plot}) must name a file")


def main(arguments: Arguments) -> int:
    """Prints the translations; returns the exit code."""
    _check(arguments)
    if not hf_folder.is_hf(arguments.run):
        # Mistakes in the arguments are found before the model is loaded. Folders of transformers have other defaults.
        search_of(arguments)
        processors_of(arguments)
    trained = loading.load_trained(arguments.run, average=arguments.average)
    loading.check_serves(trained, "translate", objectives.SequenceToSequence)
    loading.check_task(trained, arguments.experiment)
    config = trained.model.config
    if arguments.plot is not None and isinstance(config, Seq2SeqConfig) and config.attention is None:
        raise ValueError(f"--plot: the model of {arguments.run} has no attention to draw (its attention is None)")
    defaults = trained.decoding if isinstance(trained, Exported) else _DEFAULTS
    tokenizer = _for_languages(trained.tokenizer, arguments)
    translator = Translator(
        *(with_weights(trained.model, arguments.weights), tokenizer),
        batch_size=arguments.batch_size,
        search=search_of(arguments, defaults),
        processors=processors_of(arguments, tokenizer.end_id, defaults),
        max_length=defaults.max_length if arguments.max_length is None else arguments.max_length,
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
    except BrokenPipeError:  # the reader of the pipe has closed it, such as `head`
        # The interpreter flushes standard output at exit, which would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if arguments.plot is not None:
        _draw(trained, arguments.text, best, arguments.plot)
    return 0


def _for_languages(tokenizer: Tokenizer, arguments: Arguments) -> Tokenizer:
    if arguments.source_language is None and arguments.target_language is None:
        return tokenizer
    if not isinstance(tokenizer, PretrainedTokenizer):
        raise ValueError("--source-language and --target-language are for models of transformers with many languages")
    return tokenizer.for_languages(arguments.source_language, arguments.target_language)


def _print(outputs: list[Output]) -> None:
    for output in outputs:
        line = output.text.replace("\r\n", " ").replace("\n", " ").replace("\r", " ")
        print(line if len(outputs) == 1 else f"{output.score:.4f}\t{line}", flush=True)


def _draw(trained: Run | Exported, texts: Sequence[str], outputs: Sequence[str], file: Path) -> None:
    """Draws attention maps and prints their paths on standard error.

    There is nothing to draw for an empty text, or if the model failed.
    """
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
    """A progress bar on standard error if that is a terminal, standard output is not, and the number is known."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        return nullcontext()
    total = len(texts) or lines_left(standard_input())
    return nullcontext() if total is None else Progress(total, stream=sys.stderr)


if __name__ == "__main__":
    environment.command(
        lambda: main(tyro.cli(Arguments, prog="python -m train.translate", config=(tyro.conf.EnumChoicesFromValues,)))
    )
