"""The training loop: updates, metrics, evaluations and checkpoints, until the last step, early stopping or a signal."""

import contextlib
import json
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
    """Trains an experiment, or resumes it from the latest checkpoint in its run folder.

    If an error ends the run, `traceback.txt` in the run folder has its traceback.

    Args:
        experiment: the experiment as the user gave it; `experiment.run` is the run folder.

    Returns:
        The exit code of the process: 0 at the end of the run, 130 or 143 after Ctrl-C or SIGTERM.

    Raises:
        ValueError: the run folder holds something else, or another process trains in it; the settings do not fit the
            data or the devices; or the loss or gradient was not finite for `max_skipped` consecutive updates.
        OSError: a checkpoint could not be saved.
    """
    # First of all: JAX must not use the devices before it knows the other processes.
    experiment.processes.connect()
    # The lock is taken before anything is read, since another process could change the folder in between.
    with _locked(experiment.run), _noting_where(experiment.run):
        session = prepare(experiment)
        with Interrupts() as interrupts, session.checkpoints:
            stopped = _train(session, interrupts)
            # Inside the context of signals: a signal must not cut off the last checkpoint.
            session.checkpoints.wait()
        # A signal during that wait stops the run too: evaluating the test split takes long.
        stopped = stopped or any_process(interrupts.received is not None)
        if not stopped:
            _finish(session)
            return 0
        # With several processes, another one may have received the signal.
        print(f"stopped by {interrupts.name} after {int(session.state.step)} updates; the same command resumes")
        return interrupts.exit_code()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks the run folder for process 0, or raises in all processes.

    A folder that was created here is removed again if nothing was written to it.
    """
    is_new, refusal = is_first() and not folder.exists(), None
    try:
        with ExitStack() as held:
            try:
                # Every process checks: without a shared file system each sees its own folder.
                check_folder(folder)
                if is_first():
                    held.enter_context(lock.RunLock(folder))
            except (ValueError, OSError) as error:
                refusal = error
            # All processes stop together: one left alone would wait for the others at its first collective.
            if any_process(refusal is not None):
                raise refusal or ValueError(f"another process cannot train in {folder}; its message says why")
            yield
    finally:
        # A refused experiment, such as one with a mistyped setting, leaves no empty folder behind.
        with contextlib.suppress(OSError):
            if is_new and [path.name for path in folder.iterdir()] == [lock.NAME]:
                (folder / lock.NAME).unlink()
                folder.rmdir()


@contextmanager
def _noting_where(folder: Path) -> Iterator[None]:
    """Writes the traceback of an error to a file, since the command prints only one sentence."""
    try:
        # An old traceback would look like one of this run.
        with contextlib.suppress(OSError):
            (folder / _TRACEBACK).unlink(missing_ok=True)
        yield
    except Exception:
        if (folder / run.CONFIG).exists():  # without it the run never started, and leaves no files
            with contextlib.suppress(OSError):
                (_logs(folder) / _TRACEBACK).write_text(traceback.format_exc(), "utf-8")
        raise


def _train(session: Session, interrupts: Interrupts) -> bool:
    """Makes the updates that are left; returns True if a signal stopped them."""
    experiment, first = session.experiment, int(session.state.step)
    log = _logs(experiment.run) / _METRICS
    # With changed settings, evaluations after the checkpoint belong to updates that will not be repeated. They must not
    # count for patience.
    if session.changed and is_first() and log.exists():
        with MetricsFile(log) as metrics:
            metrics.truncate_after(first)
    history = _checks(session)
    # A checkpoint is saved before its evaluation, so a run that was killed in between still owes one.
    missed = any_process(is_first() and _missed_validation(session, first, history))
    # The run may have been killed between its last evaluation and the return to the best checkpoint.
    if _settle(session, history, print):
        return False
    # A finished run goes straight to its results, without a compilation.
    if first == experiment.steps and not missed:
        return False
    with _written(session, first) as written:
        _greet(session, written.progress)
        # Rows after the checkpoint come from updates that were lost; this session writes them again.
        written.metrics.truncate_after(first)
        # Samples are written before the row of metrics, so an evaluation that was cut off may have left some.
        written.samples.truncate_after(first - missed)
        history = [row for row in history if row["step"] <= first]
        if missed and _evaluate(session, first, history, written):
            return False
        return _update(session, first, history, written, interrupts)


@dataclass(frozen=True)
class _Written:
    """What a session writes while it trains."""

    progress: Progress
    metrics: MetricsFile
    samples: MetricsFile
    profile: Profile


@contextmanager
def _written(session: Session, first: int) -> Iterator[_Written]:
    """Opens what a session writes, and closes it."""
    experiment, logs = session.experiment, _logs(session.experiment.run)
    with ExitStack() as files:
        # All processes run the same code; only the first one is allowed to print.
        silent = None if is_first() else files.enter_context(open(os.devnull, "w", encoding="utf-8"))
        progress = files.enter_context(Progress(experiment.steps, initial_step=first, stream=silent))
        also = files.enter_context(_trackers(experiment, first + 1)).write
        metrics = files.enter_context(MetricsFile(logs / _METRICS, also=also))
        samples = files.enter_context(MetricsFile(logs / "samples.jsonl"))
        profile = Profile(experiment.profile, logs / "profile", progress.print)
        files.callback(profile.close)
        yield _Written(progress, metrics, samples, profile)


def _update(session: Session, first: int, history: list[Row], written: _Written, interrupts: Interrupts) -> bool:
    """Makes updates, checkpoints and evaluations; returns True if a signal stopped them."""
    experiment, placed, profile, agreed = session.experiment, session.placed, written.profile, Agreement()
    shards = placed.part[1]
    meter = Meter(experiment, session.objective, session.graph, written.metrics, written.progress, shards)
    # The order of batches follows from the seed, so a resumed run skips to its place without reading the data.
    batches = iterate(session.batches, start=first)
    for step in range(first + 1, experiment.steps + 1):
        with profile.step(step, session.state) as finished:
            with meter.waiting(), profile.waiting():
                batch = next(batches)
            with profile.starting():
                # JAX enqueues the update: the devices compute it while the loop prepares the next batch.
                session.state, result = placed.update(session.state, batch)
            finished(session.state)
        # Only after a row, which has waited for the devices anyway: reading the counter at each step would stall.
        if meter.add(step, batch, session.state, result):
            _check_skipped(session)
        # All processes must stop after the same step, since they share the collectives of updates and saves.
        due, stopped = step % experiment.evaluate_every == 0, agreed(interrupts.received is not None)
        # Saved before the evaluation, so that an evaluation that fails loses no update.
        if due or stopped or step == experiment.steps:
            # A state that only skips updates must not replace an older checkpoint.
            _check_skipped(session)
            with meter.saving():
                session.save()
        # No evaluation after a signal: job managers kill a process that does not end soon.
        if stopped:
            return True
        if due:
            if _evaluate(session, step, history, written):
                return False
            # The time of the evaluation must not lower the reported throughput.
            meter.restart()
    return False


def _evaluate(session: Session, step: int, history: list[Row], written: _Written) -> bool:
    """Adds an evaluation to the history and settles; returns True if the run is over."""
    history.append(_validate(session, step, written.metrics, written.samples, written.progress))
    return _settle(session, history, written.progress.print)


def _settle(session: Session, history: list[Row], say: Callable[[str], None]) -> bool:
    """Protects the best checkpoint, and goes back to it if patience has ended the run; returns True if it has."""
    # Before the next save, which could remove a checkpoint that has just become the best.
    _protect_best(session, history)
    over = _is_over(session, history)
    if over:
        _go_back_to_best(session, history, say)
    return over


def _logs(folder: Path) -> Path:
    """The folder for this process's metrics: the run folder for process 0, a subfolder for the others."""
    # Processes may share a file system, and two writers would mix their rows.
    folder = folder if is_first() else folder / "processes" / str(jax.process_index())
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _trackers(experiment: Experiment, first: int) -> Trackers:
    """The trackers of the run in process 0, none in the others."""
    # Every process has the same numbers; a tracker would show the run several times.
    if not is_first():
        return Trackers(experiment.run)
    wanted: dict[str, Any] = {"tensorboard": experiment.tensorboard, "wandb": experiment.wandb, "first": first}
    return Trackers(experiment.run, **wanted, config=encode(experiment))


