"""The examples as `.ipynb` files for download, converted from their Markdown."""

from pathlib import Path

import jupytext
import nbformat


def write_all(examples: Path, folder: Path) -> None:
    """Writes `folder/NAME.ipynb` for each `examples/NAME.md` that is a notebook."""
    folder.mkdir(exist_ok=True)
    for path in sorted(examples.glob("*.md")):
        if path.read_text("utf-8").startswith("---\njupytext:"):
            nbformat.write(jupytext.read(path, fmt="md:myst"), folder / f"{path.stem}.ipynb")
