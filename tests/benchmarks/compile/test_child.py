"""A compiler that crashes or hangs costs one row, in a process made up of a few lines of Python."""

import dataclasses
import sys

import pytest

from benchmarks.compile.child import Child
from benchmarks.compile.targets import TARGETS, Target

WORKER = """
import json, os, sys, time
print(json.dumps({"device": "made up", "versions": {}}), flush=True)
for line in sys.stdin:
    name = line.strip()
    if name == "hang":
        time.sleep(60)
    if name == "crash":
        print("F1130 fatal.cc:7] Check failed: out of luck\\n*** stack ***", file=sys.stderr, flush=True)
        os.abort()
    if name == "warn":
        print("W1130 spmd.cc:7] [SPMD] Involuntary full rematerialization", file=sys.stderr, flush=True)
    print(json.dumps({"status": "compiled", "process": os.getpid()}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class MadeUp(Target):
    """A target whose compiler is `WORKER`."""

    folder: str = ""

    @property
    def environment(self):
        return self.folder


@pytest.fixture
def child(tmp_path):
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    (tmp_path / "worker.py").write_text(WORKER)
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -S {tmp_path / 'worker.py'}\n")
    python.chmod(0o755)
    fields = {field.name: getattr(TARGETS["v5e-8"], field.name) for field in dataclasses.fields(Target)}
    with Child(MadeUp(**fields, folder=tmp_path), limit=2) as child:
        yield child


def test_one_process_compiles_all_programs(child):
    first, second = (child.compile(name, 30) for name in ("one", "two"))
    assert first["status"] == second["status"] == "compiled"
    assert first["process"] == second["process"]
    assert child.hello["device"] == "made up"


def test_a_crash_is_a_row_with_the_reason_and_the_next_program_goes_on(child):
    answer = child.compile("crash", 30)
    assert answer["status"] == "crashed"
    assert answer["reason"] == ("the compiler's process ended by SIGABRT: F1130 fatal.cc:7] Check failed: out of luck")
    assert child.compile("one", 30)["status"] == "compiled"


def test_a_compiler_that_hangs_is_a_row_with_the_reason_and_the_next_program_goes_on(child):
    before = child.compile("one", 30)["process"]
    answer = child.compile("hang", 30)
    assert answer == {"status": "too slow", "reason": "did not finish in 2 s"}
    assert child.compile("one", 30)["process"] != before


def test_warnings_belong_to_their_program(child):
    assert child.compile("warn", 30)["warnings"] == ["Involuntary full rematerialization"]
    assert child.compile("one", 30)["warnings"] == []
