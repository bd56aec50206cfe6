"""`precompute --factored LAYER`: from a teacher to rows that decode, and the teachers that it does not fit."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import kdcache
from kdcache.errors import DataError, KDCacheError, LogitsError, MismatchError, UsageError
from kdcache.format.factored import Factored
from kdcache.format.known_heads import forget_heads
from kdcache.stages.dry_run import DryRun
from kdcache.stages.precompute import PrecomputeResult, precompute
from kdcache.stages.teachers import LoadedTeacher
from kdcache.stages.verify_teacher import verify_teacher
from kdcache.store.verify import verify
from kdcache.train.feature_losses import feature_mse

ROWS, INPUTS, WIDTH, CLASSES = 150, 12, 16, 200


@pytest.fixture(autouse=True)
def no_heads_stay() -> Iterator[None]:
    yield
    forget_heads()


class Classifier(nn.Module):
    """A body and a last layer, and what may stand between that layer and the output."""

    def __init__(self, behind: Any = None, *, seed: int = 0, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(INPUTS, WIDTH), nn.ReLU())
        self.classifier = nn.Linear(WIDTH, CLASSES, bias=bias)
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        logits = self.classifier(self.body(x))
        return logits if self.behind is None else self.behind(logits)


def inputs(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(1))


def data(rows: int = ROWS) -> TensorDataset:
    return TensorDataset(inputs(rows), torch.arange(rows) % CLASSES)


def dump(out: Path, model: Any = None, dataset: Any = None, **settings: Any) -> PrecomputeResult:
    settings = {"factored": "classifier", "shard_rows": 40, "batch_size": 16, "quiet": True, **settings}
    model = Classifier() if model is None else model
    result = precompute(model, data() if dataset is None else dataset, out, **settings)
    assert isinstance(result, PrecomputeResult)
    return result


def logits_of(model: nn.Module, rows: int = ROWS) -> np.ndarray:
    with torch.inference_mode():
        return model.eval()(inputs(rows)).numpy()


def decoded(path: Path, rows: int = ROWS) -> np.ndarray:
    with kdcache.open(path) as cache:
        return cache.gather(cache.rows(np.arange(rows))).dense()


@pytest.mark.parametrize("bias", [True, False])
def test_rows_decode_to_the_teachers_logits_within_the_bound(tmp_path: Path, bias: bool) -> None:
    model = Classifier(bias=bias)
    dump(tmp_path / "cache", model)
    with kdcache.open(tmp_path / "cache") as cache:
        rows = cache.gather(np.arange(ROWS))
        assert isinstance(cache.encoding, Factored)
        bound = cache.encoding.error_bound(rows.arrays)
        arithmetic = 1e-6 * np.abs(logits_of(model)).max()  # of the teacher's own float32
        assert (np.abs(rows.dense() - logits_of(model)) <= bound + arithmetic).all()
        assert np.abs(bound).max() < 0.02
        assert cache.catalog.schema.payload_row_bytes == 2 * WIDTH + 4
        assert np.array_equal(rows.tensors().dense().numpy().argmax(1), rows.dense().argmax(1))
        assert cache.provenance["layer"] == "classifier"
    assert verify(tmp_path / "cache").ok


def test_every_batch_layout_stores_the_same_head(tmp_path: Path) -> None:
    dump(tmp_path / "one")
    dump(tmp_path / "two", batch_size=16, shard_rows=64)
    assert (tmp_path / "one" / "head.h5").read_bytes() == (tmp_path / "two" / "head.h5").read_bytes()


def test_the_callers_teacher_keeps_no_hook_and_may_train_on(tmp_path: Path) -> None:
    model = Classifier()
    expected = logits_of(model)
    dump(tmp_path / "cache", model)
    assert not model.classifier._forward_hooks
    with torch.no_grad():
        model.classifier.weight.zero_()
    assert np.allclose(decoded(tmp_path / "cache"), expected, atol=0.01)


def test_bfloat16_rows_decode_better_than_the_teacher_computes(tmp_path: Path) -> None:
    dump(tmp_path / "cache", amp="bf16", device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        rough = Classifier()(inputs()).detach().float().numpy()
    assert np.abs(decoded(tmp_path / "cache") - rough).max() < 0.05


def test_another_layer_is_another_dump(tmp_path: Path) -> None:
    dump(tmp_path / "cache")
    with pytest.raises(MismatchError, match=r"encoding\.head .*last layer"):
        dump(tmp_path / "cache", Classifier(seed=1))
    with pytest.raises(MismatchError, match=r"encoding\.name .*--factored"):
        dump(tmp_path / "cache", factored=None)


def test_an_interrupted_dump_goes_on_to_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    dump(tmp_path / "whole")
    source = data()

    class Failing(Dataset[Any]):
        fails = True

        def __len__(self) -> int:
            return ROWS

        def __getitem__(self, index: int) -> Any:
            if self.fails and index == 100:
                raise OSError("the disk is gone")
            return source[index]

    Failing.__name__ = "TensorDataset"
    failing = Failing()
    with pytest.raises(DataError, match="sample 100"):
        dump(tmp_path / "cache", dataset=failing)
    assert (tmp_path / "cache" / "head.h5").exists()
    (tmp_path / "cache" / "head.h5").chmod(0o600)
    (tmp_path / "cache" / "head.h5").write_bytes(b"damaged")
    failing.fails = False
    again = dump(tmp_path / "cache", dataset=failing)
    assert again.computed == 70
    files = [p for p in (tmp_path / "whole").rglob("*") if p.is_file() and p.name != ".lock"]
    assert len(files) == 6
    for path in files:
        assert (tmp_path / "cache" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["unlink", "truncate", "flip"])
def test_a_finished_dump_gets_its_head_back_by_the_same_command(tmp_path: Path, damage: str) -> None:
    root = dump(tmp_path / "cache").root
    head = tmp_path / "cache" / "head.h5"
    sound = head.read_bytes()
    head.unlink()
    if damage != "unlink":
        head.write_bytes(sound[:-1] if damage == "truncate" else sound[:-1] + bytes([sound[-1] ^ 1]))
    forget_heads()
    assert not verify(tmp_path / "cache").ok
    again = dump(tmp_path / "cache")
    assert (again.root, again.computed) == (root, 0)
    assert head.read_bytes() == sound
    assert verify(tmp_path / "cache").ok


def test_a_folder_grows_by_views_and_samples_with_the_head_unchanged(tmp_path: Path) -> None:
    images = TensorDataset(torch.rand(90, 1, 4, 3), torch.arange(90))
    settings = {"augment": "shift1", "device": "cpu"}
    model = nn.Sequential()
    model.add_module("flat", nn.Flatten())
    model.add_module("classifier", nn.Linear(INPUTS, CLASSES))
    first = dump(tmp_path / "cache", model, TensorDataset(*(t[:60] for t in images.tensors)), **settings)
    head = (tmp_path / "cache" / "head.h5").stat()
    assert dump(tmp_path / "cache", model, TensorDataset(*(t[:60] for t in images.tensors)), views=2, **settings).root
    assert dump(tmp_path / "cache", model, images, views=2, **settings).root != first.root
    after = (tmp_path / "cache" / "head.h5").stat()
    assert (after.st_ino, after.st_mtime_ns) == (head.st_ino, head.st_mtime_ns)
    assert verify(tmp_path / "cache").ok
    with kdcache.open(tmp_path / "cache") as cache:
        assert len(cache) == 180


def _part(out: Path, shard: str) -> None:
    torch.set_num_threads(1)
    dump(out, shard=shard, threads=1)


def test_two_processes_share_a_dump(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "kdcache.stages.precompute"])  # torch is imported once
    both = [context.Process(target=_part, args=(tmp_path / "cache", f"{n}/2")) for n in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert verify(tmp_path / "cache").ok
    assert np.allclose(decoded(tmp_path / "cache"), logits_of(Classifier()), atol=0.01)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_train_a_student_from_workers_too(tmp_path: Path, workers: int) -> None:
    dump(tmp_path / "cache")
    with kdcache.open(tmp_path / "cache") as cache:
        loader = DataLoader(kdcache.join(data(), cache), batch_size=50, num_workers=workers)
        student = Classifier(seed=3)
        for batch in loader:
            x, labels, teacher = batch
            loss = kdcache.DistillationLoss(alpha=0.5, temperature=2.0)(student(x), teacher, labels)
            (loss + feature_mse(student.body(x), teacher)).backward()
            assert torch.isfinite(loss)


def test_the_same_teacher_verifies(tmp_path: Path) -> None:
    dump(tmp_path / "cache")
    assert verify_teacher(tmp_path / "cache", Classifier(), data()).ok
    assert not verify_teacher(tmp_path / "cache", Classifier(seed=1), data()).ok


@pytest.mark.parametrize(
    "behind",
    [
        lambda z: z.softmax(1),
        lambda z: z / 2,
        lambda z: z + torch.linspace(-1, 1, CLASSES),
        lambda z: z.masked_fill(torch.arange(CLASSES) == 3, -torch.inf),
        lambda z: z[:, :100],
    ],
    ids=["softmax", "temperature", "bias", "mask", "part"],
)
def test_what_stands_behind_the_layer_is_refused(tmp_path: Path, behind: Any) -> None:
    with pytest.raises(LogitsError, match="behind the layer"):
        dump(tmp_path / "cache", Classifier(behind))
    assert not (tmp_path / "cache").exists()


def test_a_mask_of_later_samples_is_found_when_they_come(tmp_path: Path) -> None:
    class Masking(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = super().forward(x)
            return torch.where((x == inputs()[77]).all(dim=1, keepdim=True), logits - 9 * torch.eye(CLASSES)[5], logits)

    with pytest.raises(LogitsError, match=r"sample 77 .*--factored"):
        dump(tmp_path / "cache", Masking())


def test_logits_inside_an_output_are_found(tmp_path: Path) -> None:
    dump(tmp_path / "cache", Classifier(lambda z: {"scores": z, "other": z * 2}), output_key="scores")
    with pytest.raises(LogitsError, match="behind the layer"):
        dump(tmp_path / "more", Classifier(lambda z: {"scores": z, "other": z * 2}), output_key="other")


class Twice(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x)) + self.classifier(self.body(x))


class Unused(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.body(x), self.classifier.weight, self.classifier.bias)


class Sequence(Classifier):
    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x)[:, None])[:, 0]


class Infinite(Classifier):
    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.classifier.weight[5, 5] = torch.nan


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Classifier(), {"factored": "clasifier"}, "no layer of this name; its linear layers are classifier"),
        (Classifier(), {"factored": ""}, "no layer of this name"),
        (nn.Sequential(nn.Tanh()), {"factored": "fc"}, "it has no linear layer"),
        (Classifier(), {"factored": "body"}, r"a Sequential, expected the final nn.Linear .* body\.0"),
        (Classifier(), {"factored": "body.1"}, "a ReLU, expected"),
        (Classifier(), {"factored": "body.0"}, "behind the layer"),
        (Twice(), {}, "called 2 times"),
        (Unused(), {}, "called 0 times"),
        (Sequence(), {}, r"\(150, 1, 16\)|\(2, 1, 16\)"),
        (Infinite(), {}, "NaN"),
        (Classifier(), {"dtype": "int8"}, "leave --dtype"),
        (Classifier(), {"top_k": 5}, "leave --dtype and --top-k out"),
    ],
)
def test_a_layer_that_cannot_be_stored_is_refused(
    tmp_path: Path, model: nn.Module, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((UsageError, LogitsError), match=message):
        dump(tmp_path / "cache", model, **settings)
    assert not (tmp_path / "cache").exists()


def test_one_file_and_exported_programs_are_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no one-file form"):
        dump(tmp_path / "cache.h5")
    with pytest.raises(UsageError, match="pt2"):
        precompute(dataset=data(), out=tmp_path / "cache", teacher="pt2:gone.pt2", factored="fc")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_names_the_layer_that_makes_smaller_rows(tmp_path: Path) -> None:
    def suggested(model: nn.Module, **settings: Any) -> str | None:
        result = precompute(model, data(), tmp_path / "cache", dry_run=True, quiet=True, **settings)
        assert isinstance(result, DryRun)
        return result.factored

    assert suggested(Classifier()) == "classifier"
    assert suggested(Classifier(), factored="classifier") is None
    assert suggested(Classifier(), top_k=5) is None
    assert suggested(nn.Sequential(nn.Linear(INPUTS, 64), nn.Linear(64, 32))) is None
    assert not list(tmp_path.iterdir())


def test_overwriting_removes_the_head(tmp_path: Path) -> None:
    dump(tmp_path / "cache")
    dump(tmp_path / "cache", factored=None, overwrite=True)
    assert not (tmp_path / "cache" / "head.h5").exists()
    assert verify(tmp_path / "cache").ok


def test_a_loaded_teacher_goes_as_well(tmp_path: Path) -> None:
    with pytest.raises(KDCacheError, match="no layer"):
        dump(tmp_path / "cache", LoadedTeacher(Classifier(), None, {"spec": "x"}), factored="head")
