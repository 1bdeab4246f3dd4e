"""Sphinx's configuration of the pages; `build.py` calls it."""

from latex2mathml.converter import convert

import repae_lite

project, author, release = "repae_lite", "repae_lite contributors", repae_lite.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", "repae_lite"
html_static_path = ["static"]
html_js_files = [("explorers.js", {"defer": "defer"})]  # no module: pages from the disk may not import any
templates_path = []
exclude_patterns = ["_build"]

nb_execution_mode = "off"
nb_ipywidgets_js = {}  # explorers.js does without the widgets' own scripts, which come from the network
myst_enable_extensions = ["dollarmath", "amsmath", "html_image"]
myst_heading_anchors = 4
html_math_renderer = "mathml"
suppress_warnings = ["myst.xref_missing", "myst.header", "mystnb.unknown_mime_type"]
suppress_warnings += ["toc.not_included", "toc.no_title"]

autosummary_generate = True
autodoc_typehints = "signature"
autodoc_member_order = "bysource"


def _inline(writer, node):
    writer.body.append(convert(node.astext()))
    raise writer_skip


def _block(writer, node):
    writer.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>')
    raise writer_skip


def setup(app):
    """Formulas become MathML, which browsers draw themselves: no script, nothing to fetch."""
    from docutils import nodes

    global writer_skip
    writer_skip = nodes.SkipNode
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
