"""The objective of an experiment: the model determines it, or the task if the model generates text."""

from seqattn.models import LanguageModelConfig, TransformerConfig
from train.config import Experiment, Model
from train.data.tokenizer import Tokenizer
from train.objectives.continuation import Continuation
from train.objectives.labels import Classification, Tagging
from train.objectives.masking import Masking
from train.objectives.objective import Objective
from train.objectives.reading import Reading
from train.objectives.sequences import SequenceToSequence
from train.tasks.task import Task

_KINDS: tuple[type[Objective], ...] = (SequenceToSequence, Continuation, Reading, Masking, Tagging, Classification)
_OBJECTIVES = {kind.name: kind for kind in _KINDS}


def named(name: str) -> type[Objective]:
    """Returns the objective of a name, as tasks and exported models give it.

    Raises:
        ValueError: no objective has this name.

    >>> named("Continuation").command
    'complete'
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective ({name}) must be one of {', '.join(_OBJECTIVES)}")
    return _OBJECTIVES[name]


def serving(config: Model) -> tuple[type[Objective], ...]:
    """Returns the objectives that a model of this config can be trained for.

    >>> [kind.name for kind in serving(TransformerConfig(11))]
    ['SequenceToSequence', 'Continuation']
    """
    return tuple(kind for kind in _KINDS if kind.serves(config))


def kind(experiment: Experiment) -> type[Objective]:
    """Returns the objective of an experiment.

    Raises:
        ValueError: the head of an encoder and the examples of the task are for different objectives, or the encoder has
            no head.
    """
    served = serving(experiment.model)
    if not served:
        raise ValueError("an encoder with the head TokenVectors has no objective: give the model another head")
    first, *others = served
    if others:  # only models that generate text serve several objectives
        return named(experiment.task.objective)
    if first.head is not None:
        _check_head(experiment.task, first)
    return first


def _check_head(task: Task, found: type[Objective]) -> None:
    served = task.encoder_objective()
    if served is None or (needed := named(served)) is found:
        return
    heads = [each.head.__name__ for each in (found, needed) if each.head is not None]
    raise ValueError(
        f"the examples of {type(task).__name__} are for {served}, but the head {heads[0]} is for {found.name}: give "
        f"the model the head {heads[-1]}"
    )


def make(experiment: Experiment, tokenizer: Tokenizer, labels: tuple[str, ...], *, beam_size: int = 1) -> Objective:
    """Makes the objective of an experiment.

    Args:
        experiment: the experiment.
        tokenizer: the tokenizer of its run.
        labels: the labels of its run, in the order of their ids; empty if the model generates text.
        beam_size: number of hypotheses of the beam search for outputs; 1 is greedy search.

    Raises:
        ValueError: BLEU or a beam is set for an objective without a source text, or packed batches are set for a model
            that cannot separate the texts of a packed row.
    """
    if experiment.batches.packed and not isinstance(experiment.model, TransformerConfig | LanguageModelConfig):
        raise ValueError(
            "batches.packed (True) needs a TransformerConfig or a LanguageModelConfig, which separate the texts of a "
            f"row, but the model is a {type(experiment.model).__name__}: set --batches.packed False"
        )
    objective = kind(experiment)
    if not objective.searches:
        _check_no_search(objective, experiment.bleu, max(beam_size, experiment.beam_size))
    measured = {"bleu": experiment.bleu, "rouge": "rouge" in experiment.task.scores}
    return objective.of_run(tokenizer, labels, **measured, beam_size=beam_size)


def _check_no_search(objective: type[Objective], bleu: bool, beam_size: int) -> None:
    here = f"is only for texts generated from a source text, but the objective is {objective.name}"
    if bleu:
        raise ValueError(f"bleu ({bleu}) {here}: set --bleu False")
    if beam_size > 1:
        raise ValueError(f"beam_size ({beam_size}) {here}: set --beam-size 1")
