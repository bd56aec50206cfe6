"""The rules of a report's advice: which figures lead to which sentence."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from kdcache.stages.report_advice import (
    OVER_FITTED,
    WEAK,
    WRONG_DOMAIN,
    data_advice,
    information,
    named,
    teacher_advice,
)


def figures(
    *, cache: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **teacher: Any
) -> dict[str, Any]:
    """A report of a good teacher of ten classes, but for what is given."""
    soft = [
        {"temperature": t, "entropy": e, "outside_label": o, "outside_top": o}
        for t, e, o in ((1.0, 0.3, 0.08), (2.0, 0.7, 0.2), (4.0, 1.4, 0.5), (8.0, 2.0, 0.7))
    ]
    good = {
        "labelled": 1000,
        "top1": 0.92,
        "nll": 0.25,
        "ece": {"equal_width": 0.01, "equal_mass": 0.01},
        "confidence": 0.925,
        "majority_share": 0.11,
        "prior_nll": 2.3,
        "usual_class_share": 0.92,
        "softness": soft,
        "classes": [{"class": n, "name": None, "rows": 100, "accuracy": 0.92} for n in range(10)],
        "views": None,
    }
    about = {"name": "teacher.h5", "classes": 10, "teacher_seen": "no"}
    alike = {
        "covered": None,
        "disagreement": {"rows": 5, "share": 0.005},
        "domain": {"unlike_share": 0.001},
    }
    return {"cache": {**about, **(cache or {})}, "teacher": {**good, **teacher}, "data": {**alike, **(data or {})}}


def warnings(found: dict[str, Any]) -> list[str]:
    return [one["text"] for one in teacher_advice(found) if one["level"] == "warning"]


def test_nothing_is_said_against_a_good_teacher() -> None:
    (only,) = teacher_advice(figures())
    assert (only["section"], only["level"]) == ("teacher", "ok")
    assert only["command"] == "kdcache distill --cache {cache} --temperature 2 ..."
    (only,) = data_advice(figures())
    assert (only["section"], only["level"]) == ("data", "ok")
    assert only["command"]


def test_information_is_the_share_of_the_labels_entropy() -> None:
    assert information(figures()["teacher"]) == pytest.approx(1 - 0.25 / 2.3)
    assert information(figures(nll=None)["teacher"]) is None
    assert information(figures(prior_nll=0.0)["teacher"]) is None


@pytest.mark.parametrize(
    "teacher",
    [
        {"top1": 0.18, "confidence": 0.2, "nll": None, "usual_class_share": 0.25},
        {"top1": 0.7, "nll": 1.0, "confidence": 0.72},
        {"top1": 0.7, "nll": 1.0, "confidence": None},
    ],
)
def test_a_weak_teacher_is_warned_of(teacher: dict[str, Any]) -> None:
    (text,) = warnings(figures(**teacher))
    assert text.startswith(WEAK)


def test_a_sure_teacher_without_information_is_of_another_domain_and_that_is_said_once() -> None:
    found = figures(top1=0.25, nll=6.0, confidence=0.9, ece={"equal_width": 0.6, "equal_mass": 0.6})
    (text,) = warnings(found)
    assert text.startswith(WRONG_DOMAIN)
    assert not [one for one in teacher_advice(found) if "ECE" in one["text"]]


def test_an_over_confident_teacher_is_over_fitted() -> None:
    advice = teacher_advice(figures(top1=0.9, nll=0.5, confidence=0.97))
    assert advice[0]["level"] == "warning"
    assert advice[0]["text"].startswith(OVER_FITTED)
    assert advice[0]["command"] == "kdcache calibrate {cache}"


@pytest.mark.parametrize(("seen", "warned"), [("yes", True), ("unknown", True), ("no", False)])
def test_a_perfect_teacher_is_over_fitted_where_it_may_have_seen_the_rows(seen: str, warned: bool) -> None:
    hard = [
        {"temperature": t, "entropy": 1e-3, "outside_label": 0, "outside_top": 1e-4 * t} for t in (1.0, 2.0, 4.0, 8.0)
    ]
    found = figures(cache={"teacher_seen": seen}, top1=1.0, nll=1e-4, confidence=0.9999, softness=hard)
    assert [text.startswith(OVER_FITTED) for text in warnings(found)] == [True] * warned
    assert any("they are labels" in one["text"] for one in teacher_advice(found))


def test_each_advice_about_accuracy_says_that_figures_flatter() -> None:
    poor = [{"class": n, "name": f"c{n}", "rows": 100, "accuracy": 0.1 if n < 7 else 0.95} for n in range(10)]
    told = {"ece": {"equal_width": 0.14, "equal_mass": 0.14}, "classes": poor, "nll": 1.5}
    for seen, said in (("yes", "(flattering: the teacher saw"), ("unknown", "(flattering if"), ("no", "")):
        found = figures(cache={"teacher_seen": seen}, data={"disagreement": {"rows": 90, "share": 0.09}}, **told)
        texts = [one["text"] for one in [*teacher_advice(found), *data_advice(found)]]
        assert len(texts) == 4
        assert all(("flattering" in text) == bool(said) and said in text for text in texts)
    found = figures(cache={"teacher_seen": "yes"}, **told)
    (calibrate,) = [one for one in teacher_advice(found) if "ECE is 0.14" in one["text"]]
    assert calibrate["command"] == "kdcache calibrate {cache} --on UNSEEN_CACHE"


def test_poor_classes_are_named_and_the_rest_counted() -> None:
    poor = [{"class": n, "name": f"c{n}", "rows": 100, "accuracy": 0.01 * n} for n in range(8)]
    rare = {"class": 8, "name": "rare", "rows": 3, "accuracy": 0.0}
    (one,) = [one for one in teacher_advice(figures(classes=[*poor, rare])) if "poor on" in one["text"]]
    assert "c0 (0), c1 (0.01)" in one["text"]
    assert "and 3 more" in one["text"]
    assert "rare" not in one["text"]


def test_classes_in_another_order_get_a_map() -> None:
    (one,) = teacher_advice(figures(top1=0.05, nll=9.0, confidence=0.9, usual_class_share=0.91))[:1]
    assert "another order" in one["text"]
    assert "--classes MAP" in one["command"]


def test_softness_few_classes_and_views_have_their_notes() -> None:
    flat = [{"temperature": t, "entropy": 2.29, "outside_label": 0.9, "outside_top": 0.9} for t in (1.0, 2.0, 4.0, 8.0)]
    for found, said in (
        (figures(softness=flat), "nearly equal for all classes"),
        (figures(cache={"classes": 4}), "4 classes only: a row tells 3 numbers"),
        (figures(cache={"classes": 2}), "a row tells 1 number,"),
        (figures(views={"agreement": 0.8}), "gives 20% of the augmented rows another class"),
        (figures(labelled=0, top1=None, nll=None, ece=None, classes=None), "the rows have no labels"),
    ):
        assert any(said in one["text"] for one in teacher_advice(found))


def test_data_advice_covers_coverage_unlike_rows_and_disagreement() -> None:
    covered = {"data": "digits:train", "samples": 100, "found": 60, "share": 0.6}
    found = figures(
        data={
            "covered": covered,
            "domain": {"unlike_share": 0.2},
            "disagreement": {"rows": 50, "share": 0.05},
        }
    )
    levels = [(one["level"], one["text"][:9]) for one in data_advice(found)]
    assert levels == [("warning", "40 of the"), ("warning", "20.0% of "), ("note", "teacher a")]
    assert all(one["command"] for one in data_advice(found))
    silent = figures(data={"domain": {"unlike_share": None}, "disagreement": None})
    assert [one["level"] for one in data_advice(silent)] == ["ok"]


def test_no_teacher_is_called_good_that_nobody_can_judge() -> None:
    nothing = dict.fromkeys(("top1", "nll", "ece", "classes", "majority_share", "prior_nll", "usual_class_share"))
    for found, said in (
        (figures(labelled=0, **nothing), "the rows have no labels"),
        (figures(top1=0.99, majority_share=1.0, prior_nll=0.0, confidence=0.98), "all labels are of one class"),
        (figures(top1=0.0, majority_share=1.0, prior_nll=0.0, confidence=0.02), "all labels are of one class"),
    ):
        (only,) = teacher_advice(found)
        assert (only["level"], said in only["text"]) == ("note", True)


def test_data_of_which_nothing_is_in_the_cache_are_other_data() -> None:
    covered = {"data": "my data", "samples": 100, "found": 0, "share": 0.0}
    (one,) = named(data_advice(figures(data={"covered": covered})), Path("teacher.h5"))
    assert "the cache of other data" in one["text"]
    assert one["command"] == "kdcache precompute --data 'my data' --out new-teacher.h5 ..."


@pytest.mark.parametrize("path", ["teacher.h5", "caches/my teacher.h5", "-t.h5", "/abs/$(id)/t", "a/{new}.h5"])
def test_a_command_names_the_cache_as_it_was_given_in_one_word(path: str) -> None:
    found = figures(top1=1.0, nll=1e-4, confidence=0.9999, cache={"teacher_seen": "yes"})
    for one in named([*teacher_advice(found), *data_advice(found)], Path(path)):
        words = [word for word in shlex.split(one["command"]) if path in word]
        assert words == [f"./{path}" if path.startswith("-") else path] or "--out" in one["command"]
    (new,) = [
        one
        for one in named(teacher_advice(figures(top1=None, classes=None)), Path("caches/my t.h5"))
        if one["level"] == "note"
    ]
    assert shlex.split(new["command"])[5] == "caches/new-my t.h5"


def test_the_ece_is_that_of_equal_width_bins_and_says_so() -> None:
    found = figures(ece={"equal_width": 0.031, "equal_mass": 0.042})
    (one,) = [one for one in teacher_advice(found) if "ECE" in one["text"]]
    assert "ECE is 0.031 (equal width; equal mass: 0.042)" in one["text"]
