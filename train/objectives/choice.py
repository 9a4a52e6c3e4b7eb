"""Which objective an experiment has, by its task and its model."""

from seqattn.models import CaptionerConfig, EncoderConfig, MaskedTokens, TextLabels
from train.config import Experiment
from train.objectives.continuation import Continuation
from train.objectives.labels import Classification, Tagging
from train.objectives.masking import Masking
from train.objectives.objective import Objective
from train.objectives.reading import Reading
from train.objectives.sequences import SequenceToSequence
from train.run import Run
from train.tasks import Docstrings, PythonCode
from train.tokenizer import Tokenizer

_COMMANDS: dict[type[Objective], str] = {SequenceToSequence: "translate", Continuation: "complete"}
"""What shows how a model does on a text of the user; others are measured."""


def kind(experiment: Experiment) -> type[Objective]:
    """What an experiment is about."""
    if isinstance(experiment.model, CaptionerConfig):
        return Reading
    if isinstance(experiment.model, EncoderConfig):
        if isinstance(experiment.model.head, MaskedTokens):
            return Masking
        return Classification if isinstance(experiment.model.head, TextLabels) else Tagging
    return Continuation if isinstance(experiment.task, PythonCode) else SequenceToSequence


def make(experiment: Experiment, tokenizer: Tokenizer, labels: tuple[str, ...]) -> Objective:
    """The objective of an experiment, with the tokenizer and labels of its run.

    Raises:
        ValueError: BLEU of what does not write a text from a source text.
    """
    objective = kind(experiment)
    if experiment.bleu and objective is not SequenceToSequence:
        raise ValueError(
            f"bleu ({experiment.bleu}) measures texts written from a source text, and the objective here is "
            f"{objective.__name__}: set --bleu False"
        )
    if objective is SequenceToSequence:
        return SequenceToSequence(tokenizer, bleu=experiment.bleu, rouge=isinstance(experiment.task, Docstrings))
    return objective(tokenizer, labels)


def check_serves(trained: Run, command: str, objective: type[Objective]) -> None:
    """Refuses a run that a command cannot serve.

    Args:
        trained: the run.
        command: the name of the module, "translate".
        objective: what the runs that it serves are about.

    Raises:
        ValueError: naming what the run is about, and the command that serves it.
    """
    found = kind(trained.experiment)
    if found is not objective:
        raise ValueError(
            f"train.{command} serves runs of the objective {objective.__name__}, and that of {trained.folder} is "
            f"{found.__name__}, which python -m train.{_COMMANDS.get(found, 'evaluate')} serves"
        )
