"""One file per experiment; its docstring holds the command, the time and the result."""

from train.experiments.ablations import ABLATIONS
from train.experiments.addition import ADDITION
from train.experiments.bottleneck import BOTTLENECK
from train.experiments.dates import DATES
from train.experiments.docstrings_compressed import DOCSTRINGS_COMPRESSED
from train.experiments.docstrings_experts import DOCSTRINGS_EXPERTS
from train.experiments.docstrings_recurrent import DOCSTRINGS_RECURRENT
from train.experiments.docstrings_stream import DOCSTRINGS_STREAM
from train.experiments.docstrings_transformer import DOCSTRINGS_TRANSFORMER
from train.experiments.few_tags import FEW_TAGS
from train.experiments.in_between import IN_BETWEEN
from train.experiments.language import LANGUAGE
from train.experiments.masked import MASKED
from train.experiments.multi30k import MULTI30K
from train.experiments.reading import READING
from train.experiments.reading_transformer import READING_TRANSFORMER
from train.experiments.recurrent_language import RECURRENT_LANGUAGE
from train.experiments.reverse import REVERSE
from train.experiments.tags import TAGS
from train.experiments.topics import TOPICS
from train.experiments.translation import TRANSLATION

__all__ = [
    "ABLATIONS",
    "ADDITION",
    "BOTTLENECK",
    "DATES",
    "DOCSTRINGS_COMPRESSED",
    "DOCSTRINGS_EXPERTS",
    "DOCSTRINGS_RECURRENT",
    "DOCSTRINGS_STREAM",
    "DOCSTRINGS_TRANSFORMER",
    "FEW_TAGS",
    "IN_BETWEEN",
    "LANGUAGE",
    "MASKED",
    "MULTI30K",
    "READING",
    "READING_TRANSFORMER",
    "RECURRENT_LANGUAGE",
    "REVERSE",
    "TAGS",
    "TOPICS",
    "TRANSLATION",
]
