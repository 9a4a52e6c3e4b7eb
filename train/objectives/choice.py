"""Which objective an experiment has, by its task and its model."""

from seqattn.models import (
    CaptionerConfig,
    EncoderConfig,
    LanguageModelConfig,
    MaskedTokens,
    TextLabels,
    TransformerConfig,
)
from train.config import Experiment
from train.data.tokenizer import Tokenizer
from train.hub.exported import Exported
from train.objectives.continuation import Continuation
from train.objectives.labels import Classification, Tagging
from train.objectives.masking import Masking
from train.objectives.objective import Objective
from train.objectives.reading import Reading
from train.objectives.sequences import SequenceToSequence
from train.run import Run
from train.tasks import Docstrings, PythonCode

COMMANDS = {"SequenceToSequence": "translate", "Continuation": "complete"}
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
        scores = {"bleu": experiment.bleu, "rouge": isinstance(experiment.task, Docstrings)}
        return SequenceToSequence(tokenizer, **scores, beam_size=beam_size)
    here = f"is for texts written from a source text, and the objective here is {objective.__name__}"
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
    found = trained.objective if isinstance(trained, Exported) else kind(trained.experiment).__name__
    if found != objective.__name__:
        raise ValueError(
            f"train.{command} serves runs of the objective {objective.__name__}, and that of {trained.folder} is "
            f"{found}, which python -m train.{COMMANDS.get(found, 'evaluate')} serves"
        )
