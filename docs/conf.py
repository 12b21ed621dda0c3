"""Sphinx settings. Pages are Markdown (MyST), the reference is made from numpydoc docstrings."""

from __future__ import annotations

import bnfast

project = "bnfast"
copyright = "2026, the bnfast developers"
version = release = bnfast.__version__

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.viewcode",
]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is a link where the name is documented, as in the docstrings of NumPy.
default_role = "py:obj"
autodoc_mock_imports = ["mpi4py"]  # importing it starts MPI
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "none"  # numpydoc's sections say more
numpydoc_show_class_members = False

html_theme = "furo"
html_title = f"bnfast {release}"
exclude_patterns = ["_build", "examples"]


def escape_bars(app, what, name, obj, options, lines):
    """Show `|x|` in a docstring as a magnitude: reStructuredText would look for a substitution."""
    lines[:] = [line.replace("|", r"\|") for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", escape_bars)
