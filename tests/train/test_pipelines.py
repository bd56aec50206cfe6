from __future__ import annotations

import builtins
import pickle
from typing import Any

import pytest
import torch

from kdcache.errors import DataError, MissingExtraError, UsageError
from kdcache.train.pipelines import canonical, named
from kdcache.train.replay import check_replay
from kdcache.train.tensor_transforms import Erase, Noise, Shift

IMAGE = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.1


def views(text: str, count: int, image: torch.Tensor = IMAGE) -> torch.Tensor:
    """(count, ...): views 0 to count - 1 of sample 0."""
    return torch.stack(named(text).each([image] * count, [0] * count, list(range(count))))


def test_a_shift_moves_by_each_offset_as_often_and_fills_with_zeros() -> None:
    padded = torch.nn.functional.pad(IMAGE, (2, 2, 2, 2))
    crops = {(y, x): padded[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)}
    found = dict.fromkeys(crops, 0)
    for view in views("shift", 1000):
        (place,) = [place for place, crop in crops.items() if torch.equal(view, crop)]
        found[place] += 1
    # 40 of each are expected, with a standard deviation of 6.2.
    assert max(abs(count - 40) for count in found.values()) < 5 * 6.2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16, torch.bool])
def test_a_shift_keeps_every_dtype(dtype: torch.dtype) -> None:
    view = Shift(3)((IMAGE * 50).to(dtype))
    assert view.dtype == dtype
    assert view.shape == IMAGE.shape


def test_a_shift_beyond_the_image_leaves_zeros() -> None:
    found = views("shift100", 50, torch.ones(1, 3, 3))
    assert {float(view.sum()) for view in found} <= {0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 9.0}
    assert (found == 0).flatten(1).all(1).any()


def test_noise_is_gaussian_of_the_standard_deviation_asked_for() -> None:
    difference = views("noise0.3", 100) - IMAGE
    # 19,200 numbers: standard deviations of 0.3 / sqrt(19200) = 0.0022 (mean) and 0.0015 (standard deviation).
    assert abs(float(difference.mean())) < 5 * 0.0022
    assert abs(float(difference.std()) - 0.3) < 5 * 0.0015
    assert abs(float((difference.abs() < 0.3).float().mean()) - 0.683) < 5 * 0.0034
    assert Noise(0.1)(IMAGE.double()).dtype == torch.float64


