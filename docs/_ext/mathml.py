"""Formulas as MathML, which browsers draw by themselves: no JavaScript, and nothing to fetch."""

import re
from typing import Any, Literal

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

# A named function stands off from what it is of, but for brackets.
_FUNCTION = re.compile(r"(?<!<msub>)(?<!<msup>)(?<!<munder>)(<mi>(?:exp|log|ln|det)</mi>)(?!</|<mo)")


def _converted(node: nodes.Node, display: Literal["inline", "block"]) -> str:
    return _FUNCTION.sub(r'\1<mspace width="0.17em"/>', convert(node.astext(), display=display))


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(_converted(node, "inline"))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="math">{_converted(node, "block")}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
