"""Settings of the documentation site. `make site` builds it in docs/_build."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs" / "_ext")]

import quadriga  # noqa: E402 (found by the line above)

project = "Quadriga"
release = quadriga.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "docstrings",
    "module_pages",
    "repository_files",
]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"Quadriga {release}"
html_copy_source = False
smartquotes = False  # which would turn the two hyphens of an option into a dash

myst_heading_anchors = 6  # GitHub's anchors, for links such as page.md#a-heading

module_pages_package = "quadriga"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # those of torch are not written for this site
toc_object_entries = False  # packages are in the navigation, functions are not
suppress_warnings = ["ref.python"]  # two classes of the same name, in a signature that does not name the module
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!quadriga\.).*"),  # names of torch and Python have no page here
    ("py:.*", r"quadriga\.(.*\.)?(_\w+|[A-Z])"),  # nor do private names and type variables
    ("py:class", r"quadriga\.data\.tokenizer\.Tokenizer"),  # has no docstring; a class without one has no entry
]
