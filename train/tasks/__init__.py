"""Tasks: sources of examples. Each loads a training, a validation and a test split of (source, target) texts."""

from train.tasks.addition import Addition as Addition
from train.tasks.code_topics import CodeTopics as CodeTopics
from train.tasks.dates import Dates as Dates
from train.tasks.docstrings import Docstrings as Docstrings
from train.tasks.labelled_files import LabelledFiles as LabelledFiles
from train.tasks.multi30k import Multi30k as Multi30k
from train.tasks.python_code import PythonCode as PythonCode
from train.tasks.python_tags import PythonTags as PythonTags
from train.tasks.rendered_text import RenderedText as RenderedText
from train.tasks.reverse import Reverse as Reverse
from train.tasks.task import Task as Task
from train.tasks.text_files import TextFiles as TextFiles
from train.tasks.translation import HubTranslation as HubTranslation
from train.tasks.translation import ParallelFiles as ParallelFiles