def _checks(session: Session) -> list[Row]:
    """The rows of all evaluations of the validation split so far."""
    file = _logs(session.experiment.run) / _METRICS
    return [row for row in read_metrics(file) if row["kind"] == "validation"] if file.exists() else []


def _missed_validation(session: Session, step: int, history: list[Row]) -> bool:
    """Whether the run was stopped after it saved the checkpoint of a step and before it evaluated it."""
    if not step or step % session.experiment.evaluate_every:
        return False
    # Without a metrics file no evaluation is known, so none is repeated.
    return (_logs(session.experiment.run) / _METRICS).exists() and all(row["step"] != step for row in history)


def _is_over(session: Session, history: list[Row]) -> bool:
    """Whether patience has run out."""
    # Process 0 decides: only its metrics file is certain to hold all evaluations.
    return any_process(is_first() and Patience(history, session.experiment.patience).exhausted)


def _protect_best(session: Session, history: list[Row]) -> None:
    """Protects the best checkpoints from removal."""
    experiment = session.experiment
    # An interrupted run saves more often than it evaluates, so patience below `keep_checkpoints` alone is not enough.
    kept = max(experiment.keep_best, experiment.patience is not None)
    session.checkpoints.protect(*Patience(history).best(kept))


def _go_back_to_best(session: Session, history: list[Row], say: Callable[[str], None]) -> None:
    """Restores the best intact checkpoint and makes it the latest one."""
    # Verified again, since a file may have been damaged after it was written.
    session.checkpoints.read_again()
    # Process 0 chooses for all, since others may see other files or none.
    patience, whole = Patience(history), session.checkpoints.steps
    (step,) = agreed_numbers([next((step for step in patience.best() if step in whole), 0)] if is_first() else [0])
    if not step:
        raise ValueError(f"{session.checkpoints.folder} holds no intact checkpoint of an evaluated step")
    session.go_back_to(step)
    loss, best = patience.loss(step), (patience.best(1) or [step])[0]
    said = "" if loss is None else f", {loss:.4f}"
    lost = "" if best == step else f"; the best checkpoint, after {best}, is damaged or gone"
    say(f"stopped early: the validation loss is lowest after {step} updates{said}{lost}")


