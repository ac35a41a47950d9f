"""Settings of the documentation: `make docs` builds it into docs/_build/html."""

import importlib.metadata
import re
import sys
import warnings
from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_ext"), str(HERE.parent / "examples")]  # what the gallery begins with lies in examples

import error_list  # noqa: E402 -- found once its folder is on the path

project = "retrainscope"
author = copyright = "The retrainscope developers"
version = release = importlib.metadata.version("retrainscope")  # of pyproject.toml

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx_gallery.gen_gallery",
    "matplotlib.sphinxext.plot_directive",
    "sphinx_copybutton",
    "mathml",
]
exclude_patterns = ["_build", "_generated", "figures", "README.md"]
templates_path = ["_templates"]
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!retrainscope\.).*")]  # names of other libraries, and of parameters
default_role = "py:obj"  # `name` in a docstring is a link where it is a public name

smartquotes = False  # options and code in messages keep their two hyphens

html_theme = "furo"
html_title = f"retrainscope {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}
html_math_renderer = "mathml"

myst_enable_extensions = ["amsmath", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "none"  # the docstrings tell types, and shapes besides
autodoc_member_order = "bysource"
numpydoc_show_class_members = False  # the pages of classes list their methods in full
numpydoc_class_members_toctree = False

plot_html_show_source_link = False
plot_html_show_formats = False
plot_formats = [("png", 160)]

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": str(HERE.parent / "examples" / "gallery"),
    "gallery_dirs": "gallery",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "image_scrapers": ("matplotlib",),
    "reset_modules": ("matplotlib",),
    "download_all_examples": False,
    "capture_repr": (),
    "show_memory": False,
    "abort_on_example_error": True,
    "show_signature": False,
    "write_computation_times": False,
}
warnings.filterwarnings("ignore", message="FigureCanvasAgg is non-interactive", category=UserWarning)


def leave_out(_app: Sphinx, _what: str, _name: str, member: object, skip: bool, _options: object) -> bool:
    """Leave out what scikit-learn gives every estimator."""
    return skip or str(getattr(member, "__module__", "")).startswith("sklearn.")


def write_errors(_: Sphinx) -> None:
    """Write the tables of docs/errors.md from the source."""
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    text = error_list.page(HERE.parent / "src" / "retrainscope")
    (folder / "errors.md").write_text(text, encoding="utf-8")


def show_plots(_app: Sphinx, _docname: str, source: list[str]) -> None:
    """Let a page have ```{plot} figures/x.py```: matplotlib's directive writes reStructuredText, not Markdown."""
    source[0] = re.sub(r"^```\{plot\} (\S+)\n(.*?)^```$", _as_rst, source[0], flags=re.MULTILINE | re.DOTALL)


def _as_rst(block: re.Match[str]) -> str:
    options = "".join(f"   {line}\n" if line else "\n" for line in block[2].splitlines())
    return f"```{{eval-rst}}\n.. plot:: {block[1]}\n{options}```"


def setup(app: Sphinx) -> None:
    """Connect what is made at build time."""
    app.connect("autodoc-skip-member", leave_out)
    app.connect("builder-inited", write_errors)
    app.connect("source-read", show_plots)
