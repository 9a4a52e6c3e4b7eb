"""One file per experiment; its docstring holds the command, the time and the result."""

from train.experiments.addition import ADDITION
from train.experiments.dates import DATES
from train.experiments.reverse import REVERSE
from train.experiments.translation import TRANSLATION

__all__ = ["ADDITION", "DATES", "REVERSE", "TRANSLATION"]