def _greet(session: Session, progress: Progress) -> None:
    """Prints the sizes of model, data, vocabulary and devices."""
    count, trained = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (session.state.params, session.state.trained)
    )
    share = "" if session.state.tuned is None else f" ({trained:,} trained beside them, {trained / count:.2%})"
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    progress.print(
        f"{session.experiment.run}: {count:,} parameters{share}, "
        f"{session.training_examples:,} training examples, "
        f"{session.objective.tokenizer.vocab_size:,} tokens, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}{processes}"
    )
    if int(session.state.step):
        progress.print(f"resuming after {int(session.state.step)} updates")


def _check_skipped(session: Session) -> None:
    """Raises ValueError after `max_skipped` consecutive skipped updates."""
    # Reading it waits for the devices. The update itself keeps the state unchanged meanwhile.
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
    """Evaluates the model on the validation split, writes samples and a row of metrics, and returns the row."""
    experiment = session.experiment
    split = session.splits["validation"]
    split = split.select(range(min(len(split), experiment.evaluate_examples)))
    scores = session.objective.evaluate(session.model, split)
    progress.print(f"step {step}  validation  " + _described(scores))
    # Samples come first: once its row of metrics is written, an evaluation counts as done. With the step as the seed, a
    # repeated evaluation shows the same samples.
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
    """Evaluates the model on the test split, draws the pictures, and prints where the files are."""
    experiment, folder, test = session.experiment, session.experiment.run, session.splits["test"]
    # All processes take part: reading checkpoints, and a model on a mesh, need all of them. A checkpoint may have been
    # damaged since it was written.
    session.checkpoints.read_again()
    # There may be fewer checkpoints than `average`: early stopping removes later ones, and earlier settings kept fewer.
    average = max(1, min(experiment.average, len(run.regular(session.checkpoints.steps, experiment))))
    model = session.averaged(average) if average > 1 else session.model
    # A new objective, since validation uses greedy decoding and the test split `beam_size` hypotheses.
    objective = objectives.make(
        experiment, session.objective.tokenizer, session.objective.labels, beam_size=experiment.beam_size
    )
    scores = objective.evaluate(model, test)
    if not is_first():
        # The pictures need all processes too. Those of process 0 stay.
        with tempfile.TemporaryDirectory() as elsewhere:
            objective.draw(model, test, Path(elsewhere))
        return
    if average < experiment.average:
        print(f"the mean is of {average} checkpoints, not of {experiment.average}: {folder} holds no more")
    results = {"split": "test", "examples": len(test), "steps": int(session.state.step), **scores.numbers}
    results |= {"average": average, "beam_size": experiment.beam_size}
    if scores.signatures:
        results["sacrebleu"] = scores.signatures
    # Results are written before the pictures, so that an error while drawing does not lose them.
    replace(folder / run.RESULTS, json.dumps(results, indent=2).encode())
    learning_curves(read_metrics(folder / _METRICS), folder / "curves")
    objective.draw(model, test, folder / "attention")
    print(f"test  {_described(scores)}")
    if "exact_match" in scores.numbers:
        share = scores.numbers["exact_match"]
        print(f"test exact match {share:.2%} on {len(test)} held-out examples")
    names = (path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name != lock.NAME)
    print(f"{folder}: " + ", ".join(sorted(names)))
