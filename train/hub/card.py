"""The model card of an exported model: Markdown with the metadata header of the Hugging Face hub."""

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
from train.data.tokenizer import Tokenizer
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
    """Writes the model card: a description of the model, its training, its results, its limits, and how to use it.

    Args:
        made: the model.
        experiment: the experiment that trained it.
        trained_in: the run folder, from which the results are read.
        average: number of checkpoints that the parameters are the mean of.
        license: license of the parameters, by its name on the hub.
        uploaded_as: name of the model on the hub.
        image: height and width of the images of a captioner.
        program: the forward program, if there is one.

    Returns:
        Markdown with the metadata header of the hub.
    """
    objective = named(made.objective)
    model, results = made.model, _results(trained_in)
    name = (uploaded_as or made.folder.resolve().name).rpartition("/")[2]
    count = sum(x.size for x in to_arrays(model).values())
    said = (type(model).__doc__ or "").partition("\n")[0]
    shown = ", ".join(map(repr, made.labels[:_MOST_LABELS])) + ", ..." * (len(made.labels) > _MOST_LABELS)
    labels = f" Labels: {shown}." if made.labels else ""
    parts = [
        _header(name, objective.hub_task, type(model).__name__, type(experiment.task).__name__, results, license),
        f"# {name}\n\n{objective.sentence} The model is a `{type(model).__name__}` with {count:,} parameters, made "
        f"with seqattn (JAX, Flax NNX): {said}{labels}\n\nThe vocabulary has {made.tokenizer.vocab_size:,} tokens.",
        _training(experiment, made.step, average),
        _figures(results, made.step, average),
        _limits(made, experiment),
        _usage(made, uploaded_as or "NAME", image, program),
    ]
    return "\n\n".join(parts) + "\n"


@dataclasses.dataclass(frozen=True)
class Results:
    """The results of a run on a split.

    Attributes:
        split: the split of the examples.
        examples: the number of examples, if known.
        step: the number of updates before the evaluation.
        average: the number of checkpoints that the parameters were the mean of.
        beam_size: the number of hypotheses per text; 1 is greedy search.
        numbers: the measures by name.
        signatures: the signatures of sacrebleu, by name of the measure.
    """

    split: str
    examples: int | None
    step: int
    average: int
    beam_size: int
    numbers: Mapping[str, float]
    signatures: Mapping[str, str]

    def described(self) -> str:
        """Describes the evaluation in words, for a sentence."""
        of = "" if self.examples is None else f" of {self.examples:,} examples"
        how = f", with the mean of the latest {self.average} checkpoints" * (self.average > 1)
        how += f", with a beam of {self.beam_size}" * (self.beam_size > 1)
        return f"On the {self.split} split{of}, after {self.step:,} updates{how}"


def _results(folder: Path) -> Results | None:
    """Reads the results on the test split if training has finished, else the latest ones on the validation split."""
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
    """Returns the metadata of the hub as YAML."""
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
    of = f"; the parameters are the mean of the latest {average} checkpoints" if average > 1 else ""
    lines = [
        f"## Training\n\nTrained with `python -m train` of seqattn for {step:,} updates{of}. "
        "Settings that differ from the defaults:\n"
    ]
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
    """Formats a setting as Python code, without default values and without the names of local folders.

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
    lines = [f"{results.described()}:\n", "| measure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.4f} |" for name, value in results.numbers.items()]
    lines += [f"\nsacrebleu signature of {name}: `{signature}`" for name, signature in results.signatures.items()]
    if (results.average, results.step) != (average, step):
        lines.append("\nThese results were measured with those parameters, not with the ones in this folder.")
    return "## Results\n\n" + "\n".join(lines)


def _limits(made: Exported, experiment: Experiment) -> str:
    lines = [
        f"- The model was trained on examples of `{type(experiment.task).__name__}` only. Do not rely on its output "
        "for other kinds of text, even if its probabilities are high.",
        "- Nothing checks that the output is correct or harmless.",
    ]
    limit = made.model.room(0) if "image" not in named(made.objective).given else None
    if limit is not None:
        lines.append(f"- The model has learned positions for {limit:,} tokens and refuses longer texts.")
    return "## Limits\n\n" + "\n".join(lines)


_LOAD = """import json
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import load_file

from seqattn import Coordinates
from seqattn.decoding import generate
from seqattn.interop import from_arrays, from_dict

