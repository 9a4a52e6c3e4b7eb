"""The model card of an exported model: Markdown with the hub's header."""

import dataclasses
import enum
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from huggingface_hub import EvalResult, ModelCardData
from jax import export

from seqattn.interop import to_arrays
from train.checkpoints.run import RESULTS
from train.config import Experiment
from train.hub.exported import Exported
from train.objectives.for_experiment import named
from train.reports.metrics import read_metrics

_MOST_LABELS = 50


def card(
    made: Exported,
    experiment: Experiment,
    trained_in: Path,
    *,
    average: int = 1,
    license: str | None = None,
    uploaded_as: str | None = None,
    image: tuple[int, int] | None,
    program: export.Exported | None,
) -> str:
    """The model card, Markdown with the hub's header: what the model is, its figures, and how to run it.

    Args:
        made: the model.
        experiment: what it was trained by.
        trained_in: the run folder, which has its figures.
        average: the parameters are the mean of so many checkpoints.
        license: of the parameters, as the hub names it.
        uploaded_as: its name on the hub.
        image: height and width of a captioner's images.
        program: the forward program, where there is one.
    """
    objective = named(made.objective)
    model, results = made.model, _results(trained_in)
    name = (uploaded_as or made.folder.resolve().name).rpartition("/")[2]
    count = sum(x.size for x in to_arrays(model).values())
    said = (type(model).__doc__ or "").partition("\n")[0]
    shown = ", ".join(map(repr, made.labels[:_MOST_LABELS])) + ", ..." * (len(made.labels) > _MOST_LABELS)
    labels = f" Its labels: {shown}." if made.labels else ""
    parts = [
        _header(name, objective.hub_task, type(model).__name__, type(experiment.task).__name__, results, license),
        f"# {name}\n\n{objective.sentence} A `{type(model).__name__}` of {count:,} parameters, made with seqattn (JAX, "
        f"Flax NNX): {said}{labels}\n\nIts vocabulary has {made.tokenizer.vocab_size:,} tokens.",
        _training(experiment, made.step, average),
        _figures(results, made.step, average),
        _limits(made, experiment),
        _usage(made, uploaded_as or "NAME", image, program),
    ]
    return "\n\n".join(parts) + "\n"


@dataclasses.dataclass(frozen=True)
class Results:
    """Figures of a run.

    Attributes:
        split: of the examples.
        examples: how many.
        step: updates until then.
        average: the parameters were the mean of so many checkpoints.
        beam_size: hypotheses of each text.
        numbers: the figures by name.
        signatures: those of sacrebleu, by figure.
    """

    split: str
    examples: int | None
    step: int
    average: int
    beam_size: int
    numbers: Mapping[str, float]
    signatures: Mapping[str, str]

    def described(self) -> str:
        """What they are of."""
        of = "" if self.examples is None else f" of {self.examples:,} examples"
        how = f", by the mean of the latest {self.average} checkpoints" * (self.average > 1)
        how += f", with a beam of {self.beam_size}" * (self.beam_size > 1)
        return f"On the {self.split} split{of}, after {self.step:,} updates{how}"


def _results(folder: Path) -> Results | None:
    """The figures on the test split, where training came to its end; else the latest on the validation split."""
    if (folder / RESULTS).exists():
        row = json.loads((folder / RESULTS).read_text("utf-8"))
    elif (folder / "metrics.jsonl").exists():
        rows = [row for row in read_metrics(folder / "metrics.jsonl") if row.get("kind") == "validation"]
        row = rows[-1] if rows else {}
    else:
        row = {}
    numbers = {name: x for name, x in row.items() if isinstance(x, float)}
    if not numbers:
        return None
    return Results(
        split=row.get("split", "validation"),
        examples=row.get("examples"),
        step=row.get("steps", row.get("step", 0)),
        average=row.get("average", 1),
        beam_size=row.get("beam_size", 1),
        numbers=numbers,
        signatures={"bleu": signed} if isinstance(signed := row.get("sacrebleu", {}), str) else signed,
    )


