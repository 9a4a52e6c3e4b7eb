"""The objective for an experiment: its model decides, and where that writes text, its task."""

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
    """The objective that tasks and exported models call by a name.

    Raises:
        ValueError: there is none of this name.

    >>> named("Continuation").command
    'complete'
    """
    if name not in _OBJECTIVES:
        raise ValueError(f"objective ({name}) must be one of {', '.join(_OBJECTIVES)}")
    return _OBJECTIVES[name]


def serving(config: Model) -> tuple[type[Objective], ...]:
    """The objectives that a model of a config can be trained for.

    >>> [kind.name for kind in serving(TransformerConfig(11))]
    ['SequenceToSequence', 'Continuation']
    """
    return tuple(kind for kind in _KINDS if kind.serves(config))


def kind(experiment: Experiment) -> type[Objective]:
    """What an experiment is about.

    Raises:
        ValueError: the head of an encoder is for another objective than the examples are.
    """
    first, *others = serving(experiment.model)
    if others:  # of a model that writes text
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
        f"the examples of {type(task).__name__} are for {served}, and the head {heads[0]} is for {found.name}: give "
        f"the model the head {heads[-1]}"
    )


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
    if not objective.searches:
        _check_no_search(objective, experiment.bleu, max(beam_size, experiment.beam_size))
    measured = {"bleu": experiment.bleu, "rouge": "rouge" in experiment.task.scores}
    return objective.of_run(tokenizer, labels, **measured, beam_size=beam_size)


def _check_no_search(objective: type[Objective], bleu: bool, beam_size: int) -> None:
    here = f"is for texts written from a source text, and the objective here is {objective.name}"
    if bleu:
        raise ValueError(f"bleu ({bleu}) {here}: set --bleu False")
    if beam_size > 1:
        raise ValueError(f"beam_size ({beam_size}) {here}: set --beam-size 1")