folder = Path(".")  # the folder with config.json
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
print(logits.argmax(axis=-1))  # indices into header["labels"]; for hidden tokens, token ids"""
_START = "    state, start = model.start(memory, {room}), jnp.array([{start}])"
_GIVEN = {
    "SequenceToSequence": (
        "source",
        "    memory = model.encode(source, Coordinates.from_lengths([{count}], {count}))\n" + _START,
        "source = jnp.array([{ids}])  # ids of tokenizer.json; {end} is the end token",
    ),
    "Continuation": (
        "text",
        "    nothing = jnp.zeros((1, 0), jnp.int32)\n"
        "    state = model.start(model.encode(nothing, Coordinates(nothing, nothing)), 1 + {room})\n"
        "    _, state = model.prefill(text[:, :-1], jnp.array([1]), state)\n"
        "    start = text[:, -1]",
        "text = jnp.array([[{start}, {first}]])  # ids of tokenizer.json; {start} is the start token",
    ),
    "Reading": (
        "image",
        "    rows, columns = model.grid({height}, {width})\n"
        "    memory = model.encode(image, Coordinates.from_lengths([rows * columns], rows * columns))\n" + _START,
        "image = jnp.zeros((1, {height}, {width}))  # gray values, standardized to mean 0 and variance 1 per image",
    ),
}
"""For each objective: the name of the model's input, the code that starts decoding from it, and an example input."""


_FLAG = (
    "On a CPU with jaxlib 0.10.2 to 0.12, set `XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce`: without it, "
    "some programs compute wrong numbers."
)


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
        "## Usage",
        "Run `pip install .` in a checkout of seqattn and `pip install safetensors`, download the files of this model "
        f"(`hf download {name} --local-dir FOLDER`), and run in their folder:",
        f"```python\n{_LOAD}{use}\n```",
        tokens_and_texts(made),
    ]
    if (command := named(made.objective).command) != "evaluate":  # `evaluate` needs the data of the run
        parts.append(
            f"Or run `pip install -e '.[train]'` and `python -m train.{command} FOLDER \"a text\"` in the checkout."
        )
    parts.append("To check the files, run `sha256sum -c SHA256SUMS`.")
    return "\n\n".join(parts + ([] if program is None else [_program_usage(program)]))


def tokens_and_texts(made: Exported) -> str:
    """Returns the sentences on text to token ids and back."""
    tokenizer, end = made.tokenizer, ""
    if type(tokenizer) is not Tokenizer:
        return _conversion_of_transformers(made)
    if made.objective == "SequenceToSequence":
        end = f", and append the end token {tokenizer.end_id}. Pad with {tokenizer.pad_id} on the right"
    special = ", ".join(str(i) for i in (tokenizer.pad_id, tokenizer.start_id, tokenizer.end_id))
    return (
        'To convert text to ids, use `tokenizer = tokenizers.Tokenizer.from_file("tokenizer.json")` and '
        f"`tokenizer.encode(text).ids`{end}. To convert ids to text, use "
        f"`tokenizer.decode([i for i in ids if i not in ({special})])`. {_FLAG}"
    )


def _conversion_of_transformers(made: Exported) -> str:
    """The same for a tokenizer of transformers, which is not the whole of `tokenizer.json`."""
    reads = {"SequenceToSequence": "sources", "Continuation": "prompts"}.get(made.objective, "inputs")
    return (
        "The tokenizer is that of a model of transformers, with its special tokens. To convert text to ids, run "
        "`pip install -e '.[train]'` in the checkout, and use `from train.data import saved_tokenizer`, `tokenizer = "
        f'saved_tokenizer.from_json(Path("tokenizer.json").read_text("utf-8"))` and `tokenizer.{reads}([text])[0]`. To '
        f"convert ids to text, use `tokenizer.decode(ids)`. {_FLAG}"
    )


def _program_usage(program: export.Exported) -> str:
    """Returns the section on the forward program, with a minimal example."""
    (_, given), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    shapes = ", ".join(f"`{name}` {x.str_short()}" for name, x in given.items())
    lines = [f'    "{name}": jnp.ones({_example(x.shape)}, jnp.{x.dtype}),' for name, x in given.items()]
    code = "\n".join(
        [*_PROGRAM, "given = {", *lines, "}", "logits = program.call(parameters, given)", "print(logits.shape)"]
    )
    return (
        f"`forward.stablehlo` computes logits under teacher forcing on {', '.join(program.platforms)}. It does not "
        f"need seqattn (`pip install jax flatbuffers safetensors`). As with any program, run it only if you trust its "
        f"source. Its inputs are the parameters and {shapes}:\n\n```python\n{code}\n```"
    )


_PROGRAM = """from pathlib import Path

import jax.numpy as jnp
import jax
from jax import export
from safetensors.numpy import load_file

parameters = load_file("model.safetensors")
program = export.deserialize(bytearray(Path("forward.stablehlo").read_bytes()))""".splitlines()


def _example(shape: tuple[Any, ...]) -> tuple[int, ...]:
    """Returns a shape with small numbers for the symbolic dimensions."""
    return tuple(size if isinstance(size, int) else 2 + axis for axis, size in enumerate(shape))
