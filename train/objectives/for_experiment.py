"""The objective for an experiment: its model decides, and where that writes text, its task."""

from seqattn.models import (
    CaptionerConfig,
    EncoderConfig,
    LanguageModelConfig,
    MaskedTokens,
    TextLabels,
    TokenLabels,
    TransformerConfig,
)
from train.checkpoints.run import Run
from train.config import Experiment
from train.data.tokenizer import Tokenizer
from train.hub.exported import Exported
from train.objectives.continuation import Continuation
from train.objectives.labels import Classification, Tagging
from train.objectives.masking import Masking
from train.objectives.objective import Objective
from train.objectives.reading import Reading
from train.objectives.sequences import SequenceToSequence
from train.tasks.task import Task

_HEADS: dict[type, type[Objective]] = {MaskedTokens: Masking, TokenLabels: Tagging, TextLabels: Classification}
_KINDS: tuple[type[Objective], ...] = (SequenceToSequence, Continuation, Reading, *_HEADS.values())
_OBJECTIVES = {kind.name: kind for kind in _KINDS}


def named(name: str) -> type[Objective]:
    """The objective that tasks and exported models call by a name.

    Raises:
        ValueError: there is none of this name.

    >>> named("Continuation").command
    'complete'
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective ({name}) must be one of {', '.join(_OBJECTIVES)}")
    return _OBJECTIVES[name]


def kind(experiment: Experiment) -> type[Objective]:
    """What an experiment is about.

    Raises:
        ValueError: the head of an encoder is for another objective than the examples are.
    """
    if isinstance(experiment.model, CaptionerConfig):
        return Reading
    if isinstance(experiment.model, EncoderConfig):
        return _of_encoder(experiment.task, type(experiment.model.head))
    return named(experiment.task.objective)


def _of_encoder(task: Task, head: type) -> type[Objective]:
    found, served = _HEADS[head], task.encoder_objective()
    if served not in (None, found.name):
        needed = next(each.__name__ for each, objective in _HEADS.items() if objective.name == served)
        raise ValueError(
            f"the examples of {type(task).__name__} are for {served}, and the head {head.__name__} is for "
            f"{found.name}: give the model the head {needed}"
        )
    return found


def make(experiment: Experiment, tokenizer: Tokenizer, labels: tuple[str, ...], *, beam_size: int = 1) -> Objective:
    """The objective of an experiment, with the tokenizer and labels of its run; with a beam it is searched, if above 1.

    Raises:
        ValueError: BLEU or a beam for what does not write a text from a source text, or a model that cannot tell apart
            the texts of a packed row.
    """
    if experiment.batches.packed and not isinstance(experiment.model, TransformerConfig | LanguageModelConfig):
        raise ValueError(
            "batches.packed (True) is for a TransformerConfig or a LanguageModelConfig, which tell the texts of a row "
            f"apart, and the model is a {type(experiment.model).__name__}: set --batches.packed False"
        )
    objective = kind(experiment)
    if objective is SequenceToSequence:
        scores = {"bleu": experiment.bleu, "rouge": "rouge" in experiment.task.scores}
        return SequenceToSequence(tokenizer, **scores, beam_size=beam_size)
    here = f"is for texts written from a source text, and the objective here is {objective.name}"
    if experiment.bleu:
        raise ValueError(f"bleu ({experiment.bleu}) {here}: set --bleu False")
    if (beam_size := max(beam_size, experiment.beam_size)) > 1:
        raise ValueError(f"beam_size ({beam_size}) {here}: set --beam-size 1")
    return objective(tokenizer, labels)


def check_serves(trained: Run | Exported, command: str, objective: type[Objective]) -> None:
    """Refuses a run that a command cannot serve.

    Args:
        trained: the run.
        command: the name of the module, "translate".
        objective: what the runs that it serves are about.

    Raises:
        ValueError: naming what the run is about, and the command that serves it.
    """
    found = named(trained.objective) if isinstance(trained, Exported) else kind(trained.experiment)
    if found is not objective:
        raise ValueError(
            f"train.{command} serves runs of the objective {objective.name}, and that of {trained.folder} is "
            f"{found.name}, which python -m train.{found.command} serves"
        )