def _header(name: str, kind: str, model: str, task: str, results: Results | None, license: str | None) -> str:
    """The hub's metadata, as YAML."""
    of, numbers = ("", {}) if results is None else (f"{results.split} split", results.numbers)
    figures = [
        EvalResult(kind, task.lower(), task, metric, round(x, 4), metric_name=f"{metric}, {of}")
        for metric, x in numbers.items()
        if math.isfinite(x)
    ]
    data = ModelCardData(
        license=license,
        library_name="seqattn",
        tags=["jax", "flax", "seqattn", model],
        model_name=name if figures else None,
        eval_results=figures or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _training(experiment: Experiment, step: int, average: int) -> str:
    of = f", the mean of the latest {average} checkpoints" if average > 1 else ""
    lines = [f"## How it was trained\n\n`python -m train` of seqattn, {step:,} updates{of}. What is no default:\n"]
    for field in dataclasses.fields(experiment):
        value = getattr(experiment, field.name)
        if field.name not in _NOT_TOLD and (value != field.default or field.name in ("steps", "seed")):
            lines.append(f"- {field.name}: `{_written(value)}`")
    return "\n".join(lines)


_NOT_TOLD = (
    *("run", "log_every", "keep_checkpoints", "evaluate_every", "evaluate_examples"),
    *("processes", "parallel", "wandb", "tensorboard"),
)


def _written(value: Any) -> str:
    """A setting as Python writes it, without defaults, and without the folders of whoever trained.

    >>> from train.tasks import RenderedText
    >>> _written(RenderedText(height=24, seed=3))
    'RenderedText(seed=3, height=24)'
    """
    if isinstance(value, enum.Enum):
        return f"{type(value).__name__}.{value.name}"
    if isinstance(value, Path):
        return repr(value.name)
    if isinstance(value, tuple):
        return f"({', '.join(map(_written, value))}{',' * (len(value) == 1)})"
    if not dataclasses.is_dataclass(value):
        return repr(value)
    told = []
    for field in dataclasses.fields(value):
        given, none = getattr(value, field.name), dataclasses.MISSING
        default = field.default if field.default_factory is none else field.default_factory()
        told += [f"{field.name}={_written(given)}"] * (given != default)
    return f"{type(value).__name__}({', '.join(told)})"


def _figures(results: Results | None, step: int, average: int) -> str:
    if results is None:
        return "## Results\n\nNot measured."
    lines = [f"{results.described()}:\n", "| figure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in results.numbers.items()]
    lines += [f"\n{name} by sacrebleu: `{signature}`" for name, signature in results.signatures.items()]
    if (results.average, results.step) != (average, step):
        lines.append("\nThey are of those parameters, not of the ones here.")
    return "## Results\n\n" + "\n".join(lines)


def _limits(made: Exported, experiment: Experiment) -> str:
    lines = [
        f"- It has seen the examples of `{type(experiment.task).__name__}` alone: for texts of another kind its output "
        "is worth nothing, however sure it looks.",
        "- Nothing checks what it writes: neither that it is true, nor that it does no harm.",
    ]
    limit = made.model.room(0) if "image" not in named(made.objective).given else None
    if limit is not None:
        lines.append(f"- It has learned positions for {limit:,} tokens; longer texts are refused.")
    return "## Limits\n\n" + "\n".join(lines)


_LOAD = """import json
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from seqattn import Coordinates
from seqattn.decoding import generate
from seqattn.interop import from_arrays, from_dict

folder = Path(".")  # where config.json is
header = json.loads((folder / "config.json").read_text("utf-8"))
model = from_arrays(from_dict(header["model"]), load_file(folder / "model.safetensors"))
"""
_WRITE = """

@jax.jit
def write(model, {given}):
{memory}
    return generate(model.step, state, start, max_length={room}, end_token={end})


{example}
found = write(model, {given})
print(found.tokens[0, : int(found.length[0])])"""
_LABEL = """
tokens = jnp.array([[{first}]])  # ids of tokenizer.json
logits = model(tokens, Coordinates.from_lengths([1], 1))
print(logits.argmax(axis=-1))  # which of header["labels"]; of hidden tokens, which id"""
_START = "    state, start = model.start(memory, {room}), jnp.array([{start}])"
_GIVEN = {
    "SequenceToSequence": (
        "source",
        "    memory = model.encode(source, Coordinates.from_lengths([{count}], {count}))\n" + _START,
        "source = jnp.array([{ids}])  # ids of tokenizer.json; {end} ends a text",
    ),
    "Continuation": (
        "text",
        "    nothing = jnp.zeros((1, 0), jnp.int32)\n"
        "    state = model.start(model.encode(nothing, Coordinates(nothing, nothing)), 1 + {room})\n"
        "    _, state = model.prefill(text[:, :-1], jnp.array([1]), state)\n"
        "    start = text[:, -1]",
        "text = jnp.array([[{start}, {first}]])  # ids of tokenizer.json; {start} starts a text",
    ),
    "Reading": (
        "image",
        "    rows, columns = model.grid({height}, {width})\n"
        "    memory = model.encode(image, Coordinates.from_lengths([rows * columns], rows * columns))\n" + _START,
        "image = jnp.zeros((1, {height}, {width}))  # grey; each image with mean 0 and variance 1",
    ),
}
"""What the example of an objective gives to the model, how decoding starts from it, and the example."""


def _usage(made: Exported, name: str, image: tuple[int, int] | None, program: export.Exported | None) -> str:
    tokenizer, model = made.tokenizer, made.model
    ids = [*range(4, min(7, tokenizer.vocab_size)), tokenizer.end_id]
    height, width = image or (32, 128)
    use, limit = _LABEL, None
    if made.objective in _GIVEN:
        given, memory, example = _GIVEN[made.objective]
        use = _WRITE.replace("{given}", given).replace("{memory}", memory).replace("{example}", example)
        limit = model.room(len(ids))
    values = {"ids": ids, "count": len(ids), "first": ids[0], "start": tokenizer.start_id, "end": tokenizer.end_id}
    use = use.format(**values, room=20 if limit is None else max(1, min(20, limit - 2)), height=height, width=width)
    parts = [
        "## How to use it",
        "With `pip install .` in a checkout of seqattn, `pip install safetensors`, and the files here (`hf download "
        f"{name} --local-dir FOLDER`):",
        f"```python\n{_LOAD}{use}\n```",
        'Text becomes ids by `tokenizers.Tokenizer.from_file("tokenizer.json").encode(text).ids`.',
    ]
    if (command := named(made.objective).command) != "evaluate":  # which needs the data of the run
        parts.append(f'Or, with `pip install .[train]`: `python -m train.{command} FOLDER "a text"`.')
    parts.append("`sha256sum -c SHA256SUMS` checks the files.")
    return "\n\n".join(parts + ([] if program is None else [_program_usage(program)]))


def _program_usage(program: export.Exported) -> str:
    """How to call the forward program, on the smallest example."""
    (_, given), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    shapes = ", ".join(f"`{name}` {x.str_short()}" for name, x in given.items())
    lines = [f'    "{name}": jnp.ones({_example(x.shape)}, jnp.{x.dtype}),' for name, x in given.items()]
    code = "\n".join(
        [*_PROGRAM, "given = {", *lines, "}", "logits = program.call(parameters, given)", "print(logits.shape)"]
    )
    return (
        f"`forward.stablehlo` gives logits under teacher forcing on {', '.join(program.platforms)}, without seqattn "
        f"(`pip install jax flatbuffers safetensors`). Like any program it should come from somebody whom you trust. "
        f"It takes the parameters and {shapes}:\n\n```python\n{code}\n```"
    )


_PROGRAM = """from pathlib import Path

import jax.numpy as jnp
import jax
from jax import export
from safetensors.numpy import load_file

parameters = load_file("model.safetensors")
program = export.deserialize(bytearray(Path("forward.stablehlo").read_bytes()))""".splitlines()


def _example(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """A shape with small numbers where any will do."""
    return tuple(size if isinstance(size, int) else 2 + axis for axis, size in enumerate(shape))
