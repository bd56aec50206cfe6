"""The page of a report: whole, self-contained, and nothing but text out of names that others chose."""

from __future__ import annotations

import base64
import builtins
import copy
import io
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kdcache.errors import MissingExtraError, UsageError
from kdcache.stages import report_html_figures
from kdcache.stages.data import load_data
from kdcache.stages.report_html import render, to_html
from kdcache.stages.report_html_figures import svg_uri
from kdcache.stages.report_html_images import MAX_SIDE, as_pixels, thumbnails
from kdcache.stages.report_html_parts import shown

sys.path.insert(0, str(Path(__file__).parent))
from report_page import HOSTILE, sample_report

VOID = {"meta", "link", "img", "br", "rect"}
NOTHING = {
    "cache": {"name": "c", "root": "00", "samples": 0, "rows": 0, "views": [0], "classes": 2, "class_names": None,
              "encoding": {"name": "dense"}, "teacher": None, "data": None, "teacher_seen": "unknown"},
    "teacher": {name: None for name in ("rows", "labelled", "top1", "top5", "nll", "brier", "ece", "reliability",
                "confidence_histogram", "entropy_histogram", "softness", "classes", "confusions", "views")},
    "data": {name: None for name in ("samples", "labelled", "coverage", "disagreement", "suspects", "domain")},
    "unavailable": {"brier": "no labels"},
    "advice": [],
}  # fmt: skip


class Page(HTMLParser):
    """The elements of a page; a tag that is closed by another one is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def png(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (28, 28), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(to_html(sample_report(), thumbnails={"sample-0": png()}))


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without the second that matplotlib takes."""
    for name in ("reliability", "histogram", "softness", "curves"):
        monkeypatch.setattr(report_html_figures, name, lambda *_, **__: "data:,")


def test_every_section_is_there_and_linked(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {"overview", "teacher", "data", "students", "unavailable", "capacity", "gains", "suspects"} <= set(ids)
    links = [attributes["href"] for attributes in page.all("a")]
    assert links == ["#overview", "#teacher", "#data", "#students", "#unavailable"]
    numbers = [attributes["id"] for attributes in page.all("figure")]
    assert numbers == [f"figure-{at}" for at in range(1, len(numbers) + 1)]
    for text in ("94.1 %", "0.141", "labels only", "62.00 ± 0.40 %", "the teacher helps", "kdcache calibrate C"):
        assert text in page.text, text


def test_nothing_outside_of_the_file_is_asked_for(page: Page) -> None:
    assert {"script", "iframe", "object", "base", "form"}.isdisjoint(tag for tag, _ in page.elements)
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") or name in ("style", "srcset", "action") for name in attributes), tag
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes[name][:80])
    (policy,) = [one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy


def test_every_picture_is_one_and_has_a_description(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) == 8
    for picture in pictures:
        assert picture["alt"]
        head, _, content = picture["src"].partition(",")
        data = base64.b64decode(content, validate=True)
        if head == "data:image/png;base64":
            assert Image.open(io.BytesIO(data)).size == (28, 28)
            continue
        assert head == "data:image/svg+xml;base64"
        root = ElementTree.fromstring(data)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        for element in root.iter():
            for name, value in element.attrib.items():
                assert "://" not in value, name
                assert "#010101" not in value  # each placeholder has become a variable
            assert not element.tag.endswith(("script", "image", "foreignObject"))
        assert "://" not in "".join(root.itertext())


def test_a_report_is_the_same_bytes_again() -> None:
    report = sample_report(students=False)
    assert to_html(report) == to_html(copy.deepcopy(report))


def test_hostile_names_are_text() -> None:
    text = to_html(sample_report(hostile=True), thumbnails={f"{HOSTILE}-0": png()})
    page = Page(text)
    assert not page.all("script")
    assert len(page.all("img")) == 8
    assert "<script>alert" in page.text
    assert "evil.example/p.png" in page.text  # of the overview, cut nowhere; as text
    assert not set("\x1b\u202e") & set(text)
    assert "\\x1b[2J\\u202e" in page.text


@given(st.text(max_size=300))
def test_text_of_others_is_one_short_printable_line(text: str) -> None:
    found = shown(text)
    assert found.isprintable()
    assert len(found) <= 80
    if text.isprintable() and len(text) <= 80:
        assert found == text


def test_a_thousand_classes_are_the_worst_the_best_and_a_histogram(undrawn: None) -> None:
    text = to_html(sample_report(1000))
    page = Page(text)
    accuracies = sorted(row["accuracy"] for row in sample_report(1000)["teacher"]["classes"])
    assert f"{100 * accuracies[0]:.1f} %" in page.text
    assert len(page.all("tr")) < 150
    assert "1000 classes" in page.text
    assert len(page.all("figure")) == len(Page(to_html(sample_report(10))).all("figure")) + 2
    assert len(text) < 1 << 20


@pytest.mark.parametrize("classes", [40, 41])
def test_up_to_40_classes_are_all_listed(classes: int, undrawn: None) -> None:
    page = Page(to_html(sample_report(classes, students=False)))
    assert len([one for one in page.all("rect") if one["class"] == "value"]) == 40 + 2  # and of two views


def test_a_report_of_nothing_says_so() -> None:
    page = Page(to_html(NOTHING))
    assert "Not available" in page.text or "No class has labelled rows" in page.text
    assert "no labels" in page.text
    assert not page.all("img")
    assert "students" not in [attributes.get("id") for attributes in page.all("section")]


def test_each_part_of_a_report_may_be_missing(undrawn: None) -> None:
    for section in ("teacher", "data"):
        for key in sample_report()[section]:
            report = sample_report(students=False)
            report[section][key] = None
            report["unavailable"] = {key: "the encoding does not tell"}
            assert "the encoding does not tell" in Page(to_html(report)).text, (section, key)


def test_students_that_are_not_finished_or_not_compared_are_shown(undrawn: None) -> None:
    report = sample_report()
    first, second = report["students"]
    first |= {"held_out": None, "training": None, "missing": {"held_out": "not finished", "training": "not finished"}}
    first["runs"][0]["status"] = "interrupted"
    second["against_labels"] |= {"why_not": "another student", "accuracy": None, "classes": []}
    text = Page(to_html(report)).text
    assert "(interrupted, step 400)" in text
    assert "not compared: another student" in text


def test_a_file_that_is_there_stays_unless_told(tmp_path: Path, undrawn: None) -> None:
    out = tmp_path / "report.html"
    with pytest.raises(UsageError, match="new is no folder"):
        render(sample_report(students=False), tmp_path / "new" / "report.html")
    assert not (tmp_path / "new").exists()
    render(sample_report(students=False), out)
    before = out.read_text()
    with pytest.raises(UsageError, match="exists"):
        render(sample_report(), out)
    assert out.read_text() == before
    render(sample_report(), out, overwrite=True)
    assert out.read_text() != before
    for content in (b"", b"<!DOCTYPE html>\n<p>mine", b"\x89HDF\r\n\x1a\n", b'{"kdcache_run": 1}'):
        other = tmp_path / "other"
        other.write_bytes(content)
        with pytest.raises(UsageError, match="is not a page that `kdcache report` made"):
            render(sample_report(), other, overwrite=True)
        assert other.read_bytes() == content


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_the_extra_the_command_to_install_it_is_said(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=rf'{package}.*pip install "kdcache\[report\]"'):
        render(sample_report(), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_digits_have_thumbnails() -> None:
    found = thumbnails(load_data("digits:test"), [1303, 1700, 10**6])
    assert list(found) == ["1303", "1700"]
    assert Image.open(io.BytesIO(found["1303"])).size == (8, 8)
    expected = (255 * load_data("digits:test").dataset[3][0][0]).round().to(torch.uint8)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(found["1303"]))), expected.numpy())


