"""The site: `make docs` builds it from the pages as they lie in the repository, so that links are those of a clone."""

from pkv_hf.version import __version__

project, author, release = "pkv_hf", "The pkv_hf developers", __version__
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "examples/*.md"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 3
default_role = "code"
"""A docstring's single backticks."""

autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
