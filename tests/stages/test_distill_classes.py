"""Training with --classes: teachers whose classes are not the student's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import kdcache
from kdcache.errors import MismatchError, UsageError
from kdcache.stages.calibration_file import StoredCalibration, save_calibration
from kdcache.stages.data import load_data
from kdcache.stages.distill import distill
from kdcache.stages.distill_options import DistillOptions
from kdcache.train.calibrated import Calibration
from kdcache.train.class_map import ClassMap

NAMES = tuple(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])
OPTIONS = DistillOptions(epochs=2, batch_size=64, device="cpu", quiet=True, seed=3, temperature=4.0)
ORDER = np.random.default_rng(7).permutation(10)  # the teacher's class n is the digit ORDER[n]


class Named(TensorDataset):
    """Digits with the names of their classes."""

    classes = NAMES


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> dict[str, Named]:
    found = {}
    for part in ("train", "test"):
        data = load_data(f"digits:{part}").dataset
        x, y = zip(*(data[at] for at in range(len(data))), strict=True)  # type: ignore[arg-type]
        found[part] = Named(torch.stack(x).flatten(1), torch.tensor(y))
    return found


@pytest.fixture(scope="module")
def teacher(digits: dict[str, Named]) -> nn.Module:
    """A linear teacher of the ten digits."""
    torch.manual_seed(0)
    net = nn.Linear(64, 10)
    x, y = digits["train"].tensors
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net.requires_grad_(requires_grad=False)


def cache_of(path: Path, logits: Tensor, labels: Tensor, classes: Any, **options: Any) -> Path:
    with kdcache.Writer(path, classes=classes, **options) as writer:
        writer.write(np.arange(len(logits)), logits.numpy(), labels.numpy())
    return path


def map_file(path: Path, student: list[str], pairs: dict[str, Any]) -> str:
    path.write_text(json.dumps({"student": student, "map": pairs}))
    return str(path)


def ran(digits: dict[str, Named], caches: tuple[Path, Path], *, width: int = 10, **changed: Any) -> Any:
    torch.manual_seed(4)
    student = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, width))
    cache, val_cache = caches
    options = replace(OPTIONS, **changed)
    return distill(
        options, student=student, data=digits["train"], val=digits["test"], cache=str(cache), val_cache=str(val_cache)
    )


def weights(result: Any) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in result.student.parameters()])


def both(folder: Path, digits: dict[str, Named], logits: Any, labels: Any, classes: Any, **options: Any) -> Any:
    """Caches of training and test data; `logits` and `labels` are functions of the images and of the labels."""
    folder.mkdir()
    return tuple(
        cache_of(folder / part, logits(x), labels(y), classes, **options)
        for part, (x, y) in ((part, data.tensors) for part, data in digits.items())
    )


@pytest.fixture(scope="module")
def permuted(
    tmp_path_factory: pytest.TempPathFactory, digits: dict[str, Named], teacher: nn.Module
) -> dict[str, tuple[tuple[Path, Path], tuple[Path, Path]]]:
    """By encoding, the caches of the teacher, and of the same teacher with its classes in another order."""
    folder, inverse = tmp_path_factory.mktemp("permuted"), torch.from_numpy(np.argsort(ORDER))
    other = [NAMES[n] for n in ORDER]
    return {
        name: (
            both(folder / f"plain-{name}", digits, teacher, lambda y: y, NAMES, **given),
            both(folder / name, digits, lambda x: teacher(x)[:, ORDER], lambda y: inverse[y], other, **given),
        )
        for name, given in (("dense", {"dtype": "float16"}), ("topk", {"top_k": 4}))
    }


@pytest.mark.parametrize(
    ("encoding", "changed"),
    [
        ("dense", {}),
        ("topk", {}),
        ("topk", {"loss": ("kl", "js*0.5")}),
        ("dense", {"hard_targets": True}),
        ("dense", {"disagreement": "downweight", "confidence_below": 0.5}),
    ],
    ids=["dense", "topk", "losses", "hard", "policies"],
)
def test_a_permuted_teacher_gives_the_student_of_the_unpermuted_one_bit_for_bit(
    digits: dict[str, Named], permuted: Any, encoding: str, changed: dict[str, Any]
) -> None:
    plain, mixed = permuted[encoding]
    expected, found = ran(digits, plain, **changed), ran(digits, mixed, classes="names", **changed)
    assert torch.equal(weights(found), weights(expected))
    assert found.last == expected.last
    assert found.last["val_accuracy"] > 0.65
    nameless = {part: TensorDataset(*data.tensors) for part, data in digits.items()}
    with pytest.raises(MismatchError, match="label"):  # without map and names the guard of labels speaks up
        ran(nameless, mixed, **changed)


def test_ten_digits_merge_into_even_and_odd(tmp_path: Path, digits: dict[str, Named], teacher: nn.Module) -> None:
    parity = {part: TensorDataset(data.tensors[0], data.tensors[1] % 2) for part, data in digits.items()}
    caches = both(tmp_path / "ten", digits, teacher, lambda y: y, NAMES, dtype="float32")
    given = map_file(tmp_path / "map.json", ["even", "odd"], {name: n % 2 for n, name in enumerate(NAMES)})
    found = ran(parity, caches, width=2, classes=given, out=str(tmp_path / "run"))
    classes = ClassMap(tuple(n % 2 for n in range(10)), 2)
    merged = both(
        tmp_path / "two",
        digits,
        lambda x: classes.logits(teacher(x)),
        lambda y: y % 2,
        ["even", "odd"],
        dtype="float32",
    )
    expected = ran(parity, merged, width=2)
    assert torch.equal(weights(found), weights(expected))
    assert found.last == expected.last
    assert found.last["val_accuracy"] > 0.7
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["classes"]["merged"] == {"even": 5, "odd": 5}
    assert record["classes"]["map"] == "map.json"
    assert len(record["classes"]["sha256"]) == 64
    assert "novel_rows" not in record


def test_classes_of_the_teacher_may_be_left_out(tmp_path: Path, digits: dict[str, Named], teacher: nn.Module) -> None:
    small = {
        part: TensorDataset(data.tensors[0], torch.where(data.tensors[1] < 7, data.tensors[1], -1))
        for part, data in digits.items()
    }
    caches = both(tmp_path / "ten", digits, teacher, lambda y: y, NAMES, dtype="float32")
    pairs = {str(n): (n if n < 7 else None) for n in range(10)}
    given = map_file(tmp_path / "map.json", list(NAMES[:7]), pairs)
    found = ran(small, caches, width=7, classes=given)
    seven = both(tmp_path / "seven", small, lambda x: teacher(x)[:, :7], lambda y: y, NAMES[:7], dtype="float32")
    expected = ran(small, seven, width=7)
    assert torch.equal(weights(found), weights(expected))
    assert found.last == expected.last


def known_caches(folder: Path, digits: dict[str, Named], teacher: nn.Module, **options: Any) -> tuple[Path, Path]:
    """Of a teacher that knows the digits below 7, in reverse; rows of the others have no stored label."""
    return both(
        folder,
        digits,
        lambda x: teacher(x)[:, [6, 5, 4, 3, 2, 1, 0]],
        lambda y: torch.where(y < 7, 6 - y, -1),
        [NAMES[n] for n in range(6, -1, -1)],
        **options,
    )


@pytest.mark.parametrize("novel", ["restricted", "bucket"])
def test_novel_classes_learn_from_their_labels_and_the_others_from_the_teacher(
    tmp_path: Path, digits: dict[str, Named], teacher: nn.Module, novel: str, capsys: pytest.CaptureFixture[str]
) -> None:
    caches = known_caches(tmp_path / "seven", digits, teacher, dtype="float32")
    out = tmp_path / "run"
    found = ran(digits, caches, classes="names", novel=novel, out=str(out), epochs=6, quiet=False)
    assert "3 of the student's novel" in capsys.readouterr().err
    record = json.loads((out / "run.json").read_text())
    assert record["classes"]["novel"] == ["seven", "eight", "nine"]
    assert record["classes"]["novel_rule"] == novel
    of_novel = int((digits["train"].tensors[1] >= 7).sum())
    assert record["novel_rows"] == [of_novel] * 6
    x, y = digits["test"].tensors
    predicted = found.student(x).argmax(dim=1)
    assert (predicted[y >= 7] == y[y >= 7]).float().mean() > 0.6
    # Agreement is over the rows that the teacher knows, in the student's numbers, and with a softmax over the classes
    # that it knows over these: how much mass novel ones get is not the teacher's.
    among = found.student(x)[:, :7].argmax(dim=1) if novel == "restricted" else predicted
    same = among == 6 - teacher(x)[:, [6, 5, 4, 3, 2, 1, 0]].argmax(dim=1)
    assert found.last["agreement"] == pytest.approx(same[y < 7].float().mean().item(), abs=1e-6)
    assert record["measures"]["val"]["agreement"] == pytest.approx(found.last["agreement"], abs=1e-6)
    if novel == "restricted":
        p = torch.log_softmax(teacher(x)[y < 7][:, :7], dim=1)
        q = torch.log_softmax(found.student(x)[y < 7][:, :7], dim=1)
        kl = (p.exp() * (p - q)).sum(dim=1).mean()
        assert found.last["teacher_kl"] == pytest.approx(kl.item(), rel=1e-3)


def test_topk_rows_serve_novel_classes_and_agree_with_dense_ones(
    tmp_path: Path, digits: dict[str, Named], teacher: nn.Module
) -> None:
    dense = known_caches(tmp_path / "dense", digits, teacher)
    topk = known_caches(tmp_path / "topk", digits, teacher, top_k=6)  # one class in the tail, which is then exact
    expected, found = ran(digits, dense, classes="names"), ran(digits, topk, classes="names")
    torch.testing.assert_close(weights(found), weights(expected), rtol=5e-3, atol=2e-3)
    with pytest.raises(UsageError, match="--novel bucket needs"):
        ran(digits, topk, classes="names", novel="bucket")
    pairs: dict[str, Any] = {name: name for name in NAMES[:7]}
    for other in ({"six": None}, {"six": "five"}):
        given = map_file(tmp_path / "map.json", list(NAMES), {**pairs, **other})
        with pytest.raises(MismatchError, match=r"rows of train .* among their 6 largest"):
            ran(digits, topk, classes=given)


def test_labels_are_compared_through_the_map_where_the_teacher_has_their_class(
    tmp_path: Path, digits: dict[str, Named], teacher: nn.Module
) -> None:
    caches = known_caches(tmp_path / "seven", digits, teacher)
    x, y = digits["train"].tensors
    for digit, is_seen in ((3, True), (8, False)):
        changed = y.clone()
        changed[(y == digit).nonzero()[0]] = 9 if digit == 8 else 4
        data = {**digits, "train": Named(x, changed)}
        if is_seen:
            with pytest.raises(
                MismatchError, match=r"has the label 4 in the data set and 3 in train \(3 there, before the"
            ):
                ran(data, caches, classes="names", epochs=1)
        else:
            assert ran(data, caches, classes="names", epochs=1).steps == 21


def test_numbers_of_classes_that_differ_name_the_option_for_it(
    tmp_path: Path, digits: dict[str, Named], teacher: nn.Module
) -> None:
    """The width of the student cannot mend it, so that no other width is advised."""
    seven = both(tmp_path / "seven", digits, lambda x: teacher(x)[:, :7], lambda y: y.where(y < 7, -1), NAMES[:7])
    parity = Named(digits["train"].tensors[0], digits["train"].tensors[1] % 2)
    parity.classes = ("even", "odd")
    ten = both(tmp_path / "ten", digits, teacher, lambda y: y, NAMES)
    for data, cache, counts, advice in (
        (digits["train"], seven[0], (10, 7), "--classes names, or --classes MAP.json"),
        (parity, ten[0], (2, 10), "which is which with --classes MAP.json"),
    ):
        for width in counts:
            options = replace(OPTIONS, student=f"mlp:64-8-{width}")
            with pytest.raises(MismatchError, match=f"data has {counts[0]} classes, .* has {counts[1]}: .*{advice}"):
                distill(options, data=data, cache=cache)


def test_labels_beyond_the_classes_of_the_map_are_refused_before_the_first_step(
    tmp_path: Path, digits: dict[str, Named], teacher: nn.Module
) -> None:
    cache = both(tmp_path / "ten", digits, teacher, lambda y: y, NAMES)[0]
    given = map_file(tmp_path / "map.json", list("abcdefghi"), {name: min(n, 8) for n, name in enumerate(NAMES)})
    options = replace(OPTIONS, student="mlp:64-8-9", classes=given, out=str(tmp_path / "run"))
    plain = TensorDataset(*digits["train"].tensors)
    with pytest.raises(MismatchError, match=r"`student` has 9 classes, and the training data has the label 9"):
        distill(options, data=plain, cache=cache)
    assert not (tmp_path / "run").exists()


def test_the_same_names_in_another_order_are_refused_without_a_map(tmp_path: Path) -> None:
    """Rows without labels have nothing else that would tell."""
    data = TensorDataset(torch.zeros(8, 2), torch.zeros(8, dtype=torch.int64))
    data.classes = ["cat", "dog", "eel"]  # type: ignore[attr-defined]
    options = DistillOptions(student="mlp:2-3", epochs=1, device="cpu", quiet=True)
    for number, names in enumerate((["cat", "dog", "eel"], ["tabby", "dog", "eel"], ["cat", "eel", "dog"])):
        with kdcache.Writer(tmp_path / str(number), classes=names) as writer:
            writer.write(np.arange(8), np.zeros((8, 3), np.float32))
    for fits in ("0", "1"):
        kdcache.distill(options, data=data, cache=tmp_path / fits)
    with pytest.raises(MismatchError, match=r"2 has the class 'dog' under the number 2, .*--classes names"):
        kdcache.distill(options, data=data, cache=tmp_path / "2")
    kdcache.distill(replace(options, classes="names"), data=data, cache=tmp_path / "2")


def test_the_calibration_comes_before_the_map(tmp_path: Path, digits: dict[str, Named], teacher: nn.Module) -> None:
    parity = {part: TensorDataset(data.tensors[0], data.tensors[1] % 2) for part, data in digits.items()}
    given = map_file(tmp_path / "map.json", ["even", "odd"], {str(n): n % 2 for n in range(10)})
    raw = both(tmp_path / "raw", digits, teacher, lambda y: y, 10, dtype="float32")
    made = both(tmp_path / "made", digits, lambda x: teacher(x) / 2.5, lambda y: y, 10, dtype="float32")
    with kdcache.open(raw[0]) as opened:
        stored = StoredCalibration(Calibration(2.5), opened.root, "temperature", {}, {}, {})
    path = tmp_path / "c.json"
    save_calibration(path, stored, overwrite=False)
    found = ran(parity, raw, width=2, classes=given, calibration=(str(path),))
    assert torch.equal(weights(found), weights(ran(parity, made, width=2, classes=given)))


def test_a_run_goes_on_with_the_same_map_only_whatever_the_file_is_called(
    tmp_path: Path, digits: dict[str, Named], teacher: nn.Module
) -> None:
    caches = known_caches(tmp_path / "seven", digits, teacher)
    pairs: dict[str, Any] = {name: name for name in NAMES[:7]}
    given = map_file(tmp_path / "map.json", list(NAMES), pairs)
    out = str(tmp_path / "run")
    first = ran(digits, caches, classes=given, out=out)
    moved = map_file(tmp_path / "moved.json", list(NAMES), dict(reversed(pairs.items())))
    assert ran(digits, caches, classes=moved, out=out, resume=True).steps == first.steps
    assert str(tmp_path) not in (tmp_path / "run" / "run.json").read_text()
    other = map_file(tmp_path / "other.json", list(NAMES), {**pairs, "one": "two", "two": "one"})
    with pytest.raises(MismatchError, match="has classes = "):
        ran(digits, caches, classes=other, out=out, resume=True)
    with pytest.raises(MismatchError, match="has novel = "):
        ran(digits, caches, classes=given, out=out, resume=True, novel="bucket")


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ({"six": 0}, MismatchError, "6 of the 7 classes of train are not in the map: 'five'"),
        ({"six": 0, "0": 1}, UsageError, "class 0 of the teacher is in the map twice"),
        ({"lamp": 0}, MismatchError, "'lamp' is none of the 7 classes"),
        ({"7": 0}, MismatchError, "'7' is none of the 7 classes"),
        ({"six": ["five", "six"]}, UsageError, "given 2 classes of the student"),
        ({"six": "lamp"}, UsageError, "'lamp', which is none of the 10"),
        ({"six": 10}, UsageError, "10, which is none"),
        ({"six": True}, UsageError, "True, which is none"),
        ({name: None for name in NAMES[:7]}, UsageError, "share 0 class"),
    ],
)
def test_maps_that_cannot_be_meant_are_refused(
    tmp_path: Path,
    digits: dict[str, Named],
    teacher: nn.Module,
    pairs: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    caches = known_caches(tmp_path / "seven", digits, teacher)
    with pytest.raises(error, match=message):
        ran(digits, caches, classes=map_file(tmp_path / "map.json", list(NAMES), pairs))


def test_files_options_and_classes_that_do_not_fit_are_refused(
    tmp_path: Path, digits: dict[str, Named], teacher: nn.Module
) -> None:
    caches = known_caches(tmp_path / "seven", digits, teacher)
    unnamed = both(tmp_path / "unnamed", digits, teacher, lambda y: y, 10)
    pairs: dict[str, Any] = {name: name for name in NAMES[:7]}
    bad = tmp_path / "bad.json"
    for text, message in (
        ("{", "not JSON|Expecting|JSON"),
        ('{"map": {}}', "its keys"),
        ('{"student": [], "map": {}}', "`student`"),
    ):
        bad.write_text(text)
        with pytest.raises(UsageError, match=message):
            ran(digits, caches, classes=str(bad))
    with pytest.raises(UsageError, match="no file"):
        ran(digits, caches, classes=str(tmp_path / "none.json"))
    with pytest.raises(UsageError, match="more than once"):
        ran(digits, caches, classes=map_file(bad, [*NAMES, "one"], pairs))
    with pytest.raises(MismatchError, match="not the classes of the training data"):
        ran(digits, caches, classes=map_file(bad, [*reversed(NAMES)], pairs))
    with pytest.raises(UsageError, match="has no class names"):
        ran(digits, unnamed, classes="names")
    nameless = {part: TensorDataset(*data.tensors) for part, data in digits.items()}
    with pytest.raises(UsageError, match="the training data has no class names"):
        ran(nameless, caches, classes="names")
    with pytest.raises(MismatchError, match="the student has 9 classes, by --classes names it has 10"):
        ran(digits, caches, classes="names", width=9)
    with pytest.raises(MismatchError, match="match them by name with --classes names"):
        ran(digits, caches)
    with pytest.raises(MismatchError, match="say with --classes"):
        ran(nameless, caches)
    with pytest.raises(MismatchError, match="--val-cache"):
        ran(digits, (caches[0], unnamed[1]), classes="names")
    with pytest.raises(UsageError, match="from which js is infinite"):
        ran(digits, caches, classes="names", novel="bucket", loss=("js",))
    with pytest.raises(UsageError, match="--novel is about"):
        ran(digits, caches, novel="bucket")
    with pytest.raises(UsageError, match="give --cache"):
        distill(replace(OPTIONS, alpha=0.0, student="mlp:64-10", classes="names"), data=digits["train"])
