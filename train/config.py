"""What one run is: frozen dataclasses, written to JSON and read back without loss."""

import dataclasses
import functools
import math
import operator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from seqattn.checks import check_integer, check_number, check_rate, check_seed
from seqattn.interop.codec import SubclassesOf, UnknownType, from_json, to_json
from seqattn.models import (
    CaptionerConfig,
    EncoderConfig,
    LanguageModelConfig,
    RecurrentLanguageModelConfig,
    Seq2SeqConfig,
    TokenLabels,
    TransformerConfig,
)
from train.data.batches import Batches
from train.data.tokenizer import ByteLevelBPE, Characters, SavedTokenizer
from train.devices.parallel import Parallel, Replicated
from train.devices.processes import Processes
from train.reports.profile import parse_steps
from train.tasks.task import Task, every_task
from train.update.initializers import Kaiming, Normal, Uniform, Xavier
from train.update.optimizer import Optimizer

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = functools.reduce(operator.or_, every_task())
"""Any task that can be trained on; `task:dates` and so on on the command line."""

FROM_TOKENIZER = 0
"""As the `vocab_size` of a model: take the size of the tokenizer's vocabulary."""

FROM_DATA = 0
"""As the `num_labels` of a model: as many as the training split has."""


Model = (
    Annotated[TransformerConfig, tyro.conf.subcommand("transformer", default=TransformerConfig(FROM_TOKENIZER))]
    | Annotated[Seq2SeqConfig, tyro.conf.subcommand("seq2seq", default=Seq2SeqConfig(FROM_TOKENIZER))]
    | Annotated[
        LanguageModelConfig, tyro.conf.subcommand("language-model", default=LanguageModelConfig(FROM_TOKENIZER))
    ]
    | Annotated[
        RecurrentLanguageModelConfig,
        tyro.conf.subcommand("recurrent-language-model", default=RecurrentLanguageModelConfig(FROM_TOKENIZER)),
    ]
    | Annotated[CaptionerConfig, tyro.conf.subcommand("captioner", default=CaptionerConfig(FROM_TOKENIZER))]
    | Annotated[
        EncoderConfig,
        tyro.conf.subcommand("encoder", default=EncoderConfig(FROM_TOKENIZER, head=TokenLabels(FROM_DATA))),
    ]
)
"""Any model that can be trained; `model:seq2seq` and so on on the command line."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that decides a run."""

    task: Annotated[AnyTask, SubclassesOf(Task)]
    """Where examples come from."""
    model: Model
    """Which model; a vocab_size of 0 is taken from the tokenizer."""
    run: Path
    """Folder of the run: checkpoints, metrics.jsonl, samples, pictures. The same command again resumes there."""
    tokenizer: Characters | ByteLevelBPE | SavedTokenizer = Characters()
    """How text becomes tokens; trained on the training split."""
    batches: Batches = Batches()
    """How examples become batches."""
    optimizer: Optimizer = Optimizer()
    """How gradients become updates."""
    steps: int = 1000
    """Updates in all."""
    evaluate_every: int = 250
    """Updates between two evaluations; each also saves a checkpoint."""
    evaluate_examples: int = 500
    """Most examples of the validation split to evaluate on."""
    log_every: int = 10
    """Updates between two rows of metrics."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard, into the folder `tensorboard` of the run; needs tensorboardX."""
    wandb: str | None = None
    """Also log metrics to this project of Weights & Biases; needs wandb, and a network."""
    profile: str | None = None
    """Trace these updates, such as 20:25, into the folder `profile` of the run, and tell where their time went."""
    keep_checkpoints: int = 2
    """Latest checkpoints that stay."""
    keep_best: int = 0
    """Checkpoints with the lowest validation losses that stay, too."""
    average: int = 1
    """Judge the test split by the mean of the parameters of so many of the latest checkpoints (Vaswani 2017, 6.1)."""
    beam_size: int = 1
    """Hypotheses of each text of the test split."""
    patience: int | None = None
    """Stop once so many evaluations in a row have not lowered the validation loss, and go back to the best one."""
    initializer: Uniform | Normal | Xavier | Kaiming | None = None
    """Draw every matrix anew by this; None for what each layer has of its own."""
    word_vectors: Path | None = None
    """A text file of word2vec or GloVe: the tokens that it has begin with its vectors."""
    start_from: Path | None = None
    """A run whose tokenizer is taken over, and of its latest checkpoint all parameters with the same path and shape."""
    frozen: tuple[str, ...] = ()
    """Patterns of paths, such as `embedding/*`: parameters that training leaves as they are."""
    parallel: Parallel = Replicated()
    """How updates are spread over devices."""
    processes: Processes = Processes()
    """Who trains together, on one machine or several."""
    label_smoothing: float = 0.0
    """Epsilon of Szegedy 2016, of the training loss alone."""
    pieces: int = 1
    """Compute each batch in so many pieces and add their gradients: less memory, the same update."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """What losses and gradients are computed in; parameters and their sums stay float32."""
    ema: float | None = None
    """Decay of a moving average of the parameters, such as 0.999: it is what is evaluated and translated with."""
    max_skipped: int = 10
    """An update that is not finite is left out; stop after so many in a row."""
    bleu: bool = False
    """Also measure BLEU and chrF, with sacrebleu."""
    accept_changes: bool = False
    """Let a run go on with other steps, optimizer, batches, smoothing, pieces, dtype, patience, evaluations or seed.

    What is otherwise is told, and written into its checkpoints.
    """
    seed: int = 0
    """Decides parameters, order of examples and dropout; 0 to 2**32 - 1."""

    def __post_init__(self) -> None:
        counts = (
            "steps",
            "evaluate_every",
            "evaluate_examples",
            "log_every",
            "keep_checkpoints",
            "average",
            "beam_size",
        )
        for name in (*counts, "pieces", "max_skipped"):
            check_integer(name, getattr(self, name), 1)
        if self.profile is not None:
            first, _ = parse_steps(self.profile)
            if first > self.steps:
                raise ValueError(f"profile ({self.profile}) must begin by the last update: steps ({self.steps})")
        check_seed(self.seed)
        if self.patience is not None and not 1 <= self.patience < self.keep_checkpoints:
            raise ValueError(
                f"patience ({self.patience}) must be at least 1 and below keep_checkpoints ({self.keep_checkpoints}): "
                "the best checkpoint must still be there"
            )
        check_integer("keep_best", self.keep_best, 0)
        saved = min(self.keep_checkpoints, math.ceil(self.steps / self.evaluate_every))
        if self.average > saved:
            raise ValueError(
                f"average ({self.average}) must be at most the number of checkpoints at the end ({saved}), by "
                f"keep_checkpoints ({self.keep_checkpoints}), steps ({self.steps}) and evaluate_every "
                f"({self.evaluate_every}); --average 1 takes the last one alone"
            )
        if self.ema is not None:
            check_number("ema", self.ema, above=0, below=1, hint=", or None for no average")
        check_rate(self.label_smoothing, "label_smoothing")
        for name in ("initializer", "word_vectors"):
            if self.start_from is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) and start_from ({self.start_from}) exclude each other: the "
                    "parameters of the run to start from would win wherever they fit"
                )


def encode(value: Any) -> Any:
    """A config as JSON values; dataclasses, enums and paths carry the name of their type.

    Raises:
        TypeError: naming a field whose value is not of its annotation.

    >>> encode(TokenLabels(3))
    {'type': 'TokenLabels', 'num_labels': 3}
    """
    return to_json(value, type(value))


def decode(values: Any, kind: Any = Experiment) -> Any:
    """The inverse of `encode`, for a config of this kind.

    Raises:
        ValueError: an unknown type, or fields that are unknown, mistyped, or missing where they have no default: a
            field that was added since takes its default, which keeps what a model of an older version computes.

    >>> decode({"type": "TokenLabels", "num_labels": 3}, TokenLabels)
    TokenLabels(num_labels=3)
    """
    try:
        return from_json(values, kind)
    except UnknownType as error:
        raise ValueError(
            f"{error}; if that is a task of your own, name the file of its experiment (--experiment FILE), or put the "
            "file of the task into train/tasks/"
        ) from error


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """The fields in which two encoded configs differ, with both values.

    >>> differences(encode(TokenLabels(3)), encode(TokenLabels(5)))
    ['num_labels: 3 and 5']
    """
    same_type = isinstance(first, dict) and isinstance(second, dict) and first.get("type") == second.get("type")
    if same_type and "value" not in first:
        names = sorted(first.keys() | second.keys())
        return [line for name in names for line in differences(first.get(name), second.get(name), f"{path}.{name}")]
    return [] if first == second else [f"{path.lstrip('.')}: {_short(first)} and {_short(second)}"]


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return str(value.get("value", value.get("type")))
    return str(value)
