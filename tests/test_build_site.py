"""The site of `make docs`: every page and every link within it; needs pdoc."""

import re
import runpy
from pathlib import Path

import pytest

pytest.importorskip("pdoc")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site():
    """The script as a module: docs/ is no package."""
    return runpy.run_path(str(ROOT / "docs" / "build_site.py"))


def test_every_page_is_written_and_its_links_lead_somewhere(site, tmp_path, monkeypatch):
    monkeypatch.setitem(site["build"].__globals__, "PUBLIC", ("vlmq", "vlmq.scheme"))
    written = site["build"](tmp_path)
    assert len(written) == 2 + len(list((ROOT / "docs").rglob("*.md")))
    for page in (*written, tmp_path / "index.html"):
        links = re.findall(r'(?:href|src)="(?!https?:|data:|#|\$)([^"#]+)', page.read_text())
        assert [link for link in links if not (page.parent / link).is_file()] == [], page
    assert 'href="guide/tutorials/mixed_precision.html"' in (tmp_path / "guide.html").read_text()


def test_link_to_nothing_stops_the_build(site, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("[there](gone.md)")
    monkeypatch.setitem(site["as_module"].__globals__, "HERE", tmp_path)
    with pytest.raises(ValueError, match=r"README.md links to gone.md, which is not there"):
        site["as_module"](tmp_path / "README.md")
