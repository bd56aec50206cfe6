"""The digits that ship with kdcache are the published ones, cut into blocks that share no writer's rows by chance."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import kdcache_data
from kdcache.errors import UsageError
from kdcache.stages.data import load_data
from kdcache.stages.data_digits import PARTS


def test_an_item_is_a_scaled_image_and_its_digit() -> None:
    x, label = load_data("digits:train").dataset[0]
    assert x.shape == (1, 8, 8)
    assert x.dtype == torch.float32
    assert x.min() == 0
    assert x.max() <= 1
    assert label == 0


def test_the_whole_range_of_pixels_becomes_zero_to_one() -> None:
    dataset = load_data("digits:train").dataset
    pixels = torch.stack([dataset[index][0] for index in range(200)])
    assert pixels.max() == 1


def test_train_and_test_share_no_id_and_cover_the_file() -> None:
    train, test = load_data("digits:train").sample_ids, load_data("digits:test").sample_ids
    assert train is not None
    assert test is not None
    assert np.array_equal(np.concatenate([train, test]), np.arange(1797))


def test_the_blocks_of_the_demo_are_disjoint_and_the_test_rows_are_the_end() -> None:
    blocks = [PARTS["teacher"], PARTS["transfer"], PARTS["test"]]
    assert [stop for _, stop in blocks[:-1]] == [start for start, _ in blocks[1:]]
    assert (blocks[0][0], blocks[-1][1]) == (0, 1797)
    assert PARTS["train"] == (PARTS["teacher"][0], PARTS["transfer"][1])


def test_the_parts_have_different_fingerprints_and_ten_classes() -> None:
    loaded = [load_data(f"digits:{part}") for part in PARTS]
    assert len({data.provenance["fingerprint"] for data in loaded}) == len(PARTS)
    assert all(data.num_classes == 10 and data.classes == tuple("0123456789") for data in loaded)


def test_another_part_is_a_usage_error_that_lists_the_parts() -> None:
    with pytest.raises(UsageError, match="train, test"):
        load_data("digits:validation")


def test_the_readme_states_the_hash_of_the_file() -> None:
    with kdcache_data.path("digits.npz") as path:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    readme = Path(kdcache_data.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert re.search(rf"of `digits.npz`: `{digest}`", readme)


def test_a_file_that_does_not_ship_is_a_key_error_that_lists_what_does() -> None:
    with pytest.raises(KeyError, match=r"digits\.npz"):
        kdcache_data.path("letters.npz")


@pytest.mark.interop("sklearn")
def test_the_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    published = load_digits()
    with kdcache_data.path("digits.npz") as path, np.load(path) as ours:
        assert np.array_equal(ours["x"], published.images)
        assert np.array_equal(ours["y"], published.target)
