"""What others are told, and that nothing they do costs a run."""

import logging
import sys
from types import SimpleNamespace

import pytest

from train.reports.trackers import Trackers

ROW = {"step": 7, "kind": "train", "loss": 1.5, "gradient_norm": float("inf"), "skipped": 2, "note": "text"}


class Writer:
    def __init__(self, folder, purge_step):
        self.folder, self.purge_step, self.rows, self.closed = folder, purge_step, [], False

    def add_scalar(self, *row):
        self.rows.append(row)

    def close(self):
        self.closed = True


@pytest.fixture
def tensorboard(monkeypatch):
    made = []

    def make(folder, *, purge_step):
        made.append(Writer(folder, purge_step))
        return made[-1]

    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=make))
    return made


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package: what it was asked for, and whether the network is there."""
    seen = SimpleNamespace(init=[], rows=[], finished=0, down=False)

    def init(**options):
        seen.init.append(options)
        return SimpleNamespace(log=log, finish=finish)

    def log(numbers, *, step):
        if seen.down:
            raise ConnectionError("no route to host")
        seen.rows.append((step, numbers))

    def finish():
        seen.finished += 1

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **options: options))
    return seen


def test_tensorboard_gets_the_finite_numbers_of_a_row(tensorboard, tmp_path):
    with Trackers(tmp_path, tensorboard=True, first=7) as trackers:
        trackers.write(ROW)
    (writer,) = tensorboard
    assert writer.purge_step == 7
    assert writer.folder == str(tmp_path / "tensorboard")
    assert writer.rows == [("train/loss", 1.5, 7), ("train/skipped", 2.0, 7)]
    assert writer.closed


def test_weights_and_biases_gets_them_in_a_run_that_goes_on(wandb, tmp_path):
    folders = [tmp_path / name / "dates" for name in ("a", "b")]
    for folder in folders:
        folder.mkdir(parents=True)
    with Trackers(folders[0], wandb="trials", config={"seed": 3}) as trackers:
        trackers.write(ROW)
    (options,) = wandb.init
    assert {name: options[name] for name in ("project", "name", "resume", "config")} == {
        "project": "trials",
        "name": "dates",
        "resume": "allow",
        "config": {"seed": 3},
    }
    assert wandb.rows == [(7, {"train/loss": 1.5, "train/skipped": 2.0})]
    assert wandb.finished == 1
    for folder in folders:
        with Trackers(folder, wandb="trials"):
            pass
    first, again, another = (options["id"] for options in wandb.init)
    assert first == again != another


def test_nobody_is_told_who_was_not_asked_for(tensorboard, wandb, tmp_path):
    with Trackers(tmp_path) as trackers:
        trackers.write(ROW)
    assert not tensorboard
    assert not wandb.init


def test_e9_a_network_that_is_down_is_told_once_and_the_others_go_on(tensorboard, wandb, tmp_path, caplog):
    with caplog.at_level(logging.WARNING), Trackers(tmp_path, tensorboard=True, wandb="trials") as trackers:
        trackers.write(ROW)
        wandb.down = True
        trackers.write(ROW | {"step": 8})
        trackers.write(ROW | {"step": 9})
    assert [step for step, _ in wandb.rows] == [7]
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases gets no more rows (ConnectionError: no route to host); metrics.jsonl has them all"
    ]
    assert [row[2] for row in tensorboard[0].rows] == [7, 7, 8, 8, 9, 9]


@pytest.mark.parametrize("module", ["tensorboardX", "wandb"])
def test_e9_a_package_that_is_missing_is_told(module, tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, module, None)
    with Trackers(tmp_path, tensorboard=module != "wandb", wandb="trials" if module == "wandb" else None) as trackers:
        trackers.write(ROW)
    assert "gets no more rows (ModuleNotFoundError" in caplog.text


def test_e9_a_close_that_fails_is_told(wandb, tmp_path, caplog, monkeypatch):
    def fail():
        raise TimeoutError("still sending")

    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: SimpleNamespace(log=print, finish=fail))
    with Trackers(tmp_path, wandb="trials"):
        pass
    assert "TimeoutError: still sending" in caplog.text
