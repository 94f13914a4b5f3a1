"""Configuration of the site. Build it with `sphinx-build -W docs docs/_build`."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))
sys.path.insert(0, str(HERE.parent))

from minidiff import __version__  # noqa: E402

# Sphinx reads only what lies below its source folder.
NOTEBOOKS = HERE / "notebooks"
shutil.rmtree(NOTEBOOKS, ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", NOTEBOOKS, ignore=shutil.ignore_patterns(".*"))
for path in NOTEBOOKS.glob("*.ipynb"):  # links that hold in the repository, for the site
    text = path.read_text(encoding="utf-8")
    text = text.replace("(../docs/", "(../").replace("../minidiff/schedulers/QUIRKS", "../quirks")
    path.write_text(text, encoding="utf-8")

project = "minidiff"
author = "the minidiff contributors"
copyright = "the minidiff contributors, MIT licence"
version = release = __version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "myst_nb",
    "mathml",
    "docstrings",
    "ledger",
]
exclude_patterns = ["_build", "_ext", "jupyter_execute"]
suppress_warnings = [
    "myst.header",  # notebooks and included pages may begin at a lower level
    "ref.python",  # two classes may have an attribute of one name
]

myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # the outputs that are stored are the ones that the tests check
nb_merge_streams = True

viewcode_follow_imported_members = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "mixed"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = "minidiff"
html_math_renderer = "mathml"
html_copy_source = False
html_show_sourcelink = False
