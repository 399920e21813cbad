"""The site of the documentation: `sphinx-build -W docs build/site`, then open build/site/index.html."""
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from timm_vpl import __version__  # noqa: E402

project = 'timm-vpl'
version = release = __version__
copyright = 'the authors of timm-vpl, Apache-2.0'
extensions = ['myst_parser', 'sphinx.ext.autodoc', 'sphinx.ext.napoleon', 'sphinx.ext.viewcode']
html_theme = 'furo'
html_title = f'timm-vpl {version}'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = html_show_sourcelink = False
html_math_renderer = 'mathml'
highlight_language = 'none'
smartquotes = False  # they would make a dash of an option's two

myst_enable_extensions = ['dollarmath']
myst_heading_anchors = 3

autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
toc_object_entries = False


def fit_links(app, page, source):
    """Let links that fit the repository fit the site: a page has its title, Markdown outside this folder is a file."""
    def link(match):
        path = (DOCS / page).parent / match[1]
        return match[0] if path.resolve().is_relative_to(DOCS) else f'](path:{match[1]})'
    text = re.sub(r'\]\((\.\.[^)#]*\.md)\)', link, source[0])
    source[0] = re.sub(r'\[[\w./]+\.md\]\((?!path:)', '[](', text)


def fit_signature(app, what, name, obj, options, signature, returns):
    """Write a signature so that it can be read: functions as defaults are `...`, classes have their short name."""
    if signature:
        signature = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r'\1', re.sub(r'<function [^<]*<lambda>>', '...', signature))
        return signature, returns


def mathml(block):
    """Return what writes a formula as MathML, which browsers show without a script or a network."""
    def visit(writer, node):
        writer.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode
    return visit, None


def setup(app):
    app.connect('source-read', fit_links)
    app.connect('autodoc-process-signature', fit_signature)
    app.add_html_math_renderer('mathml', mathml(block=False), mathml(block=True))
