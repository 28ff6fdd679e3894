"""Settings of the documentation build; ``nox -s docs`` runs it, and a warning is an error there."""

from importlib.metadata import version as installed_version

import feste.backend
import feste.node

# The module imports it for type checkers only; without it, `Call` in its signatures could be
# that of `feste.testing.wire` as well.
feste.node.Call = feste.backend.Call

project = "Feste"
author = "The Feste authors"
project_copyright = author
version = release = installed_version("feste-core")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"Feste {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
