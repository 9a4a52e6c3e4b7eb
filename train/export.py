"""Exports a trained model: `python -m train.export RUN DIR`, with `--push-to NAME` also to the Hugging Face hub.

`DIR` gets the files of `train.hub.exported`: config, parameters as safetensors, tokenizer, model card and digests, but
no checkpoints and no optimizer state. `--stablehlo` adds `forward.stablehlo`, a program for CPUs, NVIDIA GPUs and TPUs
that computes the logits under teacher forcing without seqattn.
"""

import dataclasses
from pathlib import Path

import huggingface_hub
import huggingface_hub.errors
import tyro

from seqattn.checks import check_integer
from train import objectives
from train.checkpoints import run
from train.devices import environment
from train.experiments.catalogue import OwnCode
from train.hub import exported, hf_export, loading
from train.hub.card import card
from train.hub.exported import CARD, FORWARD, SUMS, Exported
from train.hub.pretrained import save_pretrained
from train.hub.stablehlo import check_flatbuffers, forward
from train.tasks import RenderedText


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Exports a trained model to a folder that others can load without running code of yours."""

    run: tyro.conf.Positional[Path]
    """Run folder."""
    folder: tyro.conf.Positional[Path]
    """Destination folder; must be new or empty."""
    average: int | None = None
    """Average the parameters of this many latest checkpoints. By default as many as for the results of the run."""
    license: str | None = None
    """License of the parameters, by its identifier on the hub: apache-2.0, cc-by-4.0, ..."""
    stablehlo: bool = False
    """Also write forward.stablehlo, which computes logits without seqattn."""
    stablehlo_shape: tuple[int, int] = (8, 64)
    """Batch size and tokens per text of forward.stablehlo. Only used if the model cannot be compiled for variable
    sizes."""
    family: str | None = None
    """Write a folder that Hugging Face transformers loads, as a model of this family: marian, t5, bert, gpt2, llama,
    ..."""
    like: Path | None = None
    """Folder of transformers whose tokenizer, defaults of decoding and numbers of special tokens the folder gets; needs
    --family. By default the tokenizer of the run."""
    push_to: str | None = None
    """Also upload the folder to the Hugging Face hub, as USER/MODEL."""
    private: bool = False
    """Make the model private on the hub; needs --push-to."""


def main(arguments: Arguments) -> None:
    """Writes the folder, prints its files, and uploads it if `push_to` is given."""
    _check(arguments)
    trained = run.load(arguments.run, average=arguments.average)
    loading.check_task(trained, arguments.experiment)
    if arguments.family is not None:
        files = hf_export.files_of(trained.tokenizer, trained.model) if arguments.like is None else {}
        _save_theirs(trained, arguments, files)
        return
    objective = objectives.kind(trained.experiment).name
    made = Exported(arguments.folder, trained.model, trained.tokenizer, trained.labels, objective, trained.step)
    task, program = trained.experiment.task, None
    image = (task.height, task.width) if isinstance(task, RenderedText) else None
    if arguments.stablehlo:
        program = forward(made.model, objective, shape=arguments.stablehlo_shape, image=image)
    text = card(
        made,
        trained.experiment,
        trained.folder,
        average=trained.average,
        license=arguments.license,
        uploaded_as=arguments.push_to,
        image=image,
        program=program,
    )
    exported.save(made, {CARD: text.encode()} | ({} if program is None else {FORWARD: bytes(program.serialize())}))
    print(f"{arguments.folder}: " + ", ".join(sorted(path.name for path in arguments.folder.iterdir())))
    if arguments.push_to is not None:
        print(push(arguments.folder, arguments.push_to, private=arguments.private))


def _save_theirs(trained: run.Run, arguments: Arguments, files: dict[str, str]) -> None:
    """Writes a folder of transformers and prints its files."""
    assert arguments.family is not None
    try:
        save_pretrained(trained.model, arguments.family, arguments.folder, like=arguments.like, others=files)
    except NotImplementedError as error:
        raise ValueError(f"--family: {error}") from error
    print(f"{arguments.folder}: " + ", ".join(sorted(path.name for path in arguments.folder.iterdir())))


def _check(arguments: Arguments) -> None:
    """Checks the arguments before the model is loaded."""
    rows, tokens = arguments.stablehlo_shape
    check_integer("--stablehlo-shape, rows", rows, 1)
    check_integer("--stablehlo-shape, tokens", tokens, 1)
    for name in ("push_to", "license") if arguments.family is not None else ():
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for our own format: it has no effect with --family")
    if arguments.stablehlo and arguments.family is not None:
        raise ValueError("--stablehlo is for our own format: it has no effect with --family")
    if arguments.like is not None and arguments.family is None:
        raise ValueError("--like is for a folder of transformers: it needs --family")
    if arguments.private and arguments.push_to is None:
        raise ValueError("--private is for a model on the hub: it needs --push-to")
    if arguments.push_to is not None:
        huggingface_hub.utils.validate_repo_id(arguments.push_to)
    if arguments.stablehlo:
        check_flatbuffers()
    exported.check_free(arguments.folder)


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads an exported model to the Hugging Face hub.

    Only the files of the export are uploaded.

    Args:
        folder: the exported folder.
        name: the name on the hub, USER/MODEL.
        private: create the repository as private, and refuse an existing public one.

    Returns:
        The URL of the model.

    Raises:
        ValueError: the hub is unreachable or refuses, or `private` is given and the existing repository is public.
    """
    files = [CARD, SUMS, *exported.check_digests(folder)]
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        # An existing repository keeps its visibility.
        if private and not api.model_info(name).private:
            raise ValueError(f"{name} exists and is public: make it private on the hub, or give another name")
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message="seqattn: export")
    except (OSError, huggingface_hub.errors.HTTPError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{folder} is written, but could not be uploaded: {reason.rstrip('.')}. If a token is missing, run hf auth "
            f"login; then: hf upload {name} {folder}"
        ) from error
    return f"https://huggingface.co/{name}"


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.export")))
