"""Training objectives, one file each. The task and the model of an experiment determine its objective."""

from train.objectives.continuation import Continuation as Continuation
from train.objectives.for_experiment import kind as kind
from train.objectives.for_experiment import make as make
from train.objectives.for_experiment import named as named
from train.objectives.for_experiment import serving as serving
from train.objectives.labels import Classification as Classification
from train.objectives.labels import Tagging as Tagging
from train.objectives.masking import Masking as Masking
from train.objectives.objective import Objective as Objective
from train.objectives.objective import Scores as Scores
from train.objectives.reading import Reading as Reading
from train.objectives.sequences import SequenceToSequence as SequenceToSequence
