"""An input that differs is explained: order, view, sample content, transform or library version, and what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset
from view_caches import Images, write_views

import kdcache
from kdcache.errors import MismatchError, UsageError
from kdcache.train import diagnosis, library_versions
from kdcache.train.checks import FIRST_ITEMS, detection_probability
from kdcache.train.diagnosis import diagnose
from kdcache.train.library_versions import changed_versions, pillow_versions
from kdcache.train.pipelines import named
from kdcache.train.reading import BatchReader


@pytest.fixture
def images() -> Images:
    return Images()


class Changed(Images):
    """The images, but for those of `changes`."""

    def __init__(self, changes: dict[int, torch.Tensor], *, rows: int = 12) -> None:
        super().__init__(rows)
        for index, value in changes.items():
            self.inputs[index] = value


def error_of(dataset: Any, cache: kdcache.Cache, *, batch_size: int = 12, **options: Any) -> str:
    """The message of the first batch that is refused."""
    joined = kdcache.join(dataset, cache, check="full", **options)
    with pytest.raises(MismatchError) as caught:
        list(DataLoader(joined, batch_size=batch_size))
    return str(caught.value)


def relabelled(order: list[int]) -> TensorDataset:
    """The items in another order, with the labels that the ids had: what labels cannot tell."""
    images = Images()
    return TensorDataset(images.inputs[order], torch.tensor(images.labels))


def test_another_order_is_named_with_the_sample_that_the_input_belongs_to(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    message = error_of(relabelled([5, 0, 1, 2, 3, 4, *range(6, 12)]), cache)
    assert message.startswith("sample 0: its input is not the one that the teacher saw in view 0 (digest ")
    assert "Likely cause: order. 6 of the 12 inputs compared differ; this is the input of sample 5, and 6" in message
    assert "sample_ids=" in message
    assert "check='ids'" in message


def test_two_samples_that_changed_places_are_an_order_too(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,), sample_ids=[f"{n}.png" for n in range(12)])
    swapped = relabelled([0, 1, 8, *range(3, 8), 2, 9, 10, 11])
    message = error_of(swapped, cache, sample_ids=[f"{n}.png" for n in range(12)])
    assert message.startswith("sample '2.png': ")
    assert "order. 2 of the 12 inputs compared differ; this is the input of sample '8.png'" in message


def test_positions_in_a_subset_that_pose_as_ids_are_an_order(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    part = Subset(images, [5, 6, 7, 8])  # labels repeat with a period of 5: they agree
    message = error_of(part, cache, sample_ids=np.arange(4))
    assert "order. 4 of the 4 inputs compared differ; this is the input of sample 5" in message


def test_rows_of_another_view_are_views_out_of_step(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, named("shift,noise"))
    reader = BatchReader(cache, missing="error", check="full")
    pixels = kdcache.join(images, cache, view=2)
    with pytest.raises(MismatchError, match="in view 1 ") as caught:
        reader.read(
            np.arange(12) + 12, np.arange(12), labels=images.labels, input_at=lambda position: pixels[position][0]
        )
    message = str(caught.value)
    assert (
        "view. 12 of the 12 inputs compared differ; the views are out of step: this is the input of view 2" in message
    )


def test_a_few_inputs_that_differ_are_other_contents(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    message = error_of(Changed({3: torch.zeros(1, 8, 8), 7: torch.ones(1, 8, 8)}), cache)
    assert message.startswith("sample 3: ")
    assert "sample content. 2 of the 12 inputs compared differ, the others are as they were" in message
    assert "(3, 7)" in message


def test_one_input_after_many_that_agreed_is_another_content(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    message = error_of(Changed({9: torch.zeros(1, 8, 8)}), cache, batch_size=1)
    assert "sample content. 1 of the 1 inputs compared differ (9 before them agreed)" in message


def test_another_transform_is_named_with_the_inputs_and_the_pipeline_of_the_dump(
    images: Images, tmp_path: Path
) -> None:
    other = TensorDataset(images.inputs / 255, torch.tensor(images.labels))
    plain = write_views(tmp_path / "plain", images, None, (0,))
    message = error_of(other, plain)
    assert "transform. 12 of the 12 inputs compared differ, ids and labels agree, and no library is known" in message
    assert "The digests are of the data set's items, without augmentation." in message
    views = write_views(tmp_path / "views", images, named("shift,noise0.1", seed=3))
    views.provenance["data"]["inputs"] = "RGB / 255"
    message = error_of(other, views)
    assert "transform. 12 of the 12" in message
    assert "of items that are 'RGB / 255', through the pipeline 'shift2,noise0.1' with seed 3." in message


def test_one_input_alone_may_also_be_another_content(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    message = error_of(Changed({0: torch.zeros(1, 8, 8)}), cache, batch_size=1)
    assert "transform. 1 of the 1 inputs" in message
    assert "may also have changed by itself" in message


@pytest.mark.interop("PIL")
def test_another_decoder_is_recognised_where_all_inputs_differ_and_ids_and_labels_agree(
    images: Images, tmp_path: Path
) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    cache.provenance["data"]["decoder"] = {**pillow_versions(), "libjpeg_turbo": "2.1.5"}
    decoded = TensorDataset(images.inputs + 1 / 255, torch.tensor(images.labels))
    message = error_of(decoded, cache)
    here = pillow_versions()["libjpeg_turbo"]
    assert "library version. 12 of the 12 inputs compared differ, ids and labels agree" in message
    assert f"libjpeg_turbo '2.1.5' in the dump and '{here}' here. Install the versions of the dump" in message
    assert "pillow" not in message
    assert "sample content" in error_of(Changed({3: torch.zeros(1, 8, 8)}), cache)
    unlabelled = TensorDataset(images.inputs + 1 / 255)
    assert "ids agree, and labels cannot be compared" in error_of(unlabelled, cache)


def test_another_library_of_the_pipeline_is_recognised(
    images: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = write_views(tmp_path / "c", images, named("shift,noise"))
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    assert ("torch", cache.provenance["views"]["versions"]["torch"], "9.9.9") in changed_versions(cache.provenance)
    message = error_of(TensorDataset(images.inputs * 2, torch.tensor(images.labels)), cache)
    assert "library version. " in message
    assert "'9.9.9' here" in message
    kdcache.join(images, cache, check="full")[0]  # versions alone are no mismatch


def test_what_a_cache_names_is_never_imported_and_odd_records_are_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(library_versions.importlib, "import_module", lambda name: pytest.fail(f"imported {name}"))
    for versions in ({"antigravity": "1", "os": "2"}, {"torch": 3}, ["torch"], None, "torch"):
        assert changed_versions({"views": {"versions": versions}, "data": {"decoder": versions}}) == []
    assert changed_versions({"views": 1, "data": []}) == []


def test_a_library_that_is_missing_is_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(library_versions.importlib, "import_module", fail)
    monkeypatch.setattr(library_versions, "pillow_versions", lambda: fail("PIL"))
    recorded = {"views": {"versions": {"cv2": "4.9"}}, "data": {"decoder": {"pillow": "10.0.0"}}}
    assert changed_versions(recorded) == [
        ("pillow", "10.0.0", "not installed"),
        ("OpenCV", "4.9", "not installed"),
    ]


def test_all_chosen_inputs_are_compared_before_one_is_refused(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    looked: list[int] = []
    reader = BatchReader(cache, missing="ce", check="full")

    def look(position: int) -> torch.Tensor:
        looked.append(position)
        return torch.zeros(1, 8, 8)

    with pytest.raises(MismatchError, match="11 of the 11 inputs compared"):
        reader.read(np.array([*range(11), -1]), np.arange(12), labels=[*images.labels[:11], 0], input_at=look)
    assert looked == list(range(11))


def test_a_chance_match_among_many_that_differ_is_no_order(images: Images, tmp_path: Path) -> None:
    cache = write_views(tmp_path / "c", images, None, (0,))
    stored = cache.gather(np.arange(12))
    assert stored.input_digest is not None
    found = stored.input_digest + np.uint64(1)
    found[4] = stored.input_digest[5]
    assert diagnose(cache, stored, found).cause == "transform"
    found[:6] = stored.input_digest[[1, 2, 3, 4, 5, 0]]
    assert diagnose(cache, stored, found).cause == "order"
    assert diagnosis.mismatch(cache, stored, found).startswith("sample 0: ")


@pytest.mark.parametrize(("rows", "share"), [(1, 0.5), (FIRST_ITEMS, 0.01), (FIRST_ITEMS, 0.001), (1000, 0.001)])
def test_the_power_of_a_sample_is_that_of_many_trials(rows: int, share: float) -> None:
    rng = np.random.default_rng(0)
    trials = 4000
    faults = rng.binomial(rows, share, trials) > 0
    # Five standard deviations of a share of 4000 trials.
    assert abs(faults.mean() - detection_probability(rows, share)) < 5 * 0.5 / trials**0.5


def test_the_ends_of_the_power_are_certain() -> None:
    assert detection_probability(1, 1.0) == 1
    assert detection_probability(0, 0.5) == detection_probability(100, 0.0) == 0
    for rows, share in ((-1, 0.1), (1, 1.1), (1, -0.1), (1, float("nan"))):
        with pytest.raises(UsageError, match="fault_share"):
            detection_probability(rows, share)
