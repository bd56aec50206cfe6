"""The page of a report in headless Chromium: nothing in the console, no request, every picture shown, light and dark.

KDCACHE_CI_SCREENSHOTS=FOLDER keeps the screenshots, to be looked at.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kdcache.stages.report_html import render

sys.path.insert(0, str(Path(__file__).parent))
import chromium
from report_page import HOSTILE, sample_report

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(chromium.NAME is None, reason="needs Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Tab]:
    with chromium.browser(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture(autouse=True)
def quiet(tab: chromium.Tab) -> None:
    tab.requests.clear()
    tab.console.clear()


def picture(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def page_of(tmp_path: Path, classes: int = 10, *, hostile: bool = False) -> Path:
    name = HOSTILE if hostile else "sample"
    pictures = {f"{name}-{at}": picture(at) for at in range(12)}
    render(sample_report(classes, hostile=hostile), tmp_path / "report.html", thumbnails=pictures)
    return tmp_path / "report.html"


def brightness(screenshot: bytes, name: str) -> float:
    folder = os.environ.get("KDCACHE_CI_SCREENSHOTS")
    if folder:
        (Path(folder) / f"{name}.png").write_bytes(screenshot)
    return float(np.asarray(Image.open(io.BytesIO(screenshot)).convert("L")).mean())


@pytest.mark.parametrize(("classes", "hostile"), [(10, False), (1000, False), (10, True)])
def test_a_page_asks_for_nothing_and_shows_every_picture(
    tab: chromium.Tab, tmp_path: Path, classes: int, hostile: bool
) -> None:
    path = page_of(tmp_path, classes, hostile=hostile)
    tab.open(path)
    shown = tab.evaluate("[...document.images].map(i => [i.complete, i.naturalWidth, i.naturalHeight, i.clientWidth])")
    assert len(shown) == 12 + 7 + (2 if classes == 1000 else 0)
    assert all(complete and min(sizes) > 0 for complete, *sizes in shown), shown
    assert tab.evaluate("document.scripts.length") == 0
    assert tab.evaluate("getComputedStyle(document.body).maxWidth") == "1120px"  # the policy lets the style sheet pass
    assert brightness(tab.screenshot(), f"light-{classes}-{hostile}") > 200
    assert tab.console == []
    assert [url for url in tab.requests if not url.startswith("data:")] == [path.as_uri()]


def test_a_dark_page_has_dark_figures(tab: chromium.Tab, tmp_path: Path) -> None:
    tab.open(page_of(tmp_path), dark=True)
    assert brightness(tab.screenshot(), "dark") < 70
    assert tab.console == []


def test_nothing_is_wider_than_a_telephone(tab: chromium.Tab, tmp_path: Path) -> None:
    for hostile in (False, True):
        (tmp_path / str(hostile)).mkdir()
        tab.open(page_of(tmp_path / str(hostile), hostile=hostile), width=400)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        brightness(tab.screenshot(), f"narrow-{hostile}")


def test_the_page_prints(tab: chromium.Tab, tmp_path: Path) -> None:
    tab.open(page_of(tmp_path))
    assert tab.pdf().startswith(b"%PDF")


def test_links_lead_to_their_sections(tab: chromium.Tab, tmp_path: Path) -> None:
    tab.open(page_of(tmp_path))
    links = "[...document.querySelectorAll('nav a')].map(a => document.querySelector(a.getAttribute('href')) !== null)"
    assert tab.evaluate(links) == [True] * 5


def test_these_tests_see_what_they_look_for(tab: chromium.Tab, tmp_path: Path) -> None:
    text = page_of(tmp_path).read_text()
    bad = tmp_path / "bad.html"
    bad.write_text(text.replace("<main>", '<main><img src="http://evil.example/a.png"><script>1</script>'))
    tab.open(bad)
    assert len([line for line in tab.console if "Content Security Policy" in line]) == 2
    tab.console.clear()
    start = text.index("<meta http-equiv")
    bad.write_text(text[:start] + text[text.index(">", start) + 1 :] + '<img src="http://evil.example/a.png">')
    tab.open(bad)
    assert "http://evil.example/a.png" in tab.requests
    assert any("ERR_NAME_NOT_RESOLVED" in line for line in tab.console)
    assert 0 in last_widths(tab)


def last_widths(tab: chromium.Tab) -> list[Any]:
    found: list[Any] = tab.evaluate("[...document.images].map(i => i.naturalWidth)")
    return found
