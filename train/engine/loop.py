"""Training: updates, rows of metrics, evaluations and checkpoints, until the end or a signal, and what came out."""

import contextlib
import json
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from train import objectives
from train.checkpoints import lock, run
from train.checkpoints.checkpoints import agreed_numbers
from train.checkpoints.durable import replace
from train.config import Experiment, encode
from train.data.batches import iterate
from train.devices.processes import Agreement, any_process, is_first
from train.engine.meter import Meter
from train.engine.patience import Patience
from train.engine.session import Session, check_folder, prepare
from train.engine.signals import Interrupts
from train.objectives import Scores
from train.reports.metrics import MetricsFile, Row, read_metrics
from train.reports.plots import learning_curves
from train.reports.profile import Profile
from train.reports.progress import Progress
from train.reports.trackers import Trackers

_SAMPLES, _METRICS, _TRACEBACK = 3, "metrics.jsonl", "traceback.txt"


def train(experiment: Experiment) -> int:
    """Trains, or goes on where the run folder stopped; returns the exit code of the process.

    Where an error came from stands in `traceback.txt` of the run folder, once there is one.

    Raises:
        ValueError: the run folder holds something else or is being trained in, or the settings do not fit the data or
            the devices, or updates are not finite any more.
        OSError: a checkpoint could not be saved.
    """
    experiment.processes.connect()
    with _locked(experiment.run), _noting_where(experiment.run):
        session = prepare(experiment)
        with Interrupts() as interrupts, session.checkpoints:
            stopped = _train(session, interrupts)
            # What was saved last is waited for here.
            session.checkpoints.wait()
        stopped = stopped or any_process(interrupts.received is not None)
        if not stopped:
            _finish(session)
            return 0
        # Of several processes, maybe another one had the signal.
        print(f"stopped by {interrupts.name} after {int(session.state.step)} updates; the same command resumes")
        return interrupts.exit_code()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a run folder for process 0, or refuses all; a new one where nothing was written is removed again.

    What a folder must not hold is asked of each process: it may be another one there.
    """
    is_new, refusal = is_first() and not folder.exists(), None
    try:
        with ExitStack() as held:
            try:
                check_folder(folder)
                if is_first():
                    held.enter_context(lock.RunLock(folder))
            except (ValueError, OSError) as error:
                refusal = error
            if any_process(refusal is not None):
                raise refusal or ValueError(f"another process does not train in {folder}: it says why")
            yield
    finally:
        with contextlib.suppress(OSError):
            if is_new and [path.name for path in folder.iterdir()] == [lock.NAME]:
                (folder / lock.NAME).unlink()
                folder.rmdir()


@contextmanager
def _noting_where(folder: Path) -> Iterator[None]:
    """Writes down the traceback of an error, of which a command tells a sentence; that of one before is removed."""
    try:
        with contextlib.suppress(OSError):
            (folder / _TRACEBACK).unlink(missing_ok=True)
        yield
    except Exception:
        if (folder / "config.json").exists():  # else nothing was begun, and nothing is left behind
            with contextlib.suppress(OSError):
                (_logs(folder) / _TRACEBACK).write_text(traceback.format_exc(), "utf-8")
        raise


def _train(session: Session, interrupts: Interrupts) -> bool:
    """Whether a signal ended it."""
    experiment, first = session.experiment, int(session.state.step)
    logs = _logs(experiment.run)
    if session.changed and is_first() and (logs / _METRICS).exists():
        with MetricsFile(logs / _METRICS) as metrics:  # evaluations of what is not gone on with end nothing
            metrics.truncate_after(first)
    history = _checks(session)
    missed = any_process(is_first() and _missed_validation(session, first, history))
    _protect_best(session, history)
    if _is_over(session, history):
        _go_back_to_best(session, history, print)
        return False
    if first == experiment.steps and not missed:
        return False
    placed, agreed = session.placed, Agreement()
    with ExitStack() as files:
        silent = None if is_first() else files.enter_context(open(os.devnull, "w", encoding="utf-8"))
        progress = files.enter_context(Progress(experiment.steps, initial_step=first, stream=silent))
        also = files.enter_context(_trackers(experiment, first + 1)).write
        metrics = files.enter_context(MetricsFile(logs / _METRICS, also=also))
        samples = files.enter_context(MetricsFile(logs / "samples.jsonl"))
        _greet(session, progress)
        metrics.truncate_after(first)
        samples.truncate_after(first - missed)
        history = [row for row in history if row["step"] <= first]
        if missed:
            history.append(_validate(session, first, metrics, samples, progress))
            _protect_best(session, history)
            if _is_over(session, history):
                _go_back_to_best(session, history, progress.print)
                return False
        meter = Meter(experiment, session.objective, session.graph, metrics, progress, placed.part[1])
        profile = Profile(experiment.profile, logs / "profile", progress.print)
        files.callback(profile.close)
        batches = iterate(session.batches, start=first)
        for step in range(first + 1, experiment.steps + 1):
            with profile.step(step, session.state) as finished:
                with meter.waiting(), profile.waiting():
                    batch = next(batches)
                with profile.starting():
                    session.state, result = placed.update(session.state, batch)
                finished(session.state)
            if meter.add(step, batch, session.state, result):
                _check_skipped(session)
            due, stopped = step % experiment.evaluate_every == 0, agreed(interrupts.received is not None)
            # Saved before it is evaluated: an evaluation that fails loses no update.
            if due or stopped or step == experiment.steps:
                _check_skipped(session)
                with meter.saving():
                    session.save()
            if stopped:
                return True
            if due:
                history.append(_validate(session, step, metrics, samples, progress))
                meter.restart()
                _protect_best(session, history)
                if _is_over(session, history):
                    _go_back_to_best(session, history, progress.print)
                    return False
    return False


def _logs(folder: Path) -> Path:
    """Where this process writes rows of metrics; the first one's are those of the run."""
    folder = folder if is_first() else folder / "processes" / str(jax.process_index())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _trackers(experiment: Experiment, first: int) -> Trackers:
    if not is_first():
        return Trackers(experiment.run)
    wanted: dict[str, Any] = {"tensorboard": experiment.tensorboard, "wandb": experiment.wandb, "first": first}
    return Trackers(experiment.run, **wanted, config=encode(experiment))


