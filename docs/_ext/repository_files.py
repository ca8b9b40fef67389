"""Links to files of the repository outside of docs/, which GitHub shows, lead to pages of the site.

Each file gets a page in `_files`. Markdown is rendered, other text is highlighted, a folder is a list of its files. The
pages do not have the navigation of the site, which would take most of the time of a build.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from markdown_it import MarkdownIt
from mdit_py_plugins.anchors import anchors_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import TextLexer, get_lexer_for_filename
from pygments.util import ClassNotFound
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.transforms import SphinxTransform

FOLDER = "_files"
REFTYPE = "repository-file"
IMAGES = (".svg", ".png")
FORMATTER = HtmlFormatter(linespans="L")
STYLE = """
body { font-family: sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; line-height: 1.5 }
pre, code { font-size: 0.875rem } pre { overflow-x: auto; line-height: 1.35 } img { max-width: 100% }
table { border-collapse: collapse } th, td { border: 1px solid #ccc; padding: 0.2rem 0.5rem; text-align: left }
""" + FORMATTER.get_style_defs(".highlight")
PAGE = """<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><title>{path} - Quadriga</title><style>{style}</style></head>
<body><p><a href="{top}">Documentation</a> / <code>{path}</code></p>
{body}
</body>
</html>
"""
EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:|//|#")


def outside(env: BuildEnvironment, docname: str, target: str) -> str | None:
    """The path in the repository of a link from a page to a file or folder outside of docs/. None for other links."""
    if not target or EXTERNAL.match(target):
        return None
    root, docs = Path(env.srcdir).parent, Path(env.srcdir).name
    path = posixpath.normpath(posixpath.join(docs, posixpath.dirname(docname), target))
    inside = path.startswith((f"{docs}/", "..")) or path == docs
    return None if inside or not (root / path).exists() else path


class RepositoryLinks(SphinxTransform):
    """Marks the links that MyST reads as downloads, as unknown pages or as unknown targets."""

    default_priority = 5

    def apply(self, **kwargs: Any) -> None:
        links = [*self.document.findall(addnodes.download_reference), *self.document.findall(addnodes.pending_xref)]
        for link in links:
            target = str(link.get("reftarget", ""))
            if link.get("refdomain") == "doc" and os.path.isabs(target):  # path2doc() of a page that is elsewhere
                target = os.path.relpath(f"{target}.md", os.path.dirname(self.env.doc2path(self.env.docname)))
            target, _, anchor = target.partition("#")
            if link.get("reftype") == "myst" and (path := outside(self.env, self.env.docname, target)):
                anchor = link.get("reftargetid") or anchor
                marked = addnodes.pending_xref(
                    "", *link.children, refdomain="", reftype=REFTYPE, reftarget=path, anchor=anchor, refexplicit=True
                )
                marked["refdoc"] = self.env.docname
                link.replace_self(marked)


def page_of(path: str) -> str:
    """The file of the site with a file of the repository. An image is copied, every other file becomes a page."""
    if path.startswith("docs/") and path.endswith(".md"):
        return f"{path.removeprefix('docs/').removesuffix('.md')}.html"
    return f"{FOLDER}/{path}" if path.endswith(IMAGES) else f"{FOLDER}/{path}.html"


def relative(page: str, start: str) -> str:
    return posixpath.relpath(page, posixpath.dirname(start))


def resolve(app: Sphinx, env: BuildEnvironment, node: addnodes.pending_xref, contents: nodes.Node) -> nodes.Node | None:
    if node["reftype"] != REFTYPE:
        return None
    if app.builder.format != "html":
        return contents
    address = relative(page_of(node["reftarget"]), app.builder.get_target_uri(node["refdoc"]))
    anchor = f"#{node['anchor']}" if node["anchor"] else ""
    return nodes.reference("", "", *node.children, internal=True, refuri=address + anchor)


def collect(app: Sphinx, doctree: nodes.document) -> None:
    """Remember the files that a page links to."""
    paths = {node["reftarget"] for node in doctree.findall(addnodes.pending_xref) if node["reftype"] == REFTYPE}
    app.env.metadata[app.env.docname][REFTYPE] = sorted(paths)


def write_pages(app: Sphinx, error: Exception | None) -> None:
    """Write the pages of all files that a page links to, and of those that these link to."""
    if error or app.builder.format != "html":
        return
    root, out = Path(app.srcdir).parent, Path(app.outdir)
    waiting = [path for found in app.env.metadata.values() for path in found.get(REFTYPE, ())]
    written: set[str] = set()
    while waiting:
        path = waiting.pop()
        page = page_of(path)
        if path in written or not page.startswith(FOLDER):
            continue
        written.add(path)
        (out / page).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith(IMAGES):
            shutil.copy(root / path, out / page)
            continue
        body, links = contents(root, path)
        waiting += links
        names = {"path": escape(path), "top": relative("index.html", page), "style": STYLE, "body": body}
        (out / page).write_text(PAGE.format(**names), encoding="utf-8")


def contents(root: Path, path: str) -> tuple[str, list[str]]:
    """(HTML, the paths of files that it links to) of a file or a folder."""
    if (root / path).is_dir():
        inside = sorted(each for each in (root / path).iterdir() if not each.name.startswith((".", "__pycache__")))
        names = [f"{each.name}/" if each.is_dir() else each.name for each in inside]
        return "<ul>\n" + "".join(f"<li><code>{escape(name)}</code></li>\n" for name in names) + "</ul>", []
    text = (root / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return rendered(text, path)
    try:
        lexer = get_lexer_for_filename(path)
    except ClassNotFound:
        lexer = TextLexer()
    return highlight(text, lexer, FORMATTER), []


def rendered(text: str, path: str) -> tuple[str, list[str]]:
    """Markdown as HTML, with its relative links leading to pages of the site."""
    markdown = MarkdownIt("commonmark").enable("table").use(anchors_plugin, max_level=6)
    tokens, linked = markdown.parse(text), []
    for link in (child for token in tokens for child in token.children or []):
        attribute = {"link_open": "href", "image": "src"}.get(link.type)
        target, _, anchor = str(link.attrs.get(attribute, "")).partition("#") if attribute else ("", "", "")
        if target and not EXTERNAL.match(target):
            place = posixpath.normpath(posixpath.join(posixpath.dirname(path), target))
            linked.append(place)
            address = relative(page_of(place), page_of(path))
            link.attrs[str(attribute)] = f"{address}#{anchor}" if anchor else address
    return str(markdown.renderer.render(tokens, markdown.options, {})), linked


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_transform(RepositoryLinks)
    app.connect("doctree-read", collect)
    app.connect("missing-reference", resolve)
    app.connect("build-finished", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
