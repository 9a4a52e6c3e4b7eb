"""Trained models of any origin: a run, an exported model, or a folder of transformers."""

from pathlib import Path

from train import objectives
from train.checkpoints import run
from train.checkpoints.run import Run
from train.hub import exported, hf_folder
from train.hub.exported import Exported
from train.objectives import Objective


def load_trained(folder: Path, *, average: int | None = None) -> Run | Exported:
    """Loads the model of a run folder, of an exported folder, or of a folder of transformers.

    Args:
        folder: the folder; `hf:FOLDER` for one of transformers.
        average: number of checkpoints to average; None is the setting of the run.

    Raises:
        ValueError: `average` is above 1 and the folder is no run, which alone has checkpoints; or see
            `train.checkpoints.run.load`, `train.hub.exported.load` and `train.hub.hf_folder.load`.
        FileNotFoundError: see there.
    """
    if not hf_folder.is_hf(folder) and not exported.is_exported(folder):
        return run.load(folder, average=average)
    if average not in (None, 1):
        raise ValueError(f"{folder} is no run and has no checkpoints to average: set average to 1")
    return hf_folder.load(folder) if hf_folder.is_hf(folder) else exported.load(folder)


def check_serves(trained: Run | Exported, command: str, objective: type[Objective]) -> None:
    """Checks that a command can serve a run or exported model.

    Args:
        trained: the run or exported model.
        command: name of the command's module, such as "translate".
        objective: the objective that the command serves.

    Raises:
        ValueError: the run has another objective; the message names it and the command for it.
    """
    if isinstance(trained, Exported) and not trained.objective:
        raise ValueError(
            f"{trained.folder} is an encoder without a head, which has no objective: use python -m train.embed"
        )
    found = (
        objectives.named(trained.objective) if isinstance(trained, Exported) else objectives.kind(trained.experiment)
    )
    if found is not objective:
        raise ValueError(
            f"train.{command} serves runs of the objective {objective.name}, but that of {trained.folder} is "
            f"{found.name}: use python -m train.{found.command}"
        )


def check_task(trained: Run | Exported, experiment: Path | None) -> None:
    """Checks that the task in an experiment file is the one that a run was trained with.

    Another file may define another task of the same name. A task with the source of the training passes without its
    data, which may be large or on another machine. If the source changed, the task must give the same examples.

    Args:
        trained: the run, or the exported model, which has no task and needs no check.
        experiment: the file, if the user gave one.

    Raises:
        ValueError: the task of the file has another source and gives other examples.
    """
    if experiment is None or not isinstance(trained, Run):
        return
    if not trained.source or trained.source != run.task_source(trained.experiment.task):
        trained.splits()
