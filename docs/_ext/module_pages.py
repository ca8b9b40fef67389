"""A page per package, with the documentation of its modules, in `docs/_api`."""

from __future__ import annotations

from pathlib import Path

from sphinx.application import Sphinx

FOLDER = "_api"
PUBLIC = ["   :members:", "   :imported-members:", "   :show-inheritance:"]  # of the package itself: what `__all__` has
OPTIONS = [f"   :{option}:" for option in ("members", "show-inheritance", "ignore-module-all")]


def pages(package: Path) -> dict[str, str]:
    """The text of each page, by the name of its package."""
    return {dotted(init.parent, package): page(init.parent, package) for init in sorted(package.rglob("__init__.py"))}


def dotted(path: Path, package: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts)


def page(folder: Path, package: Path) -> str:
    lines = [f"# {dotted(folder, package)}", "", *module(folder / "__init__.py", folder, package)]
    for file in sorted(folder.glob("*.py")):
        if not file.name.startswith("__"):
            lines += ["", f"## {dotted(file, package)}", "", *module(file, file, package)]
    return "\n".join([*lines, ""])


def module(file: Path, name: Path, package: Path) -> list[str]:
    path = file.relative_to(package.parent).as_posix()
    options = PUBLIC if name == package else OPTIONS
    automodule = ["```{eval-rst}", f".. automodule:: {dotted(name, package)}", *options, "```"]
    return [f"Source: [{path}](../../{path})", "", *automodule]


def write_pages(app: Sphinx) -> None:
    folder = app.srcdir / FOLDER
    folder.mkdir(exist_ok=True)
    package = app.config.module_pages_package
    texts = {f"{name}.md": text for name, text in pages(app.srcdir.parent / package).items()} if package else {}
    for old in folder.glob("*.md"):
        if old.name not in texts:
            old.unlink()
    for name, text in texts.items():
        place = folder / name
        if not place.is_file() or place.read_text(encoding="utf-8") != text:
            place.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_config_value("module_pages_package", None, "env", str)
    app.connect("builder-inited", write_pages)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
