"""A view is a function of (seed, sample id, view) alone, and drawing it leaves no trace."""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import kdcache
from kdcache.errors import DataError, MismatchError, UsageError
from kdcache.train.pipelines import Chain, named
from kdcache.train.replay import Replay, check_alike, check_replay, seeded
from kdcache.train.views import replayable

IMAGE = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(0))


def from_torch(value: torch.Tensor) -> torch.Tensor:
    return value + torch.rand(()) + torch.randn(()) + torch.randint(0, 9, ())


def from_numpy(value: torch.Tensor) -> torch.Tensor:
    return value + float(np.random.rand() + np.random.randn() + np.random.randint(9))


def from_random(value: torch.Tensor) -> torch.Tensor:
    return value + random.random() + random.gauss(0, 1) + random.randrange(9)


def with_rng(value: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    return value + float(rng.normal())


def with_generator(value: torch.Tensor, *, generator: torch.Generator) -> torch.Tensor:
    return value + torch.randn((), generator=generator)


DRAWING = [from_torch, from_numpy, from_random, with_rng, with_generator]


def states() -> tuple[Any, ...]:
    """All of the global generators, the half of a normal deviate that each of them keeps included."""
    numpy_state = np.random.get_state(legacy=False)
    key = tuple(numpy_state["state"]["key"].tolist())
    rest = (numpy_state["state"]["pos"], numpy_state["has_gauss"], numpy_state["gauss"])
    return torch.get_rng_state().tolist(), torch.initial_seed(), key, rest, random.getstate()


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    """Global generators in the middle of their work, with half a normal deviate kept; put back after the test."""
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    torch.randn(1), np.random.randn(), random.gauss(0, 1)
    yield
    torch.set_rng_state(before[0])
    np.random.set_state(before[1])
    random.setstate(before[2])


@pytest.mark.parametrize("transform", DRAWING)
def test_a_view_is_the_same_whatever_the_global_state_and_the_order(transform: Callable[..., Any]) -> None:
    replay = Replay(transform, seed=5, name="t")
    wanted = [(sample, view) for sample in (0, 7, -3) for view in (0, 1, 900)]
    found = {key: replay(IMAGE, *key) for key in wanted}
    torch.manual_seed(99)
    np.random.seed(98)
    random.seed(97)
    again = Replay(transform, seed=5, name="another name")
    for key in reversed(wanted):
        assert torch.equal(again(IMAGE, *key), found[key])
    together = replay.each([IMAGE] * len(wanted), *zip(*wanted, strict=True))
    assert all(torch.equal(one, found[key]) for one, key in zip(together, wanted, strict=True))


@pytest.mark.parametrize("transform", DRAWING)
def test_samples_views_and_seeds_draw_apart(transform: Callable[..., Any]) -> None:
    keys = itertools.product((0, 1), (4, 5, b"5"), (0, 1, 2))
    found = {float(Replay(transform, seed=seed, name="t")(torch.zeros(()), name, view)) for seed, name, view in keys}
    assert len(found) == 18


def test_the_draws_of_neighbours_and_of_the_generators_are_uncorrelated_and_of_the_distribution_asked_for() -> None:
    def uniform(value: Any) -> Any:
        return torch.tensor([torch.rand(()), np.random.rand(), random.random()])

    replay = Replay(uniform, seed=0, name="uniform")
    rows = torch.stack(replay.each([0] * 2000, [n // 4 for n in range(2000)], [n % 4 for n in range(2000)]))
    # 2,000 numbers: the mean's standard deviation is 0.289 / sqrt(2000) = 0.0065, a correlation's 1 / sqrt(2000).
    assert (rows.mean(0) - 0.5).abs().max() < 5 * 0.0065
    samples = rows[:, 0].reshape(500, 4)
    neighbours = np.corrcoef([samples[:-1, 0], samples[1:, 0], samples[1:, 1], rows[::4, 1][1:], rows[::4, 2][1:]])
    assert np.abs(neighbours - np.eye(5)).max() < 5 / np.sqrt(499)


@pytest.mark.parametrize("transform", DRAWING)
def test_the_callers_generators_are_left_as_they_were(transform: Callable[..., Any]) -> None:
    replay, before = Replay(transform, seed=5, name="t"), states()
    replay(IMAGE, 1, 2)
    replay.each([IMAGE] * 3, [1, 2, 3], [0, 0, 0])
    with seeded(b"k" * 32):
        torch.rand(1), np.random.rand(), random.random()
    assert states() == before


def test_they_are_left_as_they_were_by_a_transform_that_fails() -> None:
    def fail(value: Any) -> Any:
        torch.rand(1), np.random.rand(), random.random()
        raise ValueError("no such pixel")

    before = states()
    message = r"the view pipeline t failed on sample 'a' \(view 4\): ValueError: no such pixel\. .* a Tensor of .*8, 8"
    with pytest.raises(DataError, match=message):
        Replay(fail, seed=0, name="t")(IMAGE, b"a", 4)
    assert states() == before
    with pytest.raises(ZeroDivisionError), seeded(b"k" * 32):
        torch.rand(1 // 0)
    assert states() == before


def test_errors_of_kdcache_pass_as_they_are() -> None:
    def refuse(value: Any) -> Any:
        raise MismatchError("another image")

    with pytest.raises(MismatchError, match=r"^another image$"):
        Replay(refuse, seed=0, name="t")(IMAGE, 0, 0)


def test_a_replay_pickles_with_all_that_decides_its_views() -> None:
    replay = Replay(from_torch, seed=5, name="t", mix=kdcache.views.Mix("mixup", 0.3))
    copy = pickle.loads(pickle.dumps(replay))
    assert copy.describe() == replay.describe()
    assert torch.equal(copy(IMAGE, 3, 1), replay(IMAGE, 3, 1))


def test_the_provenance_names_pipeline_seed_mix_and_versions() -> None:
    assert named("shift2,mixup0.4", seed=9).describe() == {
        "augment": "shift2,mixup0.4",
        "named": True,
        "seed": 9,
        "mix": "mixup0.4",
        "versions": {"torch": torch.__version__, "numpy": np.__version__, "kdcache": kdcache.__version__},
    }
    assert replayable(from_numpy).describe()["augment"].endswith(".from_numpy")
    assert replayable(Chain((from_numpy,))).describe()["augment"] == "Chain"  # its repr holds an address
    assert replayable(torch.nn.Dropout(0.25)).describe()["augment"] == "Dropout(p=0.25, inplace=False)"


@pytest.mark.parametrize("transform", [3, "crop", Replay(None, seed=0, name="t")])
def test_what_cannot_be_made_replayable_is_refused(transform: Any) -> None:
    with pytest.raises(UsageError, match=r"called with an input|replayed already"):
        replayable(transform)


class Counting:
    """A transform with a state of its own."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return value + self.calls


def hidden_numpy() -> Callable[[Any], Any]:
    rng = np.random.default_rng(0)
    return lambda value: value + float(rng.normal())


def hidden_torch() -> Callable[[Any], Any]:
    generator = torch.Generator().manual_seed(0)
    return lambda value: value + torch.randn((), generator=generator)


def unseeded(value: torch.Tensor) -> torch.Tensor:
    return value + float(np.random.default_rng().normal())


class Compose:
    """As torchvision's."""

    def __init__(self, *transforms: Any) -> None:
        self.transforms = list(transforms)

    def __call__(self, value: Any) -> Any:
        for transform in self.transforms:
            value = transform(value)
        return value


SAMPLES = [(IMAGE + n, n) for n in range(3)]


@pytest.mark.parametrize("make", [Counting, hidden_numpy, hidden_torch, lambda: unseeded])
def test_hidden_state_is_found_and_the_transform_named(make: Callable[[], Any]) -> None:
    transform = make()
    with pytest.raises(
        DataError, match=r"the transform mine is not replayed: view \d of sample \d came out differently"
    ):
        check_replay(Replay(transform, seed=0, name="mine"), SAMPLES, [0, 1])


@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_part_of_a_composition_that_has_it_is_named(place: int) -> None:
    parts: list[Any] = [from_torch, torch.nn.Flatten(0), from_random]
    parts[place] = Compose(torch.nn.Identity(), Counting())
    with pytest.raises(DataError, match=r"the transform Counting \(part of outer\) is not replayed"):
        check_replay(Replay(Compose(*parts), seed=0, name="outer"), SAMPLES, [0, 1])


def test_a_part_that_cannot_be_called_alone_leaves_the_whole_to_be_named() -> None:
    def pair(value: Any) -> Any:
        return value

    def tupled(one: Any, other: Any) -> Any:
        return one

    class Odd(Compose):
        def __call__(self, value: Any) -> Any:
            return self.transforms[2](self.transforms[1](value, value))

    with pytest.raises(DataError, match=r"the transform whole is not replayed"):
        check_replay(Replay(Odd(pair, tupled, Counting()), seed=0, name="whole"), SAMPLES, [0])


def test_steady_transforms_pass_the_check() -> None:
    for transform in (*DRAWING, None, Compose(from_torch, from_numpy)):
        check_replay(Replay(transform, seed=0, name="t"), SAMPLES, [0, 1])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (
            lambda x: x[..., : int(torch.randint(2, 7, ()))],
            r"a Tensor of .* shape \(1, 8, \d\) of sample 0 .view 0",
        ),
        (
            lambda x: x.double() if torch.rand(()) < 0.5 else x,
            r"torch\.float\d\d .* torch\.float\d\d .* one dtype",
        ),
        (lambda x: x.tolist(), r"makes a list of sample 0, and batches need tensors"),
    ],
)
def test_views_that_do_not_stack_to_batches_are_refused(transform: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_alike(Replay(transform, seed=0, name="t"), SAMPLES, [0, 1])
    check_alike(Replay(from_torch, seed=0, name="t"), SAMPLES, [0, 1])