def _checks(session: Session) -> list[Row]:
    """What all evaluations of the validation split found."""
    file = _logs(session.experiment.run) / _METRICS
    return [row for row in read_metrics(file) if row["kind"] == "validation"] if file.exists() else []


def _missed_validation(session: Session, step: int, history: list[Row]) -> bool:
    """Whether a run was stopped between the checkpoint of a step and its evaluation."""
    if not step or step % session.experiment.evaluate_every:
        return False
    return (_logs(session.experiment.run) / _METRICS).exists() and all(row["step"] != step for row in history)


def _is_over(session: Session, history: list[Row]) -> bool:
    """Whether patience is at its end, in the eyes of process 0: another one may not have seen all evaluations."""
    return any_process(is_first() and Patience(history, session.experiment.patience).exhausted)


def _protect_best(session: Session, history: list[Row]) -> None:
    """Keeps the best checkpoints: an interrupted run saves more often than it evaluates, which would push them out."""
    experiment = session.experiment
    kept = max(experiment.keep_best, experiment.patience is not None)
    session.checkpoints.protect(*Patience(history).best(kept))


def _go_back_to_best(session: Session, history: list[Row], say: Callable[[str], None]) -> None:
    """Makes the best checkpoint that is whole the latest, and its state that of the session."""
    session.checkpoints.read_again()  # it may have been written long ago
    patience, whole = Patience(history), session.checkpoints.steps
    (step,) = agreed_numbers([next((step for step in patience.best() if step in whole), 0)] if is_first() else [0])
    if not step:
        raise ValueError(f"{session.checkpoints.folder} holds none of the evaluated steps as it was written")
    session.go_back_to(step)
    loss, best = patience.loss(step), (patience.best(1) or [step])[0]
    said = "" if loss is None else f", {loss:.4f}"
    lost = "" if best == step else f"; what was best, after {best}, is damaged or gone"
    say(f"stopped early: the validation loss is lowest after {step} updates{said}{lost}")