def test_erase_sets_one_box_to_zero_and_touches_nothing_else() -> None:
    for view in views("erase", 200):
        gone = (view == 0).all(0)
        assert torch.equal(view[:, ~gone], IMAGE[:, ~gone])
        rows, columns = gone.any(1).nonzero()[:, 0], gone.any(0).nonzero()[:, 0]
        assert 1 <= len(rows) <= 4
        assert 1 <= len(columns) <= 4
        assert gone.sum() == len(rows) * len(columns) == (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    assert Erase(1.0)(IMAGE.to(torch.uint8)).dtype == torch.uint8


def test_transforms_leave_their_input_alone() -> None:
    before = IMAGE.clone()
    views("shift3,erase,noise", 20)
    assert torch.equal(IMAGE, before)


def test_parts_are_applied_in_order() -> None:
    both = named("noise0.5,erase")(IMAGE, 0, 0)
    assert (both == 0).any()
    assert not (named("erase,noise0.5")(IMAGE, 0, 0) == 0).any()


@pytest.mark.parametrize("text", ["shift", "shift2,noise0.1,erase0.4", "noise", "erase", "mixup", "shift,cutmix"])
def test_pipelines_are_replayed_and_pickle(text: str) -> None:
    replay = named(text, seed=3)
    check_replay(replay, [(IMAGE, 0), (IMAGE * 2, 1)], [0, 1, 2])
    copy = pickle.loads(pickle.dumps(replay))
    assert copy.describe() == replay.describe()
    assert torch.equal(copy(IMAGE, 5, 1), replay(IMAGE, 5, 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no part is called ''"),
        ("shift,", "no part is called ''"),
        ("blur", "no part is called 'blur'; there are crop, hflip, rrc, randaug, shift, noise, erase, mixup, cutmix"),
        ("shift-2", "no part is called 'shift-2'"),
        ("os:system", r"no part is called 'os:system'.* module:factory"),
        ("hflip2", r"hflip takes no number, found 'hflip2'"),
        ("shift1.5", r"shift takes a whole number, found 1\.5"),
        ("shift0", "shift takes a number from 1 to 4096, found 0"),
        ("erase2", "erase takes a number from 0 to 1, found 2"),
        ("crop9999", "crop takes a number from 1 to 1024, found 9999"),
        ("randaug31", "randaug takes a number from 0 to 30"),
        ("noise" + "9" * 400, "noise takes a number from 0 to 1e"),
        ("shift" + "9" * 400, "shift takes a whole number"),
        ("mixup0", r"mixup draws its ratio from Beta\(a, a\) with a above 0, found 0"),
        ("cutmix" + "9" * 400, r"cutmix takes a number from 0 to 1e\+06, found 9{20}$"),
        ("mixup,shift", "mixup mixes finished views, so it must be the last part"),
        ("mixup,cutmix", "mixup mixes finished views"),
        ("shift\u0663", "no part is called"),
    ],
)
def test_texts_that_cannot_be_meant_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        named(text)


def test_equal_pipelines_have_one_canonical_text() -> None:
    assert canonical("crop,  hflip,rrc,randaug") == "crop4,hflip,rrc,randaug9"
    assert canonical("shift2.0,noise,erase0.50,cutmix") == "shift2,noise0.1,erase0.5,cutmix1"
    assert canonical("rrc32") == "rrc32"


@pytest.mark.parametrize("text", ["crop", "hflip", "rrc", "rrc32", "randaug"])
def test_a_missing_torchvision_is_named_with_its_extra(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchvision"):
            raise ModuleNotFoundError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"install .kdcache\[vision\]"):
        named(text)
    named("shift")


def test_a_torchvision_of_another_build_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def broken(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("torchvision"):
            raise RuntimeError("operator torchvision::nms does not exist")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", broken)
    with pytest.raises(MissingExtraError, match=r"does not fit torch .*nms does not exist"):
        named("hflip")


@pytest.mark.parametrize(
    ("text", "value", "message"),
    [
        (
            "shift",
            torch.zeros(8),
            r"shift needs a tensor .*height, width\), found torch\.float32 of shape \(8,\)",
        ),
        ("erase", [[1.0]], "erase needs a tensor .*, found a list"),
        ("noise", torch.zeros(2, 2, dtype=torch.uint8), r"noise needs a tensor of floating point, found torch\.uint8"),
    ],
)
def test_inputs_that_do_not_fit_are_named(text: str, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        named(text)(value, 0, 0)


COLOUR = torch.randint(0, 256, (3, 12, 10), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


@pytest.mark.interop("torchvision")
@pytest.mark.parametrize("text", ["crop", "crop2,hflip", "rrc", "rrc6", "randaug", "rrc,hflip,randaug14,cutmix"])
def test_torchvision_pipelines_are_replayed_on_tensors_and_images(text: str) -> None:
    from PIL import Image

    replay = named(text, seed=3)
    image = Image.fromarray(COLOUR.permute(1, 2, 0).numpy())
    for value in (COLOUR, COLOUR.float() / 255, image):
        check_replay(replay, [(value, 0), (value, 1)], [0, 1, 2])
        view = replay(value, 0, 0)
        assert type(view) is type(value)
        if isinstance(value, torch.Tensor):
            assert view.dtype == value.dtype
            assert tuple(view.shape[-2:]) == ((6, 6) if text == "rrc6" else (12, 10))
    assert {"torchvision", "PIL"} <= set(replay.describe()["versions"])


@pytest.mark.interop("torchvision")
def test_a_crop_is_a_window_of_the_zero_padded_image_and_a_flip_is_a_flip() -> None:
    padded = torch.nn.functional.pad(COLOUR, (4, 4, 4, 4))
    windows = {padded[:, y : y + 12, x : x + 10].numpy().tobytes() for y in range(9) for x in range(9)}
    assert {view.numpy().tobytes() for view in views("crop", 50, COLOUR)} <= windows
    flips = [torch.equal(view, COLOUR.flip(-1)) for view in views("hflip", 400, COLOUR)]
    assert abs(sum(flips) - 200) < 5 * 10
