"""`report`: what it reads of each kind of cache, what it leaves out and says so, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import CorruptCacheError, DataError, IncompleteCacheError, MismatchError, UsageError
from kdcache.format.dense import Dense
from kdcache.format.known_heads import forget_heads
from kdcache.format.manifest import ClassList
from kdcache.format.schema import RowSchema
from kdcache.stages.report import report
from kdcache.store.dump import open_dump
from kdcache.store.plan import Plan
from kdcache.train.label_quality import label_quality

ROWS, CLASSES = 400, 6
RNG = np.random.default_rng(0)
LABELS = np.arange(ROWS) % CLASSES
LOGITS = (np.eye(CLASSES)[LABELS] * 4 + RNG.normal(size=(ROWS, CLASSES))).astype(np.float32)


def write(path: Path, *, labels: np.ndarray | None = LABELS, logits: np.ndarray = LOGITS, **options: Any) -> Path:
    options.setdefault("classes", logits.shape[1])
    options.setdefault("provenance", {"teacher_seen": "no"})
    ids = options.pop("ids", np.arange(len(logits)))
    with kdcache.Writer(path, **options) as writer:
        writer.write(ids, logits, labels)
    return path


def write_views(path: Path, shifts: list[np.ndarray]) -> Path:
    """A folder with a view of LOGITS plus each shift, in shards of 150 samples."""
    encoding = Dense((CLASSES,), "float32")
    schema = RowSchema(encoding, "<i8", has_labels=True, has_digests=False)
    plan = Plan(schema, ClassList.of(CLASSES, None), 150, ROWS, {"teacher_seen": "no"}, tuple(range(len(shifts))))
    dump = open_dump(path, plan)
    for number in range(plan.shard_count):
        view, start, stop = plan.span(number)
        index = number % plan.shards_per_view
        assert dump.claim(view, index)
        container = dump.container(view, index, start, stop)
        ids = np.arange(start, stop)
        arrays = encoding.encode((LOGITS + shifts[view])[start:stop].astype(np.float32)).arrays
        container.append({"sample_id": ids, "label": LABELS[start:stop], **arrays}, view=view, positions=ids)
        dump.commit(container, container.record(view=view, start=start, ids=(start, stop - 1)), index)
        dump.release(view, index)
    records = dump.all_records()
    assert records is not None
    dump.finish(records, samples=ROWS)
    return path


def test_the_parts_of_a_report(tmp_path: Path) -> None:
    found = report(write(tmp_path / "c", classes=list("abcdef"), shard_rows=150)).to_json()
    assert set(found) == {"cache", "teacher", "data", "students", "unavailable", "advice"}
    about = found["cache"]
    assert (about["name"], about["samples"], about["rows"], about["classes"]) == ("c", ROWS, ROWS, CLASSES)
    assert about["class_names"] == list("abcdef")
    assert about["teacher_seen"] == "no"
    assert found["teacher"]["top1"] == pytest.approx((LOGITS.argmax(1) == LABELS).mean())
    assert [one["name"] for one in found["teacher"]["classes"]] == list("abcdef")
    assert len(found["teacher"]["reliability"]) == 15
    assert set(found["unavailable"]) == {"coverage", "views"}
    assert {one["section"] for one in found["advice"]} == {"teacher", "data"}
    json.dumps(found, allow_nan=False)


def test_suspects_are_the_rows_that_label_quality_doubts_most(tmp_path: Path) -> None:
    labels = LABELS.copy()
    labels[[7, 300]] = (labels[[7, 300]] + 1) % CLASSES
    labels[20] = -1
    path = write(tmp_path / "c.h5", labels=labels, ids=[f"row/{n}" for n in range(ROWS)])
    found, quality = report(path).to_json()["data"], label_quality(path)
    order = np.argsort(quality.self_confidence, kind="stable")[:50]  # NaN, without a label, is last
    assert [one["sample_id"] for one in found["suspects"]] == [quality.sample_id[at].decode() for at in order]
    np.testing.assert_allclose([one["score"] for one in found["suspects"]], quality.self_confidence[order], rtol=1e-4)
    assert {found["suspects"][0]["sample_id"], found["suspects"][1]["sample_id"]} == {"row/7", "row/300"}
    assert found["labelled"] == ROWS - 1
    assert found["disagreement"]["rows"] == ((quality.teacher_class != labels) & (labels >= 0)).sum()


def test_views_are_compared_with_the_first(tmp_path: Path) -> None:
    turned = np.zeros((ROWS, CLASSES))
    turned[:100, 0] = 20  # a hundred samples become class 0
    path = write_views(tmp_path / "c", [np.zeros((ROWS, CLASSES)), np.zeros((ROWS, CLASSES)), turned])
    found = report(path).to_json()
    top = LOGITS.argmax(1)
    changed = (top[:100] != 0).sum()
    views = found["teacher"]["views"]
    assert views["views"] == [0, 1, 2]
    assert views["agreement"] == pytest.approx(1 - changed / (2 * ROWS))
    assert views["top1_each"][0] == views["top1_each"][1] == pytest.approx((top == LABELS).mean())
    assert views["top1_each"][2] < views["top1_each"][0]
    assert views["kl_mean"] > 0
    assert found["teacher"]["rows"] == 3 * ROWS
    assert (found["data"]["samples"], found["data"]["labelled"]) == (ROWS, ROWS)
    assert "views" not in found["unavailable"]


def test_rows_unlike_the_rest_are_counted_by_their_energy(tmp_path: Path) -> None:
    logits = LOGITS.copy()
    logits[:30] -= 50
    found = report(write(tmp_path / "c.h5", logits=logits)).to_json()
    assert found["data"]["domain"]["unlike_share"] >= 30 / ROWS
    assert any("unlike the others" in one["text"] and one["level"] == "warning" for one in found["advice"])
    normalised = LOGITS - np.log(np.exp(LOGITS).sum(1, keepdims=True))
    found = report(write(tmp_path / "log.h5", logits=normalised)).to_json()
    assert found["data"]["domain"]["unlike_share"] is None
    assert "log-probabilities" in found["unavailable"]["domain.unlike_share"]


@pytest.mark.parametrize("options", [{"dtype": "int8"}, {"top_k": 3, "temperatures": [1, 4]}, {"top_k": 2}])
def test_other_encodings_answer_what_they_can(tmp_path: Path, options: dict[str, Any]) -> None:
    write(tmp_path / "c")
    kdcache.convert(tmp_path / "c", tmp_path / "other", **options)
    exact, found = (report(tmp_path / name).to_json() for name in ("c", "other"))
    for name in ("top1", "nll"):
        assert found["teacher"][name] == pytest.approx(exact["teacher"][name], abs=5e-3)
    domain, expected = (one["data"]["domain"] for one in (found, exact))
    assert domain["max_probability_mean"] == pytest.approx(expected["max_probability_mean"], abs=5e-3)
    assert domain["unlike_share"] == pytest.approx(expected["unlike_share"], abs=5e-3)
    same = [one["sample_id"] for one in exact["data"]["suspects"]]
    assert found["data"]["suspects"][0]["sample_id"] in same[:3]
    assert ("brier" in found["unavailable"]) == ("top_k" in options)
    assert {one["level"] for one in found["advice"]} == {one["level"] for one in exact["advice"]}


def test_factored_rows_are_those_of_their_logits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES))
    data = TensorDataset(torch.randn(ROWS, 5), torch.from_numpy(LABELS))
    for name, options in (("dense", {}), ("factored", {"factored": "2"})):
        kdcache.precompute(model, data, tmp_path / name, quiet=True, **options)
    exact, found = (report(tmp_path / name).to_json() for name in ("dense", "factored"))
    for name in ("top1", "nll", "brier", "confidence"):
        assert found["teacher"][name] == pytest.approx(exact["teacher"][name], abs=2e-3)
    assert found["cache"]["encoding"]["name"] == "factored"
    assert set(found["unavailable"]) == set(exact["unavailable"])
    forget_heads()


def test_a_mean_of_soft_targets_has_no_logits_to_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Dense, "has_all_logits", False)
    with pytest.raises(UsageError, match="report the caches that it was made of"):
        report(write(tmp_path / "c.h5"))


def test_a_cache_without_labels_leaves_out_what_needs_them(tmp_path: Path) -> None:
    found = report(write(tmp_path / "c.h5", labels=None)).to_json()
    assert found["teacher"]["top1"] is found["teacher"]["classes"] is None
    assert found["data"]["disagreement"] is found["data"]["suspects"] is None
    assert {"top1", "suspects", "disagreement"} <= set(found["unavailable"])
    assert found["teacher"]["softness"][0]["entropy"] > 0
    assert found["data"]["domain"]["unlike_share"] is not None
    assert any("no labels" in one["text"] for one in found["advice"])


def test_a_masked_label_is_an_infinite_likelihood_and_named(tmp_path: Path) -> None:
    logits = LOGITS.copy()
    logits[:, 2] = -np.inf
    found = report(write(tmp_path / "c.h5", logits=logits)).to_json()
    assert found["teacher"]["nll"] is None
    assert "infinite" in found["unavailable"]["nll"]
    json.dumps(found, allow_nan=False)


def test_coverage_is_that_of_the_data(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = write(tmp_path / "c.h5", logits=rng.normal(size=(1000, 10)).astype(np.float32), labels=None)
    found = report(path, data="digits:train").to_json()
    assert found["data"]["covered"] == {"data": "digits:train", "samples": 1300, "found": 1000, "share": 1000 / 1300}
    assert found["data"]["coverage"] == 1000 / 1300
    text = write(tmp_path / "t.h5", ids=[f"{n}" for n in range(ROWS)])
    with pytest.raises(MismatchError, match="are text"):
        report(text, data="digits:train")


def test_what_cannot_be_reported_is_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(IncompleteCacheError, match="does not exist"):
        report(tmp_path / "nothing")
    with pytest.raises(DataError, match="one class"):
        report(write(tmp_path / "one.h5", logits=LOGITS[:, :1], labels=None))
    maps = np.zeros((4, 3, 2, 2), np.float32)
    with pytest.raises(UsageError, match="dense prediction"):
        report(write(tmp_path / "maps.h5", logits=maps, labels=None))
    (tmp_path / "page.html").write_text("mine")
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="exists"):
        report(write(tmp_path / "c.h5"), out=tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "mine"


def test_a_missing_shard_and_a_damaged_row_are_named(tmp_path: Path) -> None:
    shards = sorted((write(tmp_path / "c", shard_rows=150) / "shards").glob("*.h5"))
    shards[1].rename(tmp_path / "away.h5")
    with pytest.raises(IncompleteCacheError, match="00001"):
        report(tmp_path / "c")
    (tmp_path / "away.h5").rename(shards[1])
    shards[2].chmod(0o644)
    content = bytearray(shards[2].read_bytes())
    at = content.index(np.float16(LOGITS[300] - LOGITS[300].max()).tobytes())
    content[at] ^= 1
    shards[2].write_bytes(content)
    with pytest.raises(CorruptCacheError, match=r"checksum.*Run `kdcache verify`"):
        report(tmp_path / "c")
