"""An exported program serves as a teacher if any batch size fits and loading it unpickles nothing."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.stages.calling import call_model
from kdcache.stages.teacher_pt2 import refuse_pickles
from kdcache.stages.teachers import load_teacher
from kdcache.stages.weights import state_sha256

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # torch.export's own


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.first(x)))  # type: ignore[no-any-return]


class Normed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.BatchNorm1d(4)  # type: ignore[assignment]


def export(path: Path, model: nn.Module, batch: Any) -> Path:
    program = torch.export.export(model, (torch.zeros(4, 3),), dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, path)
    return path


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Net().eval()


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, model: nn.Module) -> Path:
    return export(tmp_path_factory.mktemp("pt2") / "net.pt2", model, torch.export.Dim("batch"))


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_an_exported_program_gives_the_logits_of_its_model(sound: Path, model: nn.Module, rows: int) -> None:
    teacher = load_teacher(f"pt2:{sound}")
    x = torch.rand(rows, 3)
    assert torch.allclose(teacher.module(x), model(x), atol=1e-6)
    assert teacher.max_batch is None


def test_a_program_is_fixed_and_named_by_its_file_without_its_place(sound: Path) -> None:
    teacher = load_teacher(f"pt2:{sound}")
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    assert not teacher.module.training
    assert teacher.provenance["spec"] == "pt2:net.pt2"
    assert teacher.provenance["state_sha256"] == state_sha256(teacher.module)
    assert teacher.provenance["parameters"] == 3 * 4 + 4 + 4 * 2 + 2
    assert str(sound.parent) not in str(teacher.provenance)


def test_eval_and_train_may_be_called_on_it(sound: Path) -> None:
    module = load_teacher(f"pt2:{sound}").module
    assert module.train().training
    assert not module.eval().training


def test_dict_items_reach_it_by_the_names_of_its_arguments(sound: Path, model: nn.Module) -> None:
    module = load_teacher(f"pt2:{sound}").module
    x = torch.rand(2, 3)
    assert torch.allclose(call_model(module, {"x": x, "label": x, "other": x}), model(x), atol=1e-6)
    with pytest.raises(UsageError, match="forward takes x"):
        call_model(module, {"pixels": x})


def test_a_bound_on_the_batch_is_reported(tmp_path: Path, model: nn.Module) -> None:
    path = export(tmp_path / "net.pt2", model, torch.export.Dim("batch", min=2, max=64))
    assert load_teacher(f"pt2:{path}").max_batch == 64


def test_a_fixed_batch_is_refused_with_the_way_to_export(tmp_path: Path, model: nn.Module) -> None:
    with pytest.raises(UsageError, match=r"batches of 4 only.*torch\.export\.Dim"):
        load_teacher(f"pt2:{export(tmp_path / 'net.pt2', model, None)}")


@pytest.mark.parametrize(("train", "operator"), [(Net().train(), "dropout"), (Normed().train(), "batch_norm")])
def test_a_program_exported_in_training_mode_is_refused(tmp_path: Path, train: nn.Module, operator: str) -> None:
    path = export(tmp_path / "net.pt2", train, torch.export.Dim("batch"))
    with pytest.raises(UsageError, match=f"training mode .aten::{operator}"):
        load_teacher(f"pt2:{path}")


def test_an_exported_batch_norm_in_eval_mode_is_taken(tmp_path: Path) -> None:
    path = export(tmp_path / "net.pt2", Normed().eval(), torch.export.Dim("batch"))
    assert load_teacher(f"pt2:{path}").module(torch.rand(3, 3)).shape == (3, 2)


def test_weights_do_not_go_with_a_program(sound: Path) -> None:
    with pytest.raises(UsageError, match="brings its own weights"):
        load_teacher(f"pt2:{sound}", weights=sound)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no file"):
        load_teacher(f"pt2:{tmp_path / 'net.pt2'}")


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04" + bytes(50)])
def test_what_is_no_archive_is_a_data_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not a readable"):
        load_teacher(f"pt2:{path}")


class Trap:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> Any:
        return (sys.exit, ("unpickled",))


def trap() -> bytes:
    buffer = io.BytesIO()
    torch.save((Trap(),), buffer)
    return buffer.getvalue()


def rewrite(source: Path, target: Path, changes: dict[str, bytes | None]) -> Path:
    """A copy of an archive with entries replaced, added, or (None) removed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        folder = old.namelist()[0].split("/")[0]
        for name in old.namelist():
            if name.removeprefix(f"{folder}/") not in changes:
                new.writestr(name, old.read(name))
        for name, content in changes.items():
            if content is not None:
                new.writestr(f"{folder}/{name}", content)
    return target


def config(path_name: str, use_pickle: bool) -> bytes:
    return json.dumps({"config": {"first.weight": {"path_name": path_name, "use_pickle": use_pickle}}}).encode()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"data/sample_inputs/model.pt": trap()}, "sample inputs"),
        ({"data/weights/model_weights_config.json": config("weight_0", True)}, "lists pickled objects"),
        ({"data/constants/model_constants_config.json": config("tensor_0", True)}, "lists pickled objects"),
        ({"data/constants/model_constants_config.json": config("opaque_obj_0", False)}, "lists pickled objects"),
        ({"data/constants/model_constants_config.json": b'{"config": {"a": 1}}'}, "lists pickled objects"),
        ({"data/constants/opaque_obj_0": trap()}, "is a pickled object"),
        ({"data/constants/custom_obj_0": trap()}, "is a pickled object"),
        ({"data/weights/model.pt": trap()}, "is a pickled object"),
        ({"data/constants/model.pt": trap()}, "is a pickled object"),
        ({"data/aotinductor/model/model.so": b"machine code"}, "machine code"),
        ({"archive_format": None}, "before torch 2.8"),
    ],
)
def test_whatever_would_be_unpickled_is_refused(
    sound: Path, tmp_path: Path, changes: dict[str, bytes | None], reason: str
) -> None:
    path = rewrite(sound, tmp_path / "net.pt2", changes)
    with pytest.raises(UsageError, match=reason):
        load_teacher(f"pt2:{path}")


def test_an_archive_with_one_name_twice_is_refused(sound: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(sound.read_bytes())
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"")
    with pytest.raises(DataError, match="two entries of one name"):
        load_teacher(f"pt2:{path}")


def test_a_program_that_torch_cannot_read_is_a_data_error(sound: Path, tmp_path: Path) -> None:
    path = rewrite(sound, tmp_path / "net.pt2", {"models/model.json": b"{}"})
    with pytest.raises(DataError, match="cannot be loaded"):
        load_teacher(f"pt2:{path}")


@settings(max_examples=30)
@given(st.integers(0, 1 << 20), st.integers(1, 255))
def test_a_damaged_archive_is_let_through_or_refused_but_never_crashes_the_check(
    tmp_path_factory: pytest.TempPathFactory, sound: Path, place: int, flip: int
) -> None:
    content = bytearray(sound.read_bytes())
    content[place % len(content)] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged.pt2"
    path.write_bytes(content)
    try:
        refuse_pickles(path)
    except KDCacheError:
        return
