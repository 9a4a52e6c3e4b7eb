"""Which objective an experiment has, by its task and its model."""

from seqattn.models import CaptionerConfig, EncoderConfig, MaskedTokens, TextLabels
from train.config import Experiment
from train.objectives.continuation import Continuation
from train.objectives.labels import Classification, Tagging
from train.objectives.masking import Masking
from train.objectives.objective import Objective
from train.objectives.reading import Reading
from train.objectives.sequences import SequenceToSequence
from train.tasks import Docstrings, PythonCode
from train.tokenizer import Tokenizer


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
    """The objective of an experiment, with the tokenizer and labels of its run."""
    objective = kind(experiment)
    if objective is SequenceToSequence:
        return SequenceToSequence(tokenizer, bleu=experiment.bleu, rouge=isinstance(experiment.task, Docstrings))
    return objective(tokenizer, labels)
