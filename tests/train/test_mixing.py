from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kdcache.errors import DataError, UsageError
from kdcache.train.mixing import Mix, MixDraw

DRAWS = 4000


def drawn(mix: Mix, samples: int) -> list[MixDraw]:
    return [mix.draw(3, sample, view, samples) for sample in range(DRAWS // 4) for view in range(4)]


def test_a_draw_is_a_function_of_seed_id_and_view() -> None:
    mix = Mix("mixup", 0.2)
    assert mix.draw(3, 7, 1, 100) == mix.draw(3, 7, 1, 100)
    others = [mix.draw(4, 7, 1, 100), mix.draw(3, 8, 1, 100), mix.draw(3, 7, 2, 100), mix.draw(3, b"7", 1, 100)]
    assert len({draw.ratio for draw in (mix.draw(3, 7, 1, 100), *others)}) == 5


def test_draws_leave_the_global_generator_alone() -> None:
    before = np.random.get_state(legacy=False)["state"]["key"].tolist()
    Mix("cutmix", 1.0).draw(0, 0, 0, 10)
    assert np.random.get_state(legacy=False)["state"]["key"].tolist() == before


def test_partners_are_uniform_over_the_cache() -> None:
    counts = np.bincount([draw.partner for draw in drawn(Mix("mixup", 1.0), 20)], minlength=20)
    assert len(counts) == 20
    # chi-square of 19 degrees of freedom: mean 19, standard deviation 6.2.
    assert float(((counts - 200) ** 2 / 200).sum()) < 19 + 5 * 6.2
    assert {Mix("mixup", 1.0).draw(0, n, 0, 1).partner for n in range(50)} == {0}


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_ratios_have_the_mean_and_variance_of_the_beta_distribution(alpha: float) -> None:
    ratios = np.array([draw.ratio for draw in drawn(Mix("mixup", alpha), 10)])
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(ratios.mean() - 0.5) < 5 * np.sqrt(variance / DRAWS)
    # The variance of a sample variance is at most that of a two-point distribution's fourth moment, 1/16 / n.
    assert abs(ratios.var() - variance) < 5 * 0.25 / np.sqrt(DRAWS)
    assert ((ratios >= 0) & (ratios <= 1)).all()


def test_places_are_uniform_and_independent_of_the_rest() -> None:
    table = np.array([[draw.y, draw.x, draw.ratio, draw.partner] for draw in drawn(Mix("cutmix", 1.0), 1000)])
    assert np.abs(table[:, :2].mean(0) - 0.5).max() < 5 * 0.289 / np.sqrt(DRAWS)
    assert np.abs(np.corrcoef(table.T) - np.eye(4)).max() < 5 / np.sqrt(DRAWS)


def test_a_mixup_is_the_weighted_sum_and_its_ratio() -> None:
    first, second = torch.rand(3, 4, 5), torch.rand(3, 4, 5)
    mixed, ratio = Mix("mixup", 0.2)(first, second, MixDraw(0, 0.3, 0, 0))
    assert ratio == 0.3
    torch.testing.assert_close(mixed, 0.3 * first + 0.7 * second)
    small = torch.tensor([[10, 20]], dtype=torch.uint8), torch.tensor([[20, 25]], dtype=torch.uint8)
    mixed, _ = Mix("mixup", 0.2)(*small, MixDraw(0, 0.5, 0, 0))
    assert mixed.dtype == torch.uint8
    assert mixed.tolist() == [[15, 22]]  # 22.5 to even
    arrays = [part.numpy() for part in small]
    assert Mix("mixup", 0.2)(*arrays, MixDraw(0, 0.5, 0, 0))[0].tolist() == [[15, 22]]


@pytest.mark.parametrize("side", [1, 2, 7, 32])
def test_the_ratio_of_a_cutmix_is_the_share_of_pixels_that_are_left_exactly(side: int) -> None:
    mix = Mix("cutmix", 1.0)
    first, second = torch.zeros(2, side, side + 3), torch.ones(2, side, side + 3)
    for view in range(200):
        mixed, ratio = mix(first, second, mix.draw(0, 0, view, 9))
        assert ratio == 1.0 - int(mixed[0].sum()) / (side * (side + 3))
        box = mixed[0].nonzero()
        if len(box):
            low, high = box.min(0).values, box.max(0).values
            assert int((high - low + 1).prod()) == len(box)
            assert torch.equal(mixed[0], mixed[1])
    assert not first.any()


def test_the_box_of_a_cutmix_is_that_of_arrays_of_images_too() -> None:
    mix, draw = Mix("cutmix", 1.0), MixDraw(0, 0.5, 0.3, 0.9)
    first, second = torch.zeros(3, 8, 9), torch.ones(3, 8, 9)
    as_tensor, ratio = mix(first, second, draw)
    as_array, other = mix(first.permute(1, 2, 0).numpy(), second.permute(1, 2, 0).numpy(), draw)
    assert ratio == other
    assert (as_array.transpose(2, 0, 1) == as_tensor.numpy()).all()


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_the_ends_are_one_of_the_two(ratio: float) -> None:
    first, second = torch.rand(1, 6, 6), torch.rand(1, 6, 6)
    for kind in ("mixup", "cutmix"):
        mixed, share = Mix(kind, 1.0)(first, second, MixDraw(0, ratio, 0.99, 0.99))  # type: ignore[arg-type]
        assert torch.equal(mixed, first if ratio else second)
        assert share == ratio


@pytest.mark.parametrize(
    ("kind", "first", "second", "message"),
    [
        ("mixup", "a picture", "another", "mix tensors and arrays, found a str"),
        ("mixup", torch.zeros(2, 2), torch.zeros(2, 3), r"float32 \(2, 2\) and torch.float32 \(2, 3\); crop or resize"),
        ("cutmix", torch.zeros(2, 2), torch.zeros(2, 2).int(), r"equal shape and dtype, found torch.float32"),
        ("cutmix", torch.zeros(5), torch.zeros(5), r"CutMix needs images, found a view of shape \(5,\); use mixup"),
    ],
)
def test_views_that_cannot_be_mixed_are_refused(kind: Any, first: Any, second: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Mix(kind, 1.0)(first, second, MixDraw(0, 0.5, 0, 0))


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_an_alpha_that_cannot_be_meant_is_refused(alpha: float) -> None:
    with pytest.raises(UsageError, match="with a above 0"):
        Mix("mixup", alpha)
