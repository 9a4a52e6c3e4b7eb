"""A trained model for others: `python -m train.export RUN DIR`, and with `--push-to NAME` on the Hugging Face hub.

`DIR` holds what `train.hub.exported` says: config, parameters as safetensors, tokenizer, model card and digests;
nothing that the model does not need, such as checkpoints and the state of the optimizer. With `--stablehlo` also
`forward.stablehlo`: logits under teacher forcing as a program for CPUs, NVIDIA GPUs and TPUs, which needs no seqattn.
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
from train.hub import exported
from train.hub.card import card
from train.hub.exported import CARD, FORWARD, SUMS, Exported
from train.hub.stablehlo import check_flatbuffers, forward
from train.tasks import RenderedText


@dataclasses.dataclass(frozen=True)
class Arguments(OwnCode):
    """Writes a trained model as a folder that anybody can read without running code of yours."""

    run: tyro.conf.Positional[Path]
    """Folder of the run."""
    folder: tyro.conf.Positional[Path]
    """Where to; new or empty."""
    average: int | None = None
    """Average the parameters of so many of the latest checkpoints; by default of those that the figures are of."""
    license: str | None = None
    """Licence of the parameters, as the hub names it: apache-2.0, cc-by-4.0, ..."""
    stablehlo: bool = False
    """Also write forward.stablehlo, which computes logits without seqattn."""
    stablehlo_shape: tuple[int, int] = (8, 64)
    """Rows of its batches and tokens of its texts, where the model cannot be compiled for any number of them."""
    push_to: str | None = None
    """Also upload the folder to the Hugging Face hub, as USER/MODEL."""
    private: bool = False
    """Only you see it there."""


def main(arguments: Arguments) -> None:
    """Writes the folder, says where it is, and uploads it where that is asked for."""
    _check(arguments)
    trained = run.load(arguments.run, average=arguments.average)
    exported.check_task(trained, arguments.experiment)
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


def _check(arguments: Arguments) -> None:
    """Refuses what no model is needed to see."""
    rows, tokens = arguments.stablehlo_shape
    check_integer("--stablehlo-shape, rows", rows, 1)
    check_integer("--stablehlo-shape, tokens", tokens, 1)
    if arguments.private and arguments.push_to is None:
        raise ValueError("--private says who sees a model on the hub: it needs --push-to")
    if arguments.push_to is not None:
        huggingface_hub.utils.validate_repo_id(arguments.push_to)
    if arguments.stablehlo:
        check_flatbuffers()
    exported.check_free(arguments.folder)


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads an exported folder, the files of the export alone, and returns where it is.

    Args:
        folder: the folder.
        name: USER/MODEL.
        private: refuse where others could see it.

    Raises:
        ValueError: the hub cannot be reached or refuses, or would show to everybody what should be private.
    """
    files = [CARD, SUMS, *exported.check_digests(folder)]
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private or None, exist_ok=True)
        # One that was there before stays what it was.
        if private and not api.model_info(name).private:
            raise ValueError(f"{name} is there already, and public: make it private on the hub, or give another name")
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=files, commit_message="seqattn: export")
    except (OSError, huggingface_hub.errors.HTTPError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise ValueError(
            f"{folder} is written, but could not be uploaded: {reason.rstrip('.')}. Where a token is missing, hf auth "
            f"login; then: hf upload {name} {folder}"
        ) from error
    return f"https://huggingface.co/{name}"


if __name__ == "__main__":
    environment.command(lambda: main(tyro.cli(Arguments, prog="python -m train.export")))
