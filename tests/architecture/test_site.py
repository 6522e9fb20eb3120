"""The site builds without a warning: every link leads somewhere, every page is in the contents."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import quote

import pytest

from tests.harness.browser import browser, needs_browser

pytest.importorskip("sphinx", reason="the site is built with the extra [docs]")
ROOT = Path(__file__).resolve().parents[2]


def sphinx_build(*words: str) -> None:
    command = [sys.executable, "-m", "sphinx", "--quiet", "-b", "html", *words]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    # Made pages go beside the sources, so these are copied; what pages link to lies where it lies in the repository.
    ignored = shutil.ignore_patterns("_build", "reference", ".*", "__pycache__", "*.so", "runs", "build")
    for name in ("docs", "examples", "megatron_samoe"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    shutil.copy(ROOT / "CHANGELOG.md", tmp_path)
    shutil.copy(ROOT / "README.md", tmp_path)
    sphinx_build("--fail-on-warning", "--keep-going", "-t", "pages", str(tmp_path / "docs"), str(tmp_path / "html"))
    index = (tmp_path / "html/index.html").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"{page.stem}.html" in index, f"{page.name} is in no contents"
    options = (tmp_path / "html/reference/options.html").read_text()
    assert "--num-expert-banks" in options and "–num" not in options


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the whole site, as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    sphinx_build("-j", "auto", "docs", str(folder))
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.night
@needs_browser
def test_the_search_finds_a_flag_the_words_of_an_error_and_a_class(site: str) -> None:
    first = "const a = document.querySelector('ul.search li a'); return a ? a.href : ''"
    with browser() as page:
        for asked, wanted in (
            ("--num-expert-banks", "reference/options.html#cmdoption-num-expert-banks"),
            ("outside the vocabulary", "troubleshooting.html"),
            ("RankModel", "megatron_samoe.models.rank_model.RankModel"),
        ):
            page.open(f"{site}/search.html?q={quote(asked)}")
            page.wait_for(lambda: bool(page.run(first)))
            assert wanted in page.run(first), asked


@pytest.mark.night
@needs_browser
@pytest.mark.parametrize("width", [390, 800, 1400])
def test_nothing_is_cut_at_the_edge_of_a_screen(site: str, width: int) -> None:
    cut = """return [...document.querySelectorAll('article pre, article .table-wrapper')].filter(e => e.scrollWidth > e.clientWidth
        && !['scroll', 'auto'].includes(getComputedStyle(e).overflowX)).map(e => e.textContent.slice(0, 80))"""
    wrap = """return [...document.querySelectorAll('div.highlight:not(.columns *) pre')].filter(e => e.scrollWidth > e.clientWidth
        && !e.closest('.columns')).map(e => e.textContent.slice(0, 80))"""
    scrolled = """return [...document.querySelectorAll('article .table-wrapper')].filter(e => e.scrollWidth > e.clientWidth + 2)
        .map(e => e.textContent.slice(0, 80))"""
    crowded = """const lines = cell => { const text = document.createRange(); text.selectNodeContents(cell);
        return text.getBoundingClientRect().height / parseFloat(getComputedStyle(cell).lineHeight); };
        return [...document.querySelectorAll('article td')].map(cell => [cell.innerText.trim(), lines(cell)])
            .filter(([text, n]) => text.split(/\\s+/).length >= 8 && text.split(/\\s+/).length < 1.5 * Math.round(n))"""
    with browser() as page:
        page.resize(width, 900)
        for name in ["index", *(path.stem for path in (ROOT / "docs").glob("*.md"))]:
            page.open(f"{site}/{name}.html")
            assert page.run("return document.documentElement.scrollWidth") <= width, name
            assert page.run(cut) == page.run(wrap) == page.run(crowded) == [], name
            assert width < 1400 or page.run(scrolled) == [], name


@pytest.mark.night
def test_names_in_signatures_lead_to_their_classes(site: str) -> None:
    page = urllib.request.urlopen(f"{site}/reference/api/megatron_samoe.inference.html").read().decode()
    assert re.search(r'<a class="reference internal" href="#megatron_samoe[.\w]*\.SamplingOptions"', page)


@pytest.mark.night
def test_every_module_of_the_reference_can_be_imported() -> None:
    """Building their pages takes a minute; what stops it is a module that needs something that is not there."""
    code = "import importlib, runpy; [importlib.import_module(name) for name in runpy.run_path('docs/conf.py')['modules']()]"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
