"""The configuration of a run: frozen dataclasses that convert to JSON and back without loss."""

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
from train.data.cache_folder import DataCache
from train.data.tokenizer import ByteLevelBPE, Characters, SavedTokenizer
from train.devices.parallel import Parallel, Replicated
from train.devices.processes import Processes
from train.reports.profile import parse_steps
from train.tasks.task import Task, every_task
from train.update.adapters import LowRank
from train.update.initializers import Kaiming, Normal, Uniform, Xavier
from train.update.optimizer import Optimizer

if TYPE_CHECKING:
    AnyTask = Task
else:
    AnyTask = functools.reduce(operator.or_, every_task())
"""Any task; `task:dates` and so on on the command line."""

FROM_TOKENIZER = 0
"""The `vocab_size` of a model that takes the size of the tokenizer's vocabulary."""

FROM_DATA = 0
"""The `num_labels` of a model that takes the number of labels in the training split."""


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
"""Any trainable model; `model:seq2seq` and so on on the command line."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The settings of a training run."""

    task: Annotated[AnyTask, SubclassesOf(Task)]
    """Task: the source of the examples."""
    model: Model
    """Model. A vocab_size of 0 takes the size of the tokenizer's vocabulary."""
    run: Path
    """Run folder for checkpoints, metrics.jsonl, samples and pictures. The same command again resumes the run."""
    tokenizer: Characters | ByteLevelBPE | SavedTokenizer = Characters()
    """Tokenizer, trained on the training split."""
    batches: Batches = Batches()
    """Batch size and grouping of the examples."""
    data_cache: DataCache = DataCache()
    """Cache of large training files."""
    optimizer: Optimizer = Optimizer()
    """Optimization algorithm, learning-rate schedule and clipping."""
    steps: int = 1000
    """Total number of updates."""
    evaluate_every: int = 250
    """Updates between evaluations on the validation split. Each evaluation also saves a checkpoint."""
    evaluate_examples: int = 500
    """Maximum number of validation examples per evaluation."""
    log_every: int = 10
    """Updates between rows of metrics."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard to RUN/tensorboard; needs tensorboardX."""
    wandb: str | None = None
    """Also log metrics to this Weights & Biases project; needs wandb and a network."""
    profile: str | None = None
    """Profile these updates, FIRST:LAST such as 20:25: write a trace to RUN/profile and print a summary."""
    keep_checkpoints: int = 2
    """Number of latest checkpoints to keep."""
    keep_best: int = 0
    """Number of checkpoints with the lowest validation losses to keep as well."""
    average: int = 1
    """Evaluate the test split with the mean of the parameters of this many latest checkpoints (Vaswani 2017, 6.1)."""
    beam_size: int = 1
    """Beam-search hypotheses per text of the test split; 1 is greedy decoding."""
    patience: int | None = None
    """Early stopping: stop after this many consecutive evaluations without a new lowest validation loss, and restore
    the best checkpoint. None for no early stopping."""
    initializer: Uniform | Normal | Xavier | Kaiming | None = None
    """Initializer for all matrices. None keeps the default initializer of each layer."""
    word_vectors: Path | None = None
    """Text file in word2vec or GloVe format. Embeddings of tokens in it start from its vectors."""
    start_from: Path | None = None
    """Trained model to start from: a run folder, an exported model, or hf:FOLDER, a model of Hugging Face transformers.
    On the command line its model replaces that of the experiment, and flags of the model change single settings. Its
    tokenizer is taken too. A head for other labels or another task is drawn."""
    frozen: tuple[str, ...] = ()
    """Parameters that training does not change, as glob patterns of their paths, such as `embedding/*`."""
    adapters: LowRank | None = None
    """Low-rank adapters: small matrices beside some kernels, trained in place of all parameters. Needs start_from. None
    trains the parameters."""
    parallel: Parallel = Replicated()
    """How updates are distributed over devices."""
    processes: Processes = Processes()
    """Processes that train together, on one machine or several."""
    label_smoothing: float = 0.0
    """Epsilon of label smoothing in the training loss (Szegedy 2016); 0 for none."""
    pieces: int = 1
    """Micro-batches per batch. Their gradients are added: less memory, the same update."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the forward and backward pass. Parameters and sums of gradients stay float32."""
    ema: float | None = None
    """Decay per update of an exponential moving average of the parameters, such as 0.999. Evaluation and translation
    use the average. None for no average."""
    max_skipped: int = 10
    """Stop after this many consecutive skipped updates. An update is skipped if its loss or gradient is not finite."""
    bleu: bool = False
    """Also compute BLEU and chrF with sacrebleu."""
    accept_changes: bool = False
    """Resume with changed settings. Changed steps, optimizer, batches, label_smoothing, pieces, compute_dtype, seed,
    patience or evaluations require this flag. Changes are logged and recorded in the checkpoints."""
    seed: int = 0
    """Random seed of initial parameters, order of examples and dropout: 0 to 2**32 - 1."""

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
                f"patience ({self.patience}) must be at least 1 and below keep_checkpoints ({self.keep_checkpoints}), "
                "so that the best checkpoint is kept"
            )
        check_integer("keep_best", self.keep_best, 0)
        saved = min(self.keep_checkpoints, math.ceil(self.steps / self.evaluate_every))
        if self.average > saved:
            raise ValueError(
                f"average ({self.average}) must be at most the number of checkpoints at the end ({saved}), from "
                f"keep_checkpoints ({self.keep_checkpoints}), steps ({self.steps}) and evaluate_every "
                f"({self.evaluate_every}); --average 1 takes only the last one"
            )
        if self.ema is not None:
            check_number("ema", self.ema, above=0, below=1, hint=", or None for no average")
        check_rate(self.label_smoothing, "label_smoothing")
        for name in ("initializer", "word_vectors"):
            if self.start_from is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"{name} ({getattr(self, name)}) and start_from ({self.start_from}) exclude each other: the "
                    "parameters of that model would replace the others"
                )


