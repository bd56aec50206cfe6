"""The table of what serves what, against docs/format.md and against what the losses do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from topk_rows import rows_of

from kdcache.errors import UsageError
from kdcache.format.dense import Dense
from kdcache.format.encoding import Encoding
from kdcache.format.factored import Factored
from kdcache.format.quantized import Quantized
from kdcache.format.soft_targets import SoftTargets
from kdcache.format.topk import TopK
from kdcache.store.rows import TeacherRows
from kdcache.train.capability import NAMES, Service, require, service, table
from kdcache.train.sparse import topk_pair
from kdcache.train.sparse_metrics import captured_mass, label_log_prob

DENSE, QUANTIZED = Dense((10,)), Quantized((10,), "int8")
FACTORED = Factored((10,), 4, "0" * 64)
TOP_K = TopK((10,), 3, (1.0, 4.0, "z2"), 1)


def test_the_page_has_the_table_of_the_code() -> None:
    page = Path(__file__).parents[2] / "docs" / "format.md"
    assert table() in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "encoding", "temperature", "expected"),
    [
        ("kl", DENSE, 3.0, Service.EXACT),
        ("kl", QUANTIZED, 3.0, Service.ERROR),
        ("kl", FACTORED, 3.0, Service.ROUNDED),
        ("kd", TOP_K, 4.0, Service.BUCKETED),
        ("kd", TOP_K, None, Service.BUCKETED),
        ("kd", TOP_K, 3.0, Service.BOUNDED),
        ("js", TopK((10,), 10), 3.0, Service.EXACT),
        ("nll", TOP_K, 1, Service.EXACT),
        ("nll", TOP_K, 1.5, Service.BOUNDED),
        ("nll", TopK((10,), 3, (1.0,), 0), 1.0, Service.NO),
        ("captured_mass", TopK((10, 2, 2), 3, (1.0,), 0), 1.0, Service.EXACT),
        ("top1", TOP_K, 3.0, Service.EXACT),
        ("standardized_kd", TOP_K, None, Service.BUCKETED),
        ("standardized_kd", TopK((10,), 3, (1.0,)), None, Service.BOUNDED),
        ("dist", TOP_K, 1.0, Service.NO),
        ("mse", FACTORED, None, Service.ROUNDED),
        ("feature_cosine", FACTORED, None, Service.ROUNDED),
        ("feature_cosine", DENSE, None, Service.NO),
    ],
)
def test_how_well_rows_serve(name: str, encoding: Encoding, temperature: Any, expected: Service) -> None:
    assert service(name, encoding, temperature) is expected
    if expected is not Service.NO:
        assert require(name, encoding, temperature) is expected


def test_rows_are_asked_like_their_encoding() -> None:
    rows = TeacherRows.from_dense(torch.eye(3))
    assert {require(name, rows) for name in NAMES if not name.startswith(("feature", "relational"))} == {Service.EXACT}


@pytest.mark.parametrize("name", ["dkd", "dist", "mse", "entropy", "brier", "binary_kd"])
def test_a_loss_that_needs_all_classes_names_who_has_them(name: str) -> None:
    with pytest.raises(UsageError) as raised:
        require(name, TOP_K, 1.0)
    message = str(raised.value)
    for part in (f"{name} needs the logits of all classes", "topk, 3 of 10 classes", "dense (float16, float32, int8"):
        assert part in message
    assert "factored" in message
    assert "kdcache convert makes topk of dense, but cannot bring logits back" in message
    served = message.rpartition("Served by topk rows: ")[2].split(", ")
    assert "kl" in served
    assert name not in served


def test_what_needs_features_or_labels_says_so() -> None:
    with pytest.raises(UsageError, match=r"feature_mse needs the features.*encoding dense, float16.*--factored LAYER"):
        require("feature_mse", DENSE)
    with pytest.raises(UsageError, match=r"dkd_target needs.*without labels.*kdcache convert makes such topk rows"):
        require("dkd_target", TopK((10,), 3, (1.0,), 0), 1.0)


def test_a_mean_of_soft_targets_advises_its_temperature_only_where_that_would_do() -> None:
    mean = SoftTargets((10,), 4.0, 10)
    with pytest.raises(UsageError, match=r"asked for at temperature 1.0, .* at temperature 4, .* Use it \(--temp"):
        require("kl", mean, 1.0)
    for temperature in (1.0, 4.0):
        with pytest.raises(
            UsageError, match=r"no temperature serves nll\. Take the cache of a single teacher"
        ) as caught:
            require("nll", mean, temperature)
        assert "--temperature" not in str(caught.value)


def test_a_name_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="no loss or metric is called 'crd'; known: kl,"):
        require("crd", DENSE)


def test_what_is_called_exact_has_no_bound_and_what_is_called_bounded_has() -> None:
    rng = np.random.default_rng(0)
    rows = rows_of(rng.standard_normal((4, 10)).astype("f4"), k=3, temperatures=(1.0, 4.0, "z2"), labels=[np.arange(4)])
    student = torch.zeros(4, 10)
    for temperature in (1.0, 3.0, 4.0, "z2", torch.ones(4)):
        is_exact = service("nll", rows, temperature) is Service.EXACT
        assert (service("kl", rows, temperature) is Service.BUCKETED) == is_exact
        pair = topk_pair(student, rows, temperature=temperature, student_temperature=1.0, tail_tolerance=1.0)
        assert (pair.bound is None) == is_exact
        assert (captured_mass(rows, temperature).error is None) == is_exact
        assert (label_log_prob(rows, temperature).error is None) == is_exact
