"""Steps stay readable when a process is killed, a file is damaged or a disk is full."""

import errno
import gc
import os
import resource
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.small_states import assert_same, names, small
from train.checkpoints import checkpoints as module
from train.checkpoints import digests
from train.checkpoints.checkpoints import Checkpoints
from train.devices import environment
from train.update.step import TrainState

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np
from train.checkpoints.checkpoints import Checkpoints
from train.update.step import TrainState

def state(step):
    return TrainState(jnp.asarray(step, jnp.int32), {"kernel": jnp.full((257, 131), step / 7)}, ())

def save_until_killed(folder, said, line):
    checkpoints = Checkpoints(folder, keep=2)
    latest = checkpoints.latest or 0
    assert latest >= said, f"step {said} was on disk, and {latest} is the latest"
    if latest:
        restored = checkpoints.restore(state(0))
        np.testing.assert_array_equal(restored.params["kernel"], state(latest).params["kernel"])
        assert int(restored.step) == latest and checkpoints.texts() == {"step": str(latest)}
    os.write(line, f"{latest}\\n".encode())
    for step in range(latest + 1, 10**6):
        checkpoints.save(state(step), {"step": str(step)})
        if step > latest + 1:  # the one before was waited for
            os.write(line, f"{step - 1}\\n".encode())

folder, kills, said = Path(sys.argv[1]), int(sys.argv[2]), 0
random.seed(int(sys.argv[3]))
for _ in range(kills):
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            save_until_killed(folder, said, writing)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading) as lines:
        told = [lines.readline() for _ in range(random.randint(2, 4))]
        time.sleep(random.uniform(0, 0.25))
        os.kill(child, signal.SIGKILL)
        said = max(int(line) for line in [*told, *lines] if line.endswith("\\n"))
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the child ended before it was killed"
print(said)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_d1_a_kill_at_any_moment_leaves_the_last_step_that_was_waited_for(kills, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path), str(kills), str(kills)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, done.stderr
    said = int(done.stdout)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest >= said > 0
        checkpoints.save(small(checkpoints.latest + 1), {})
    assert len(names(tmp_path)) == 1  # nothing unfinished is left


def test_d2_d3_the_run_goes_on_from_the_newest_step_that_verifies(copy, caplog):
    files = [path for path in (copy / "8").rglob("*") if path.is_file()]
    assert len(files) > 5
    for file in files:
        content = file.read_bytes()
        for changed in (content[:-1], content[:-1] + bytes([content[-1] ^ 1])) if content else (b"x",):
            file.write_bytes(changed)
            checkpoints = Checkpoints(copy)
            assert checkpoints.latest == 4, file
            assert checkpoints.texts() == {"step": "4"}
            assert "step 8 is damaged" in caplog.text
            assert "using step 4" in caplog.text
            caplog.clear()
        file.write_bytes(content)
    assert Checkpoints(copy).latest == 8
    file.unlink()
    with Checkpoints(copy) as checkpoints:
        assert_same(checkpoints.restore(small(4)), small(4))
        checkpoints.save(small(8), {"step": "again"})
        assert checkpoints.texts() == {"step": "again"}
    assert names(copy) == ["4", "8", "damaged-8"]


def test_d4_what_orbax_committed_does_not_count_without_digests(copy, caplog):
    (copy / "8" / "digests.json").unlink()
    (copy / "9").mkdir()
    assert Checkpoints(copy).latest == 4
    assert "step 8 is damaged (it was saved without digests" in caplog.text


@pytest.fixture
def full_disk(monkeypatch):
    def fail(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    monkeypatch.setattr(digests, "write", fail)
    return monkeypatch


@pytest.mark.parametrize("name", ["save", "wait", "close", "latest", "texts"])
def test_d5_d6_a_save_that_failed_is_told_by_whatever_comes_next(name, copy, full_disk):
    checkpoints = Checkpoints(copy)
    checkpoints.save(small(12), {})
    words = r"step 12 could not be saved \(No space left on device\); steps 4, 8 are kept; free some space, then resume"
    given = (small(16), {}) if name == "save" else ()
    with pytest.raises(OSError, match=words):
        getattr(checkpoints, name)(*given)
    assert names(copy) == ["4", "8"]
    assert Checkpoints(copy).latest == 8
    if name != "close":
        full_disk.undo()
        for step in (12, 16):
            checkpoints.save(small(step), {})
        assert checkpoints.steps == [12, 16]
    checkpoints.close()


# Where one write fails, Orbax closes the event loop under the others.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_d6_a_real_write_that_fails_leaves_the_older_steps_and_a_code(copy):
    noise = np.random.default_rng(0).integers(0, 256, 10**6, np.uint8)  # nothing that compresses
    large = TrainState(jnp.asarray(12, jnp.int32), {"noise": jnp.asarray(noise)}, ())
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)

    def save():
        with Checkpoints(copy) as checkpoints:
            checkpoints.save(large, {})

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    try:
        with pytest.raises(OSError, match=r"step 12 could not be saved \(File too large\); steps 4, 8 are kept"):
            save()
        with pytest.raises(SystemExit) as ended:
            environment.command(save)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))
    assert ended.value.code == 2
    # Orbax may write on for a moment after it has failed; what it leaves is swept away by the next save.
    assert {name for name in names(copy) if not name.startswith(".saving-12-")} == {"4", "8"}
    save()
    assert Checkpoints(copy).steps == [8, 12]
    gc.collect()  # within the test, what Orbax left undone


