"""Sphinx: MyST pages, the API from docstrings, warnings are errors in `.ci/run`."""

from __future__ import annotations

import datetime

from kdcache.version import __version__

project = "kdcache"
author = "the kdcache contributors"
copyright = f"{datetime.date.today().year}, {author}"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"kdcache {__version__}"

myst_heading_anchors = 3
default_role = "code"  # `name` in a docstring is code, as it is in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