def test_folders_have_thumbnails_by_their_names_of_at_most_64_pixels(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.fromarray(np.full((200, 100, 3), (250, 10, 10), np.uint8)).save(tmp_path / "cat" / "a.png")
    found = thumbnails(load_data(f"folder:{tmp_path}"), ["cat/a.png"])
    picture = Image.open(io.BytesIO(found["cat/a.png"]))
    assert max(picture.size) <= MAX_SIDE
    assert picture.mode == "RGB"


@pytest.mark.parametrize(
    ("value", "shape"),
    [
        (torch.rand(3, 9, 7), (9, 7, 3)),
        (torch.rand(1, 9, 7), (9, 7)),
        (np.zeros((9, 7, 3), np.uint8), (9, 7, 3)),
        (torch.randn(3, 9, 7) * 5, (9, 7, 3)),
        (torch.full((3, 9, 7), float("nan")), (9, 7, 3)),
        (torch.rand(9, 7), (9, 7)),
        (torch.rand(784), None),
        (torch.rand(5, 9, 7), None),
        (torch.rand(2, 3), None),
        ("a text", None),
        ({"a": 1}, None),
    ],
)
def test_what_counts_as_an_image(value: Any, shape: tuple[int, ...] | None) -> None:
    found = as_pixels(value)
    assert (None if found is None else found.shape) == shape
    assert found is None or found.dtype == np.uint8


def test_no_colour_of_a_figure_is_fixed() -> None:
    uri = svg_uri(
        '<?xml version="1.0"?><!DOCTYPE svg PUBLIC "x" "http://y"><svg a="b"><g style="fill: #010101"/></svg>'
    )
    text = base64.b64decode(uri.partition(",")[2]).decode()
    assert 'style="fill: var(--c0)"' in text
    assert "http" not in text
