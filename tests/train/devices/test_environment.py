"""The flag that makes XLA compute rightly on the CPU, the cache of programs, and how a command ends."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.devices import environment

FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
ROOT = Path(__file__).parents[3]
CACHE = "JAX_COMPILATION_CACHE_DIR"


@pytest.mark.parametrize("jaxlib", ["0.10.2", "0.11.0", "0.11.2", "0.12.0.1", "0.12.1.dev20261101+abc"])
def test_affected_versions_get_the_flag(jaxlib):
    assert environment.xla_flags("", jaxlib) == FLAG


@pytest.mark.parametrize("jaxlib", ["0.4.38", "0.10.1", "0.13.0", "1.0"])
def test_other_versions_do_not_as_xla_aborts_on_unknown_flags(jaxlib):
    assert environment.xla_flags("", jaxlib) == ""


def test_what_the_user_set_stays():
    other, own = "--xla_dump_to=/tmp/hlo", "--xla_cpu_experimental_ynn_fusion_type=dot"
    assert environment.xla_flags(other, "0.10.2") == f"{other} {FLAG}"
    assert environment.xla_flags(own, "0.10.2") == own


def test_configuring_twice_sets_the_flag_once(monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.10.2")
    monkeypatch.setenv("XLA_FLAGS", "")
    environment.configure()
    environment.configure()
    assert os.environ["XLA_FLAGS"] == FLAG


@pytest.mark.parametrize("size", [32, 64, 128])
def test_a_product_followed_by_a_reduction_is_right_in_this_process(size):
    """A version of jaxlib that fails here is affected too: widen the range in train/devices/environment.py."""
    left, right = np.full((5, size, size), 2, np.float32), np.ones((size, size), np.float32)
    norms = jax.jit(jax.vmap(lambda matrix: jnp.sum((matrix @ right) ** 2)))(left)
    np.testing.assert_allclose(norms, np.full(5, (2.0 * size) ** 2 * size**2), rtol=1e-5)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """What a test says of the cache is forgotten after it."""
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv(CACHE, "")  # so that it is taken back
    monkeypatch.delenv(CACHE)
    yield
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_cache_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment.keep_programs()
    folder = Path(os.environ[CACHE])
    assert folder.is_dir()
    assert folder.parent == tmp_path / "seqattn" / "xla"
    assert jax.config.jax_compilation_cache_dir == str(folder)  # though jax is imported already


@pytest.mark.parametrize(("given", "kept"), [("/some/where", "/some/where"), ("", None)])
def test_where_the_user_wants_programs_kept_wins(given, kept, monkeypatch):
    monkeypatch.setenv(CACHE, given)
    environment.keep_programs()
    assert os.environ.get(CACHE) == kept
    assert given or jax.config.jax_compilation_cache_dir is None


def test_e12_a_cache_folder_that_cannot_be_made_is_told_and_done_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "seqattn").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    environment.keep_programs()
    assert CACHE not in os.environ
    assert re.match(r"compiled programs are not cached: .*seqattn", capsys.readouterr().err)


def test_e12_a_user_without_a_home_has_no_cache(monkeypatch, capsys):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    environment.keep_programs()
    assert CACHE not in os.environ
    assert "not cached: Could not determine home" in capsys.readouterr().err


PROGRAM = """
import jax
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 3 + 1)(2.0))
"""


def begin(cache):
    """A process that compiles a program and keeps it."""
    variables = os.environ | {CACHE: str(cache), "JAX_PLATFORMS": "cpu"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM], env=variables, cwd=ROOT, **pipes)


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="where nobody may write, be it root, is known of Linux")
def test_e12_a_read_only_cache_is_told_and_done_without():
    shown, told = begin("/sys/kernel").communicate()
    assert shown == "7.0\n"
    assert "Error writing persistent compilation cache" in told


def test_e12_processes_share_a_cache(tmp_path):
    for is_there in (False, True):  # written, when one may read what the other writes; then read
        processes = begin(tmp_path), begin(tmp_path)
        for shown, told in [process.communicate() for process in processes]:
            assert shown == "7.0\n"
            assert not is_there or "Error" not in told
    assert list(tmp_path.rglob("*-cache"))


def test_e12_a_corrupt_cache_is_computed_anew(tmp_path):
    assert begin(tmp_path).communicate()[0] == "7.0\n"
    kept = list(tmp_path.rglob("*-cache"))
    assert kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:-9][::-1])
    again = begin(tmp_path)
    shown, told = again.communicate()
    assert (again.returncode, shown) == (0, "7.0\n")
    assert "Error reading persistent compilation cache" in told


def test_e8_too_little_memory_ends_a_command_with_a_hint(monkeypatch, capsys):
    def main():
        jax.block_until_ready(jnp.zeros(2**46))

    monkeypatch.setenv(CACHE, "")
    with pytest.raises(SystemExit) as ended:
        environment.command(main)
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the device has too little memory: RESOURCE_EXHAUSTED: Out of memory allocating")
    assert "--pieces" in told
    assert told.count("\n") == 2


def test_a_failure_that_nobody_can_mend_keeps_its_traceback(monkeypatch):
    def main():
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setenv(CACHE, "")
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        environment.command(main)