def encode(value: Any) -> Any:
    """Converts a config to JSON values; dataclasses, enums and paths include the name of their type.

    Raises:
        TypeError: the value of a field does not match its annotation; the message names the field.

    >>> encode(TokenLabels(3))
    {'type': 'TokenLabels', 'num_labels': 3}
    """
    return to_json(value, type(value))


def decode(values: Any, kind: Any = Experiment) -> Any:
    """Converts JSON values back to a config; the inverse of `encode`.

    A missing field takes its default. Defaults of new fields keep the behavior of older versions, so older configs
    stay valid.

    Args:
        values: JSON values from `encode`.
        kind: the type of the config.

    Raises:
        ValueError: a type or a field is unknown, a value does not match its annotation, or a field without a default is
            missing.

    >>> decode({"type": "TokenLabels", "num_labels": 3}, TokenLabels)
    TokenLabels(num_labels=3)
    """
    try:
        return from_json(values, kind)
    except UnknownType as error:
        raise ValueError(
            f"{error}; if this is a task of your own, load its file: train with python -m train FILE, give the other "
            "commands --experiment FILE, or put the file of the task into train/tasks/"
        ) from error


def differences(first: Any, second: Any, path: str = "") -> list[str]:
    """Lists the fields in which two encoded configs differ, with both values.

    >>> differences(encode(TokenLabels(3)), encode(TokenLabels(5)))
    ['num_labels: 3 and 5']
    """
    same_type = isinstance(first, dict) and isinstance(second, dict) and first.get("type") == second.get("type")
    if same_type and not (_is_single(first) and _is_single(second)):
        names = sorted(first.keys() | second.keys())
        return [line for name in names for line in differences(first.get(name), second.get(name), f"{path}.{name}")]
    return [] if first == second else [f"{path.lstrip('.')}: {_short(first)} and {_short(second)}"]


def _is_single(encoded: dict[str, Any]) -> bool:
    """Whether an object is an encoded path or enum member, or a dataclass with nothing but a plain `value`."""
    return encoded.keys() == {"type", "value"} and not isinstance(encoded["value"], dict)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return str(value["value"] if _is_single(value) else value.get("type"))
    return str(value)
