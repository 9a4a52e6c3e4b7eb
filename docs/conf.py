"""Sphinx configuration; `make docs` builds the site into docs/_build/html, offline, with warnings as errors."""

import inspect
import os
import sys
from importlib.metadata import version as installed
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # for the modules that autodoc imports, and for pictures.py
os.environ["PYTHONPATH"] = str(HERE.parent)  # the kernels that execute the notebooks import the same modules
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Some jitted CPU programs of jaxlib 0.10.2 to 0.12 compute wrongly without this flag (docs/getting-started.md).
from flax import nnx  # noqa: E402

from train.devices import environment  # noqa: E402

environment.configure()

project = "seqattn"
author = "The seqattn authors"
copyright = "The seqattn authors, Apache-2.0"
release = version = installed("seqattn")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
exclude_patterns = ["_build", "_generated"]
default_role = "py:obj"  # `attend` in a docstring links to its entry; what is no name of ours stays code
python_use_unqualified_type_names = True
suppress_warnings = ["ref.python"]  # a method name such as `append` that several classes have

# Docstrings give shapes and types; signatures with jaxtyping's annotations take half a page.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "special-members": "__call__", "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_use_ivar = True
napoleon_attr_annotations = False  # the text of an attribute gives its shape and dtype
add_module_names = False

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3
nb_execution_mode = "force"  # a cache would not notice a change of the library
nb_execution_raise_on_error = True
nb_execution_timeout = 240
nb_merge_streams = True

html_theme = "furo"
html_title = "seqattn"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False


def setup(app):
    """Draws the pictures and writes the notebooks for download before Sphinx reads the pages."""
    import downloads
    import pictures

    app.connect("builder-inited", lambda _: pictures.draw_all(HERE / "_generated"))
    app.connect("builder-inited", lambda _: downloads.write_all(HERE / "examples", HERE / "_generated"))
    app.connect("autodoc-process-signature", signature_of_module)
    app.connect("autodoc-skip-member", lambda app, what, name, *others: True if name in _OF_JAX else None)


_OF_JAX = {"tree_flatten", "tree_unflatten"}
"""Methods that pytrees have for JAX alone."""


def signature_of_module(app, what, name, obj, options, signature, return_annotation):
    """Returns the signature of `__init__` for modules; Flax's metaclass hides it behind `*args, **kwargs`."""
    if what != "class" or not (isinstance(obj, type) and issubclass(obj, nnx.Module)):
        return None
    given = list(inspect.signature(obj.__init__).parameters.values())[1:]
    plain = [p.replace(annotation=p.empty, default=Shown.of(p.default)) for p in given]
    return str(inspect.Signature(plain)), return_annotation


class Shown:
    """A default value as people write it: types and functions by their names."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text

    @staticmethod
    def of(default: object) -> object:
        """Returns the value, or a stand-in that prints its name."""
        named = callable(default) and default is not inspect.Parameter.empty and hasattr(default, "__name__")
        return Shown(default.__name__) if named else default
