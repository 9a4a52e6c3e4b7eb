"""Tokens on the disk are those that were written, whoever wrote them, and give the batches of tokens in memory."""

import errno
import itertools
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from train.checkpoints import disk_space
from train.data import tokenized
from train.data.batches import Batches, stream
from train.data.cache_folder import CacheFolder
from train.data.tokenized import Split, read, write

RANDOM = np.random.default_rng(7)
ROWS = [
    (RANDOM.integers(0, 300, RANDOM.integers(0, 9)).tolist(), RANDOM.integers(0, 300, RANDOM.integers(1, 7)).tolist())
    for _ in range(53)
]
SHARD = 11  # 5 shards
SLOW = """
import sys
from pathlib import Path
from tests.train.data.test_tokenized import ROWS, SHARD
from train.data.cache_folder import CacheFolder
from train.data.tokenized import Split, write

def encode(first, last):
    print(first, flush=True)
    if first >= 2 * SHARD:
        sys.stdin.read()
    return ROWS[first:last]

folder = CacheFolder(Path(sys.argv[1]), {})
folder.begin()
write(folder, Split(len(ROWS), encode, 300, SHARD))
"""


def split(encoded=None, vocab_size=300, examples=53, fail_at=None):
    """The split of ROWS; the ranges that are encoded, but for the sample of sizes, are added to a list."""

    def encode(first, last):
        if fail_at is not None and first >= fail_at:
            raise RuntimeError("killed")
        if encoded is not None and last - first <= SHARD:
            encoded.append((first, last))
        return ROWS[first:last]

    return Split(examples, encode, vocab_size, SHARD)


@pytest.fixture
def folder(tmp_path):
    folder = CacheFolder(tmp_path / "tokens", {})
    folder.begin()
    return folder


def written(folder, **settings):
    write(folder, split(**settings))
    return read(folder, settings.get("examples", 53))


def assert_rows(found, rows=ROWS):
    assert len(found) == len(rows)
    for ours, theirs in zip(found, rows, strict=True):
        assert [side.dtype for side in ours] == [np.int32, np.int32]
        assert [side.tolist() for side in ours] == list(map(list, theirs))


@pytest.mark.parametrize(("vocab_size", "stored"), [(2**16, np.uint16), (2**16 + 1, np.int32)])
def test_examples_come_back_as_they_were(vocab_size, stored, folder, monkeypatch):
    monkeypatch.setattr(tokenized, "_TOGETHER", 4)  # a shard is made of several pieces
    monkeypatch.setattr(tokenized, "_KEPT", 3)  # pages are given back while they are read
    high = [([vocab_size - 1], [0, vocab_size - 1])]
    rows = ROWS + high
    write(folder, Split(len(rows), lambda first, last: rows[first:last], vocab_size, SHARD))
    found = read(folder, len(rows))
    assert_rows(found, rows)
    assert found.measure().tolist() == [[len(source), len(target)] for source, target in rows]
    assert {ids.dtype for piece in found._pieces for _, ids in piece} == {np.dtype(stored)}
    assert [source.tolist() for source, _ in found[50:]] == [source for source, _ in rows[50:]]
    assert found[-1][1].tolist() == [0, vocab_size - 1]
    with pytest.raises(IndexError):
        found[len(rows)]


def test_a_shard_that_another_process_removed_is_noticed(folder):
    written(folder)
    next(folder.path.glob("00001-*")).unlink()
    with pytest.raises(ValueError, match="tokens has 42 of 53 examples, as files were removed; run it again"):
        read(folder, 53)


def test_more_ids_than_a_batch_can_count_are_an_error():
    long = np.broadcast_to(np.uint16(7), 2**20)
    with pytest.raises(ValueError, match="2147483648"):
        tokenized._lists([np.empty(0, np.uint16), *[long] * 2**11], np.uint16)


def test_a_writer_holds_the_ids_of_one_batch(folder, monkeypatch):
    """Whatever the number of examples in a shard."""
    monkeypatch.setattr(tokenized, "_TOGETHER", 10)
    tracemalloc.start()
    peaks = []
    for examples in (10, 100):
        rows = [([1] * 5_000, [2])] * 10
        mine = CacheFolder(folder.path.with_name(str(examples)), {})
        mine.begin()
        tracemalloc.reset_peak()
        write(mine, Split(examples, lambda first, last, rows=rows: rows[: last - first], 300, examples))
        peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert len(read(mine, 100)) == 100
    assert peaks[1] < 1.5 * peaks[0]


