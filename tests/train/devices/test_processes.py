"""Several processes: how they find each other, what is said where they do not, and that they train as one would."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax._src import clusters

from train.devices import environment
from train.devices.parallel import Replicated, Sharded
from train.devices.processes import Agreement, Processes, any_process, detected, differing, is_first

ROOT = Path(__file__).parents[3]
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "node[003-004],other",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
}
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    **{f"OMPI_COMM_WORLD_{name}": value for name, value in (("SIZE", "5"), ("RANK", "4"), ("LOCAL_RANK", "0"))},
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture
def variables(monkeypatch):
    """Sets variables, and no others of a cluster."""

    def put(given):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "JAX_COORDINATOR", "KUBERNETES_", "JOB_COMPLETION")):
                monkeypatch.delenv(name)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        return os.environ

    return put


@pytest.mark.parametrize(
    ("flags", "given", "found"),
    [
        ({}, {}, None),
        ({"count": 1}, SLURM, None),
        ({}, SLURM | {"SLURM_NTASKS": "1"}, None),
        ({}, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}, None),
        ({"coordinator": "a:1", "count": 2, "index": 1}, {}, ("a:1", 2, 1, None)),
        ({"count": 2, "index": 1}, {"JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", 2, 1, None)),
        ({}, SLURM, ("node003:61441", 3, 2, [1])),
        ({}, SLURM | {"JAX_COORDINATOR_PORT": "1234"}, ("node003:1234", 3, 2, [1])),
        ({"coordinator": "a:1"}, SLURM, ("a:1", 3, 2, [1])),
        ({}, OMPI, ("10.96.0.1:62624", 5, 4, [0])),
    ],
)
def test_what_is_found_is_what_jax_would_find(flags, given, found, variables):
    assert Processes(**flags)._resolved(variables(given)) == found


def test_kubernetes_is_asked_where_it_is_named(monkeypatch, variables):
    given = variables({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"})
    assert detected(given) is None
    job = SimpleNamespace(metadata=SimpleNamespace(labels={}), spec=SimpleNamespace(parallelism=3))
    pod = SimpleNamespace(
        metadata=SimpleNamespace(labels={"job-name": "train"}), spec=SimpleNamespace(subdomain="pods")
    )
    answers = {"is_env_present": True, "_job": job, "_pod": pod, "_controller": SimpleNamespace(kind="Job")}
    for name, answer in answers.items():
        method = classmethod(lambda cls, answer=answer: answer)
        monkeypatch.setattr(clusters.K8sCluster, name, method)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.2")
    job.metadata.name = "train"
    assert Processes(cluster="k8s", timeout=1)._resolved(given) == ("train-0.pods:55527", 3, 1, None)


def test_every_cluster_that_may_be_named_is_one_of_jax():
    known = {kind.name or "k8s" for kind in clusters.ClusterEnv._cluster_types}
    assert set(Processes.__dataclass_fields__["cluster"].type.__args__[0].__args__) <= known


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"index": 2, "count": 2}, r"index \(2\) must be in \[0, 2\)"),
        ({"index": -1}, r"index \(-1\) must be in \[0, count\)"),
        ({"count": 0}, r"count \(0\) must be an integer of at least 1"),
        ({"timeout": 0}, r"timeout \(0\) must be an integer of at least 1"),
    ],
)
def test_e14_numbers_that_cannot_be_are_refused(flags, said):
    with pytest.raises(ValueError, match=said):
        Processes(**flags)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"coordinator": "a:1"}, "need --processes.count and --processes.index$"),
        ({"index": 1}, "need --processes.coordinator and --processes.count$"),
        ({"count": 2, "index": 0}, "need --processes.coordinator$"),
        ({"coordinator": "nowhere", "count": 2, "index": 0}, r"coordinator \('nowhere'\) must be a host and a port"),
        ({"coordinator": "a:port", "count": 2, "index": 0}, r"coordinator \('a:port'\) must be a host and a port"),
        ({"cluster": "slurm"}, r"cluster \(slurm\) was not found"),
    ],
)
def test_e14_what_is_missing_is_named(flags, said, variables):
    variables({})
    with pytest.raises(ValueError, match=said):
        Processes(**flags).connect()


def test_one_process_is_alone_without_a_word(variables):
    variables({})
    Processes().connect()
    assert jax.process_count() == 1
    assert (is_first(), any_process(True), any_process(False)) == (True, True, False)
    agreed = Agreement()
    assert [agreed(flag) for flag in (False, True, False)] == [False, True, False]


def python(*arguments):
    """A process of its own."""
    command, variables = [sys.executable, *map(str, arguments)], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def connecting(port, index, count, timeout):
    flags = f"'127.0.0.1:{port}', {count}, {index}, timeout={timeout}"
    script = "from train.devices import environment, processes\n"
    return python("-c", f"{script}environment.command(processes.Processes({flags}).connect)")


def test_e14_a_process_ends_with_one_sentence():
    """In processes of their own: JAX itself would abort them."""
    taken, same = free_port(), free_port()
    with socket.create_server(("", taken)):
        lost, blocked = connecting(free_port(), 1, 2, 1), connecting(taken, 0, 2, 1)
        alike = [connecting(same, index, 3, 60) for index in (0, 1, 1)]
        ended = [(process.communicate(timeout=120)[1], process.returncode) for process in (lost, blocked, *alike)]
    expected = ["did not let process 1 start", "is not free", *["two processes have --processes.index 1"] * 3]
    for (said, code), words in zip(ended, expected, strict=True):
        assert said.startswith("error: "), said
        assert words in said
        assert said.count("\n") == 1
        assert code == 2


@pytest.mark.slow
def test_a_process_that_fails_ends_at_once_and_the_others_soon():
    """Else JAX would wait for minutes: the one at its end for the others, and they for its part of the sum."""
    port = free_port()
    script = (
        "from train.devices.processes import Processes, any_process\n"
        "import jax\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        f"Processes('127.0.0.1:{port}', 2, INDEX, timeout=60).connect()\n"
        "for call in range(9):\n"
        "    any_process(False)\n"
        "    assert INDEX == 0 or call < 3, 'failed'\n"
    )
    processes = [python("-c", script.replace("INDEX", str(index))) for index in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert "AssertionError: failed" in errors[1]
    assert [process.returncode for process in processes] == [1, 1]


CHOICES = {
    "pmap": Replicated(),
    "fsdp": Sharded(fsdp=2),
    "tensor": Sharded(tensor=4),
    "sequence": Sharded(sequence=4),
    "expert": Sharded(data=1, expert=4),
}
PARTS = {"pmap": 2, "fsdp": 2, "tensor": 1, "sequence": 1, "expert": 2}
DEVICES = 2  # of each process


def parallel():
    spec = importlib.util.spec_from_file_location("parallel_models", Path(__file__).with_name("test_parallel.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def learn(models, choice, kind, devices=None):
    """Losses and parameters of a few updates, of which this process has its part of the rows."""
    update, state = (models.small_update, models.small()) if kind == "small" else models.translator()
    placed = choice.spread(update, devices)
    index, count = placed.part
    given = models.batches(updates=3)
    size = len(given[0]["source"]) // count
    mine = [{name: array[index * size :][:size] for name, array in batch.items()} for batch in given]
    losses, params, state = models.trained(placed, state, mine)
    assert int(state.step) == len(given)
    return losses, params, count


def work(port, index, kind, *names):
    """What each of the two processes does."""
    environment.configure()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    Processes(f"127.0.0.1:{port}", 2, int(index), timeout=60).connect()
    models, agreed = parallel(), Agreement()
    results = {
        "processes": [jax.process_index(), jax.process_count(), jax.device_count(), is_first()],
        "sigterm": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL,
        "any": [any_process(flag) for flag in (False, index == "1")],
        "agreed": [agreed(index == "1" and call == 2) for call in range(5)],
    }
    for name in names:
        losses, params, count = learn(models, CHOICES[name], kind)
        results[name] = [losses, [float(np.square(leaf).sum()) for leaf in jax.tree.leaves(params)], count]
    print(json.dumps(results), flush=True)


def two_processes(kind, names):
    port = free_port()
    processes = [python(__file__, port, index, kind, *names) for index in range(2)]
    ended = [(*process.communicate(timeout=280), process.returncode) for process in processes]
    for _, errors, code in ended:
        assert code == 0, errors
    return [json.loads(output.splitlines()[-1]) for output, _, _ in ended]


def assert_same_as_one_process(results, kind, names):
    models = parallel()
    for name in names:
        losses, params, _ = learn(models, CHOICES[name], kind, jax.devices()[: 2 * DEVICES])
        squares = [np.square(leaf).sum() for leaf in jax.tree.leaves(params)]
        for result in results:
            np.testing.assert_allclose(result[name][0], losses, rtol=models.LOSS_TOLERANCE)
            np.testing.assert_allclose(result[name][1], squares, rtol=1e-5)
            assert result[name][2] == PARTS[name]


@pytest.fixture(scope="module")
def both():
    """What two processes say of themselves, and of the updates that they made."""
    return two_processes("small", ("pmap", "fsdp"))


def test_c10_e5_two_processes_train_as_one_does(both):
    """Each with its part of the rows of the same batches, so both make equally many updates."""
    assert_same_as_one_process(both, "small", ("pmap", "fsdp"))


def test_two_processes_know_each_other_and_keep_their_signals(both):
    for index, result in enumerate(both):
        assert result["processes"] == [index, 2, 2 * DEVICES, index == 0]
        assert result["sigterm"]


def test_e2_a_flag_in_one_process_is_seen_by_all_at_the_same_call(both):
    for result in both:
        assert result["any"] == [False, True]
        assert result["agreed"] == [False, False, False, True, False]


@pytest.mark.slow
@pytest.mark.parametrize("names", [("pmap", "fsdp"), ("tensor", "sequence", "expert")], ids="-".join)
def test_two_processes_train_a_transformer_as_one_does(names):
    """Processes whose devices share out a matrix or a text have the same rows."""
    assert_same_as_one_process(list(two_processes("transformer", names)), "transformer", names)


def test_processes_that_would_share_rows_in_part_are_refused(monkeypatch):
    """Three processes of two devices, and rows in two parts: the second process would have some of both."""

    class Process(NamedTuple):
        process_index: int
        id: int

    devices = [Process(place // 2, place) for place in range(6)]
    shards = {device: (slice(place // 3, place // 3 + 1),) for place, device in enumerate(devices)}
    monkeypatch.setattr(jax.sharding.NamedSharding, "devices_indices_map", lambda *_: shards)
    with pytest.raises(ValueError, match="the rows of the 3 processes overlap"):
        Sharded(data=2).spread(lambda *_: None, jax.devices()[:2])


if __name__ == "__main__":
    work(*sys.argv[1:])


def test_c12_what_differs_between_processes_is_named(monkeypatch):
    texts = {"config": "{}", "data": "1f", "versions": "jax"}
    assert differing(texts) == []
    others = {"config": "{}", "data": "2e", "versions": "jax"}
    gathered = []

    def gather(mine):
        gathered.append(mine)
        return np.stack(gathered) if len(gathered) == 2 else np.stack([mine, mine])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("train.devices.processes.multihost_utils.process_allgather", gather)
    assert differing(others) == []
    assert differing(texts) == ["data"]