def _greet(session: Session, progress: Progress) -> None:
    leaves = jax.tree.leaves(session.state.params)
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    progress.print(
        f"{session.experiment.run}: {sum(leaf.size for leaf in leaves):,} parameters, "
        f"{len(session.splits['train']):,} training examples, "
        f"{session.objective.tokenizer.vocab_size:,} tokens, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}{processes}"
    )
    if int(session.state.step):
        progress.print(f"resuming after {int(session.state.step)} updates")


def _check_skipped(session: Session) -> None:
    """Raises ValueError after so many updates in a row that were left out."""
    in_a_row = int(session.state.skipped_in_a_row)
    if in_a_row < session.experiment.max_skipped:
        return
    checkpoints = session.checkpoints
    good = checkpoints.latest
    where = (
        "no checkpoint was saved before" if good is None else f"the last good one is {checkpoints.folder / str(good)}"
    )
    raise ValueError(
        f"the loss or its gradient was not finite in {in_a_row} updates in a row, the last one step "
        f"{int(session.state.step)}: {where}; a lower learning rate or --optimizer.clip-norm may help, with "
        "--accept-changes True"
    )


def _validate(session: Session, step: int, metrics: MetricsFile, samples: MetricsFile, progress: Progress) -> Row:
    """Scores on the validation split: the row that is written of them."""
    experiment = session.experiment
    split = session.splits["validation"]
    split = split.select(range(min(len(split), experiment.evaluate_examples)))
    scores = session.objective.evaluate(session.model, split)
    progress.print(f"step {step}  validation  " + _described(scores))
    # The samples first: by its row of metrics an evaluation counts as done.
    for index in np.random.default_rng(step).permutation(len(scores.outputs))[:_SAMPLES]:
        row = split[int(index)]
        samples.write({"step": step, **row, "output": scores.outputs[index]})
        progress.print(f"  {row['source']}\n    reference {row['target']}\n    output    {scores.outputs[index]}")
    written: Row = {"step": step, "kind": "validation", **scores.numbers}
    metrics.write(written)
    return written


def _described(scores: Scores) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.numbers.items())


def _finish(session: Session) -> None:
    """Scores on the test split, pictures, and where everything is."""
    experiment, folder, test = session.experiment, session.experiment.run, session.splits["test"]
    # What follows asks all processes. Any checkpoint may have been damaged since it was written. Going back to the best
    # one leaves no later ones, and other settings before kept fewer.
    session.checkpoints.read_again()
    average = max(1, min(experiment.average, len(run.regular(session.checkpoints.steps, experiment))))
    model = run.load(folder, average=average).model if average > 1 else session.model
    if not is_first():
        return
    if average < experiment.average:
        print(f"the mean is of {average} checkpoints, not of {experiment.average}: {folder} holds no more")
    objective = objectives.make(
        experiment, session.objective.tokenizer, session.objective.labels, beam_size=experiment.beam_size
    )
    scores = objective.evaluate(model, test)
    results = {"split": "test", "examples": len(test), "steps": int(session.state.step), **scores.numbers}
    results |= {"average": average, "beam_size": experiment.beam_size}
    if scores.signatures:
        results["sacrebleu"] = scores.signatures
    replace(folder / run.RESULTS, json.dumps(results, indent=2).encode())
    learning_curves(read_metrics(folder / _METRICS), folder / "curves")
    objective.draw(model, test, folder / "attention")
    print(f"test  {_described(scores)}")
    if "exact_match" in scores.numbers:
        share = scores.numbers["exact_match"]
        print(f"test exact match {share:.2%} on {len(test)} examples that were never trained on")
    names = (path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name != lock.NAME)
    print(f"{folder}: " + ", ".join(sorted(names)))