def test_many_examples_have_few_files():
    for examples in (1, tokenized.SHARD * tokenized.SHARDS, tokenized.SHARD * tokenized.SHARDS + 1, 10**9 + 7):
        assert -(-examples // tokenized.shard_size(examples)) <= tokenized.SHARDS


def test_a_split_that_fills_its_shards(folder):
    assert_rows(written(folder, examples=22), ROWS[:22])


@pytest.mark.parametrize("packed", [False, True], ids=["buckets", "packed"])
def test_batches_are_those_of_examples_in_memory(packed, folder):
    config = Batches(tokens=90, max_length=8, buckets=3, packed=packed)
    found = written(folder)
    for part in ((0, 1), (1, 3)):
        ours, theirs = (stream(config, rows, seed=5, multiple=2, part=part) for rows in (found, ROWS))
        for step in (0, 1, 2, 7, 5000):
            assert ours[step].keys() == theirs[step].keys()
            for name, array in theirs[step].items():
                np.testing.assert_array_equal(ours[step][name], array)


@pytest.mark.parametrize("packed", [False, True], ids=["buckets", "packed"])
def test_a_process_reads_the_rows_of_its_part_alone(packed, folder, monkeypatch):
    config = Batches(tokens=120, max_length=8, buckets=1, packed=packed)
    found, taken = written(folder), []
    get = tokenized.Tokenized.__getitem__
    monkeypatch.setattr(
        tokenized.Tokenized, "__getitem__", lambda rows, index: (taken.append(index), get(rows, index))[1]
    )
    orders = [stream(config, found, seed=5, multiple=1, part=(index, 3)) for index in range(3)]
    whole = stream(config, found, seed=5, multiple=3)
    taken.clear()  # packing in memory looks at lengths alone
    parts = []
    for order in (*orders, whole):
        order[4]
        parts.append({int(index) for index in taken if index})
        taken.clear()
    assert all(parts)
    assert sum(map(len, parts[:3])) == len(parts[3])
    assert parts[0] | parts[1] | parts[2] == parts[3]


def test_an_interrupted_process_goes_on_at_the_first_missing_shard(folder):
    with pytest.raises(RuntimeError, match="killed"):
        write(folder, split(fail_at=2 * SHARD))
    encoded, shown = [], []
    write(folder, split(encoded), shown.append)
    assert encoded == [(22, 33), (33, 44), (44, 53)]
    assert shown == [33, 44, 53, 53]
    assert_rows(read(folder, 53))
    folder.finish()
    assert folder.is_whole()


def test_a_process_killed_while_it_tokenizes_leaves_whole_shards(folder):
    command = [sys.executable, "-c", SLOW, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while process.stdout.readline() != f"{2 * SHARD}\n":
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    (folder.work / "00003.new").write_bytes(b"half of a shard")
    encoded = []
    assert_rows(written(folder, encoded=encoded))
    assert encoded == [(22, 33), (33, 44), (44, 53)]


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flipped, lambda file: file.write_bytes(file.read_bytes()[:-9])], ids=["flipped", "cut"]
)
def test_a_shard_that_was_damaged_since_is_made_anew(damage, folder, caplog):
    with pytest.raises(RuntimeError, match="killed"):
        write(folder, split(fail_at=3 * SHARD))
    damage(sorted(folder.path.glob("*.arrow"))[1])
    encoded = []
    assert_rows(written(folder, encoded=encoded))
    assert encoded == [(11, 22), (33, 44), (44, 53)]
    (record,) = caplog.records
    assert "00001-" in record.message
    assert "its content changed after it was written; it is made anew" in record.message


def test_two_processes_share_the_shards(folder):
    both, encoded = threading.Barrier(2, timeout=60), [[], []]

    def work(index):
        def encode(first, last):
            if last - first <= SHARD:  # not the sample of sizes
                if not encoded[index]:
                    both.wait()  # each holds a shard when the other takes one
                encoded[index].append((first, last))
            return ROWS[first:last]

        mine = CacheFolder(folder.path, {})
        mine.begin()
        write(mine, Split(len(ROWS), encode, 300, SHARD))
        mine.finish()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(encoded)
    assert sorted(itertools.chain(*encoded)) == [(first, min(first + SHARD, 53)) for first in range(0, 53, SHARD)]
    assert folder.is_whole()
    assert_rows(read(folder, 53))


def test_processes_on_a_disk_that_cannot_lock_do_not_write_into_the_same_file(folder, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("train.data.cache_folder.FileLock.acquire", fail)
    both, failed = threading.Barrier(2, timeout=60), []
    opened = tokenized.pa.OSFile

    def open_together(*given):
        file = opened(*given)
        both.wait()  # both have opened the file of this shard
        return file

    monkeypatch.setattr(tokenized.pa, "OSFile", open_together)

    def work():
        try:
            mine = CacheFolder(folder.path, {})
            mine.begin()
            write(mine, split(examples=SHARD))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    folder.finish()
    assert folder.is_whole()
    assert_rows(read(folder, SHARD), ROWS[:SHARD])


def test_a_full_disk_is_told_and_loses_no_shard(folder, monkeypatch):
    add = CacheFolder.add

    def fail(mine, file, name):
        if name.startswith("00002"):
            raise OSError(errno.ENOSPC, "No space left on device")
        add(mine, file, name)

    with monkeypatch.context() as patch:
        patch.setattr(CacheFolder, "add", fail)
        with (
            pytest.raises(OSError, match=r"tokens cannot be written \(No space left on device\).*--data-cache\.folder"),
            folder.writing("the tokens"),
        ):
            write(folder, split())
    assert not list(folder.work.glob("*.new"))
    encoded = []
    assert_rows(written(folder, encoded=encoded))
    assert encoded == [(22, 33), (33, 44), (44, 53)]


def test_a_disk_without_room_is_warned_of_before_anything_is_written(folder, monkeypatch, caplog):
    size = sum(len(source) + len(target) for source, target in ROWS) / 53 * 5 * SHARD * 2 + 5 * SHARD * 8
    usage = shutil.disk_usage("/")
    for free, warned in ((round(size), False), (round(size) - 1, True)):
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        with pytest.raises(RuntimeError):
            write(folder, split(fail_at=1))
        assert ("the tokens of the training split need about" in caplog.text) == warned
        for file in folder.path.glob("*.arrow"):
            file.unlink()
