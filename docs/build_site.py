"""Build the site: the pages of this folder and the API reference from docstrings, by pdoc.

    python docs/build_site.py OUT

A page becomes a module of pdoc whose docstring is its text, so that pages and reference share one navigation, one
search and one look. Links between pages are turned from `.md` into `.html`; a link to nothing stops the build.
"""

import re
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pdoc.doc
import pdoc.render
import pdoc.search

HERE = Path(__file__).parent
SITE = "guide"
# What users call; all else is found by the links to the source.
PUBLIC = (
    "vlmq",
    "vlmq.calib",
    "vlmq.calib.saliency",
    "vlmq.exports",
    "vlmq.eval",
    "vlmq.eval.agreement",
    "vlmq.eval.dual_encoder",
    "vlmq.eval.evaluation",
    "vlmq.eval.labeled",
    "vlmq.eval.perplexity",
    "vlmq.eval.round_trip",
    "vlmq.eval.size",
    "vlmq.eval.vqa",
    "vlmq.formats",
    "vlmq.kernels",
    "vlmq.kernels.backends",
    "vlmq.kernels.packing",
    "vlmq.kernels.reference",
    "vlmq.linear",
    "vlmq.planning",
    "vlmq.quantization",
    "vlmq.report",
    "vlmq.scheme",
    "vlmq.solvers",
)


def module_name(page: Path) -> str:
    """The module that a page becomes: README.md stands for its folder."""
    parts = page.relative_to(HERE).with_suffix("").parts
    return ".".join((SITE, *(part for part in parts if part != "README")))


def as_module(page: Path) -> pdoc.doc.Module:
    """A page as a module of pdoc.

    Raises:
        ValueError: it links to a file that there is not.
    """
    name, text = module_name(page), page.read_text()

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        path = (page.parent / target).resolve()
        if not path.is_file():
            raise ValueError(f"{page} links to {target}, which is not there")
        if path.suffix != ".md":
            return match[0]
        ups = "../" * name.count(".")
        return f"]({ups}{module_name(path).replace('.', '/')}.html{'#' + anchor if anchor else ''})"

    module = ModuleType(name, re.sub(r"\]\((?!https?:)([^)#]+[^)]*)\)", link, text))
    module.__file__ = None
    return pdoc.doc.Module(module)


def build(out: Path) -> list[Path]:
    """Write the site; returns its pages."""
    shutil.rmtree(out, ignore_errors=True)
    warnings.filterwarnings(
        "ignore", message=".*libvlmq_cpu"
    )  # a library of C, which pdoc takes for a module
    pdoc.render.configure(docformat="google", search=True, math=False, template_directory=HERE / "templates")
    pages = [as_module(page) for page in sorted(HERE.rglob("*.md"))]
    modules = {module.fullname: module for module in pages}
    modules |= {name: pdoc.doc.Module(import_module(name)) for name in PUBLIC}
    written = []
    for name, module in modules.items():
        path = out / f"{name.replace('.', '/')}.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(pdoc.render.html_module(module, modules), encoding="utf-8")
        written.append(path)
    (out / "index.html").write_text(pdoc.render.html_index(modules), encoding="utf-8")
    (out / "search.js").write_text(pdoc.render.search_index(modules), encoding="utf-8")
    for picture in HERE.glob("*.png"):
        shutil.copy(picture, out / SITE / picture.name)
    return written


if __name__ == "__main__":
    print(f"{len(build(Path(sys.argv[1])))} pages in {sys.argv[1]}")
