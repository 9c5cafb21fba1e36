"""Settings of the site, built by `sphinx-build -W -b html docs docs/_build`."""

import os
import sys
import warnings
from pathlib import Path

from sphinx.deprecation import RemovedInSphinx10Warning

import jaxnorm

HERE = Path(__file__).parent
sys.path += [str(HERE / "ext"), str(HERE.parent / "tests")]
# Said of sphinx-autodoc-typehints, for each type.
warnings.simplefilter("ignore", RemovedInSphinx10Warning)
# Executed pages are the same on every machine; their kernels inherit this.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

project = "jaxnorm"
version = release = jaxnorm.__version__
author = "The authors of jaxnorm"
project_copyright = author
language = "en"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_autodoc_typehints",
    "sphinx_codeautolink",
    "sphinx_copybutton",
    "sphinx_design",
    "evidence",
    "markdown_docstrings",
    "mathml",
    "name_tables",
    "norm_pages",
    "short_types",
]
exclude_patterns = ["_build", "jupyter_execute", "**/_*.md"]
default_role = "py:obj"  # a name in single backticks is a link where there is one

html_theme = "sphinx_book_theme"
html_title = "jaxnorm"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_theme_options = {
    "collapse_navigation": True,  # else each page holds the tree of all
    "home_page_in_toc": False,
    "navbar_persistent": [],  # the sidebar has the search
    "show_toc_level": 2,
    "use_download_button": True,
    "use_fullscreen_button": False,
}

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_cache_path = str(HERE / "_build" / ".jupyter_cache")
nb_execution_raise_on_error = True
nb_execution_timeout = 300  # of a cell; a page takes seconds on a quiet machine
nb_merge_streams = True

autodoc_preserve_defaults = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
always_use_bars_union = True
typehints_defaults = None
copybutton_exclude = ".linenos, .gp, .go"

# Other projects' names are links where there is a network for certain.
if "READTHEDOCS" in os.environ:
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "jax": ("https://docs.jax.dev/en/latest", None),
        "flax": ("https://flax.readthedocs.io/en/latest", None),
        "optax": ("https://optax.readthedocs.io/en/latest", None),
    }
