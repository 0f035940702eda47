"""The site of `make docs`, built whole: every page, every link within it, and every name that texts point to."""

import importlib
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXTS = [
    path
    for top in ("vlmq", "calib", "kernels", "eval", "docs", ".")
    for path in (ROOT / top).glob("*" if top == "." else "**/*")
    if path.suffix in {".py", ".md"} and path.name != "CHANGELOG.md"
]


@pytest.fixture(scope="module")
def site():
    """The script as a module: docs/ is no package."""
    pytest.importorskip("pdoc")
    return runpy.run_path(str(ROOT / "docs" / "build_site.py"))


@pytest.mark.filterwarnings("error::UserWarning")
def test_every_page_is_written_and_its_links_lead_somewhere(site, tmp_path):
    """pdoc warns where it cannot read a signature or a module."""
    written = site["build"](tmp_path)
    assert len(written) == len(site["PUBLIC"]) + len(list((ROOT / "docs").rglob("*.md")))
    for page in (*written, tmp_path / "index.html"):
        links = re.findall(r'(?:href|src)="(?!https?:|data:|#|\$)([^"#]+)', page.read_text())
        assert [link for link in links if not (page.parent / link).is_file()] == [], page
    assert 'href="guide/tutorials/mixed_precision.html"' in (tmp_path / "guide.html").read_text()


def test_link_to_nothing_stops_the_build(site, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("[there](gone.md)")
    monkeypatch.setitem(site["as_module"].__globals__, "HERE", tmp_path)
    with pytest.raises(ValueError, match=r"README.md links to gone.md, which is not there"):
        site["as_module"](tmp_path / "README.md")


def is_there(dotted: str) -> bool:
    """Whether a module, or what a module holds, has that name."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:n]))
        except ModuleNotFoundError:
            continue
        for part in parts[n:]:
            found = getattr(found, part, None)
        return found is not None
    return False


def test_every_name_that_docstrings_and_pages_point_to_is_there():
    named = {
        (path.name, name) for path in TEXTS for name in re.findall(r"`(vlmq(?:\.\w+)+)", path.read_text())
    }
    assert len(named) > 80
    assert [(page, name) for page, name in sorted(named) if not is_there(name)] == []
    assert not is_there("vlmq.calib.gone")
    assert not is_there("vlmq.quantization.gone")