def test_d6_what_a_failed_attempt_writes_afterwards_does_not_meet_the_next(copy, monkeypatch):
    save, folders = module.ocp.save_checkpointables_async, []

    def fail_then_save(folder, *args, **options):
        folders.append(folder)
        if len(folders) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if len(folders) == 2:
            (folders[0] / "state").mkdir(parents=True)
        return save(folder, *args, **options)

    monkeypatch.setattr(module.ocp, "save_checkpointables_async", fail_then_save)
    with Checkpoints(copy) as checkpoints:
        checkpoints.save(small(12), {})
        with pytest.raises(OSError, match=r"No space left on device.*; free some space"):
            checkpoints.wait()
        checkpoints.save(small(12), {})
        assert checkpoints.latest == 12
        checkpoints.save(small(16), {})
    assert len(folders) == 3
    assert names(copy) == ["12", "16"]


@pytest.mark.parametrize(("code", "advice"), [(errno.EROFS, "make it writable"), (errno.EIO, "fix that")])
def test_d14_a_folder_that_cannot_be_written_is_told_in_a_sentence(code, advice, copy, monkeypatch):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.ocp, "save_checkpointables_async", fail)
    checkpoints = Checkpoints(copy)
    checkpoints.save(small(12), {})
    with pytest.raises(
        OSError, match=rf"step 12 could not be saved .*{os.strerror(code)}.*; steps 4, 8 are kept; {advice}"
    ):
        checkpoints.close()


def test_d14_a_folder_that_cannot_be_made_is_told_and_keeps_no_thread(copy, monkeypatch):
    """Threads of Orbax that wait for the folder would keep Python from ending."""
    before = set(threading.enumerate())
    (copy / "file").touch()
    monkeypatch.setattr(module.StepFolders, "saving", lambda folders, step, attempt: copy / "file" / str(step))
    checkpoints = Checkpoints(copy)
    checkpoints.save(small(12), {})
    with pytest.raises(OSError, match=r"step 12 could not be saved \(Not a directory\); steps 4, 8 are kept"):
        checkpoints.close()
    for thread in set(threading.enumerate()) - before:
        if not thread.daemon:
            thread.join(20)
            assert not thread.is_alive(), thread
    assert Checkpoints(copy).steps == [4, 8]


@pytest.mark.slow
def test_a_save_that_python_does_not_wait_for_is_told(tmp_path):
    script = (
        "import sys, jax.numpy as jnp; from pathlib import Path\n"
        "from train.checkpoints.checkpoints import Checkpoints\n"
        "from train.update.step import TrainState\n"
        "params = {str(index): jnp.ones(10**5) for index in range(50)}\n"
        "Checkpoints(Path(sys.argv[1])).save(TrainState(jnp.int32(3), params, ()), {})\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environ)
    assert names(tmp_path) == ["3"] or "step 3 could not be saved" in done.stderr


PROCESSES = """
import sys
from pathlib import Path
import jax, numpy as np
rank, port, folder = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_num_cpu_devices", 2)
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from train.checkpoints.checkpoints import Checkpoints
from train.update.step import TrainState
mesh = Mesh(np.array(jax.devices()), ("fsdp",))
def state(step):
    def put(array, *spec):
        return jax.make_array_from_callback(array.shape, NamedSharding(mesh, P(*spec)), lambda index: array[index])
    rows = np.arange(24, dtype=np.float32).reshape(8, 3) * step
    return TrainState(put(np.int32(step)), {"rows": put(rows, "fsdp"), "copied": put(rows)}, ())
with Checkpoints(folder, keep=2) as checkpoints:
    for step in (1, 2, 3):
        checkpoints.save(state(step), {"step": str(step)})
    assert checkpoints.steps == [2, 3]
    if rank == 0:
        (folder / "3" / "digests.json").write_text("{}")
with Checkpoints(folder, keep=2) as checkpoints:
    assert checkpoints.latest == 2, checkpoints.latest
    restored = checkpoints.restore(state(0))
    for before, after in zip(jax.tree.leaves(state(2)), jax.tree.leaves(restored), strict=True):
        assert after.sharding == before.sharding
        for one, other in zip(before.addressable_shards, after.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    if rank == 0:
        from train.checkpoints import digests
        def fail(folder):
            raise OSError(28, "No space left on device")
        digests.write = fail
    checkpoints.save(state(4), {})
    try:
        checkpoints.wait()
    except OSError as error:
        print(error)
    else:
        raise AssertionError("process 0 failed, and nobody said so")
"""


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_and_agree_on_the_latest(tmp_path):
    port = str(20_000 + os.getpid() % 20_000)
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-c", PROCESSES]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environ}
    processes = [subprocess.Popen([*command, str(rank), port, str(tmp_path)], **pipes) for rank in (0, 1)]
    done = [(*process.communicate(timeout=120), process.returncode) for process in processes]
    assert [code for *_, code in done] == [0, 0], "\n".join(error for _, error, _ in done)
    assert "step 4 could not be saved (No space left on device)" in done[0][0]
    assert "another process failed" in done[1][0]
    assert names(tmp_path) == ["2", "3"]


def test_a_process_that_fails_asks_no_other_one(tmp_path, monkeypatch):
    """The others wait for it in an update: what they are asked, nobody answers."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(small(1), {})
    checkpoints._saving[1].result()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("train.checkpoints.checkpoints.any_process", lambda _: pytest.fail("another process was asked"))
    with pytest.raises(KeyError, match="mine"), checkpoints:
        raise KeyError("mine")
