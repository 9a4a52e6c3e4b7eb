"""Measures training on a corpus that does not fit in memory: `python -m benchmarks.training.corpus`.

    python -m benchmarks.training.corpus --pairs 10000000 --folder /tmp/corpus --json benchmarks/results/corpus.jsonl
    python -m benchmarks.training.corpus --pairs 100000 --folder /tmp/small   # about a minute

Writes two files of parallel text, of random pairs, and trains a small model on them with `python -m train translation`.
The first process reads the texts, trains a tokenizer, tokenizes, and makes some updates; it is stopped by SIGTERM. Two
more processes resume the run from the cache and are stopped as well, with a cold and with a warm cache of compiled
programs. The parent reads clocks, and the memory of its child from /proc, so the program needs Linux.

Seconds count from the start of a process, imports included: until its training data are ready and its state restored
("ready"), and until its first update is done, compilation included ("first update").
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro

from benchmarks.bench import machine
from seqattn.checks import check_integer
from train.devices import environment

_WORDS, _CHUNK, _UPDATES = 20_000, 100_000, 20
_MODEL = (
    "--model.num-encoder-layers 1 --model.num-decoder-layers 1 --model.block.model-dim 64 "
    "--model.block.hidden-dim 128 --tokenizer.vocab-size 4000 --batches.tokens 2048 --batches.max-length 64 "
    "--bleu False --steps 1000000 --evaluate-every 500000 --log-every 1"
)
_READY, _STEP, _TOKENIZED = (
    re.compile(words) for words in (r"parameters, .* training examples", r"step (\d+)/", r"tokenized (\d+)/")
)


@dataclass(frozen=True)
class CorpusArguments:
    """Measures training on a corpus of random pairs."""

    folder: Path
    """Empty or new folder for texts, cache and run. About 300 bytes for each pair."""
    pairs: int = 10_000_000
    """Number of pairs."""
    packed: bool = False
    """Pack several examples into each row. Packing is planned by each process, before its first update."""
    json: Path | None = None
    """File to append one line of JSON per process to."""

    def __post_init__(self) -> None:
        check_integer("pairs", self.pairs, 10_000)


@dataclass(frozen=True)
class Measured:
    """A process that trained.

    Attributes:
        process: "first", "resumed, cold" or "resumed, warm".
        pairs: number of pairs of the corpus.
        ready_seconds: seconds until examples and state were ready; of a first process with all that it prepared.
        tokenize_seconds: seconds of tokenizing among these.
        first_update_seconds: seconds until the first update was done.
        updates: number of updates at the end.
        peak_bytes: peak of resident memory, with pages of mapped files (VmHWM).
        anonymous_bytes: resident memory at the end that is not pages of files (RssAnon).
        file_bytes: resident pages of files at the end (RssFile).
    """

    process: str
    pairs: int
    ready_seconds: float
    tokenize_seconds: float
    first_update_seconds: float
    updates: int
    peak_bytes: int
    anonymous_bytes: int
    file_bytes: int


def write_corpus(folder: Path, pairs: int) -> tuple[Path, Path]:
    """Writes random pairs of 3 to 12 words to two files, a chunk at a time."""
    random = np.random.default_rng(0)
    letters = random.integers(97, 123, (_WORDS, 7), np.uint8)
    lengths = random.integers(2, 8, _WORDS)
    words = np.array([bytes(row[:length]).decode() for row, length in zip(letters, lengths, strict=True)])
    files = folder / "corpus.source", folder / "corpus.target"
    with files[0].open("w") as source, files[1].open("w") as target:
        for first in range(0, pairs, _CHUNK):
            counts = random.integers(3, 13, min(_CHUNK, pairs - first))
            # Few words are frequent and many are rare, as in natural languages.
            ranks = (_WORDS ** random.random(counts.sum())).astype(int) - 1
            starts = np.cumsum(counts) - counts
            for start, count in zip(starts.tolist(), counts.tolist(), strict=True):
                chosen = words[ranks[start : start + count]].tolist()
                source.write(" ".join(chosen) + "\n")
                target.write(" ".join(reversed(chosen)) + "\n")
    return files


def train(process: str, arguments: CorpusArguments, updates: int, programs: str) -> Measured:
    """Trains in a process of its own until it has made so many updates, and stops it.

    Raises:
        RuntimeError: the process fails.
    """
    folder = arguments.folder
    command = [sys.executable, "-m", "train", "translation", *_MODEL.split()]
    command += ["--batches.packed", str(arguments.packed)]
    command += ["--task.source", str(folder / "corpus.source"), "--task.target", str(folder / "corpus.target")]
    command += ["--run", str(folder / "run"), "--data-cache.folder", str(folder / "cache")]
    command += ["--data-cache.min-megabytes", "0"]
    variables = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / programs), "PYTHONUNBUFFERED": "1"}
    begun = time.perf_counter()
    ready = first = tokenizing = tokenized = 0.0
    memory: dict[str, int] = {}
    said: list[str] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables) as child:
        assert child.stdout is not None
        for line in child.stdout:
            now = time.perf_counter() - begun
            said.append(line)
            print(f"  {now:8.1f} s  {line}", end="", flush=True)
            if "tokenizing" in line:
                tokenizing = now
            if _TOKENIZED.match(line):
                tokenized = now
            if _READY.search(line):
                ready = now
            if _STEP.match(line) and not first:
                first = now
                # Lines of steps come at most every 10 seconds, so the number of updates is asked of the metrics.
                _wait(folder / "run" / "metrics.jsonl", updates, child)
                memory = _memory(child.pid)
                child.send_signal(signal.SIGTERM)
    if child.returncode != 128 + signal.SIGTERM or not first:
        raise RuntimeError(f"the process ended with code {child.returncode}: {''.join(said[-3:])}")
    return Measured(
        process=process,
        pairs=arguments.pairs,
        ready_seconds=ready,
        tokenize_seconds=max(0.0, tokenized - tokenizing),
        first_update_seconds=first,
        updates=_rows(folder / "run" / "metrics.jsonl"),
        peak_bytes=memory["VmHWM"],
        anonymous_bytes=memory["RssAnon"],
        file_bytes=memory["RssFile"],
    )


def _wait(metrics: Path, updates: int, child: "subprocess.Popen[str]") -> None:
    while _rows(metrics) < updates:
        if child.poll() is not None:
            raise RuntimeError(f"the process ended with code {child.returncode} before update {updates}")
        time.sleep(0.05)


def _rows(metrics: Path) -> int:
    # The last line may be half written.
    lines = metrics.read_text("utf-8").splitlines(keepends=True)
    return sum(1 for line in lines if line.endswith("\n") and json.loads(line)["kind"] == "train")


def _memory(process: int) -> dict[str, int]:
    status = Path(f"/proc/{process}/status").read_text()
    return {name: int(kilobytes) * 1024 for name, kilobytes in re.findall(r"^(\w+):\s+(\d+) kB$", status, re.MULTILINE)}


def _lines(file: Path) -> int:
    """The number of lines of a file; 0 if there is none."""
    if not file.exists():
        return 0
    with file.open("rb") as content:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: content.read(2**24), b""))


def measure(arguments: CorpusArguments) -> Iterator[Measured]:
    """Yields the three processes; a corpus of so many pairs that is there already is used again.

    Raises:
        ValueError: the folder holds a run already.
    """
    if (arguments.folder / "run").exists():
        raise ValueError(
            f"{arguments.folder} holds a run, so the first process would not begin anew: remove run and cache"
        )
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if _lines(arguments.folder / "corpus.target") != arguments.pairs:
        begun = time.perf_counter()
        write_corpus(arguments.folder, arguments.pairs)
        print(f"wrote {arguments.pairs:,} pairs in {time.perf_counter() - begun:.1f} s", flush=True)
    for number, (process, programs) in enumerate(
        (("first", "programs"), ("resumed, cold", "others"), ("resumed, warm", "others")), 1
    ):
        yield train(process, arguments, number * _UPDATES, programs)


def main(arguments: CorpusArguments) -> None:
    """Prints a line per process."""
    for found in measure(arguments):
        rate = found.pairs / found.tokenize_seconds if found.tokenize_seconds else 0.0
        print(
            f"{found.process}: ready after {found.ready_seconds:.1f} s, first update after "
            f"{found.first_update_seconds:.1f} s, tokenized {rate:,.0f} pairs/s, peak {found.peak_bytes / 1e6:,.0f} MB "
            f"resident (at the end {found.anonymous_bytes / 1e6:,.0f} MB anonymous, {found.file_bytes / 1e6:,.0f} MB "
            f"of files), {found.updates} updates",
            flush=True,
        )
        if arguments.json is not None:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(found) | {"packed": arguments.packed} | machine.describe()) + "\n")


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(CorpusArguments, prog="python -m benchmarks.training.corpus")))
