"""State dicts are read without unpickling, loaded strictly, and named by a hash of what they hold."""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdcache.errors import DataError, MismatchError, MissingExtraError, UsageError
from kdcache.stages.weights import load_weights, read_state_dict, state_sha256


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(first=nn.Linear(3, 4), norm=nn.BatchNorm1d(4), last=nn.Linear(4, 2)))


def save(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_a_state_dict_comes_back_whole(tmp_path: Path, suffix: str) -> None:
    source, target = net(), net()
    path = tmp_path / f"net{suffix}"
    if suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(source.state_dict(), path)
    else:
        save(path, source.state_dict())
    load_weights(target, path)
    assert state_sha256(target) == state_sha256(source)


def test_keys_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = net().state_dict()
    state["other.bias"] = state.pop("last.bias")
    with pytest.raises(MismatchError, match=r"1 missing \(last\.bias\), 1 unexpected \(other\.bias\)"):
        load_weights(net(), save(tmp_path / "w.pt", state))


def test_many_keys_are_cut_short(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=r"9 missing \(first\.weight, .*, \.\.\.\), none unexpected"):
        load_weights(net(), save(tmp_path / "w.pt", {}))


def test_keys_of_a_wrapped_model_are_explained(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in net().state_dict().items()}
    with pytest.raises(MismatchError, match="DistributedDataParallel"):
        load_weights(net(), save(tmp_path / "w.pt", state))


def test_shapes_that_do_not_fit_are_named(tmp_path: Path) -> None:
    state = net().state_dict()
    state["last.bias"] = torch.zeros(5)
    with pytest.raises(MismatchError, match=r"last\.bias \(5,\) instead of \(2,\)"):
        load_weights(net(), save(tmp_path / "w.pt", state))


class Trap:
    """Would run code if it were unpickled."""

    def __reduce__(self) -> Any:
        return (sys.exit, ("unpickled",))


@pytest.mark.parametrize("content", [net(), Trap(), {"weight": Trap()}])
def test_a_pickled_module_is_refused_with_the_reason(tmp_path: Path, content: Any) -> None:
    with pytest.raises(UsageError, match=r"never unpickles.*state_dict\(\)"):
        read_state_dict(save(tmp_path / "w.pt", content))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"epoch": 3, "state_dict": net().state_dict()}, "epoch, state_dict is no tensor"),
        ([torch.zeros(2)], "holds a list"),
        (torch.zeros(2), "holds a Tensor"),
        ({1: torch.zeros(2)}, "1 is no tensor"),
    ],
)
def test_more_than_a_state_dict_is_a_usage_error(tmp_path: Path, content: Any, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        read_state_dict(save(tmp_path / "w.pt", content))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_a_truncated_file_is_a_data_error(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        save(path, net().state_dict())
    else:
        pytest.importorskip("safetensors.torch").save_file(net().state_dict(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="cannot be read"):
        read_state_dict(path)


@pytest.mark.parametrize("name", ["w.bin", "weights"])
def test_another_suffix_is_a_usage_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="expected a name ending in"):
        read_state_dict(save(tmp_path / name, {}))


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no weights file"):
        read_state_dict(tmp_path / "w.pt")


def test_without_safetensors_the_error_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtraError, match=r'pip install "kdcache\[safetensors\]"'):
        read_state_dict(save(tmp_path / "w.safetensors", {}))


def test_the_hash_depends_on_names_dtypes_shapes_and_values_alone() -> None:
    first = net()
    second = copy.deepcopy(first)
    assert state_sha256(second.eval().requires_grad_(False)) == state_sha256(first)
    changes = [
        nn.Sequential(OrderedDict(other=first.first, norm=first.norm, last=first.last)),
        copy.deepcopy(first).half(),
    ]
    moved = copy.deepcopy(first)
    with torch.no_grad():
        moved.last.bias[0] += 1
    reshaped = copy.deepcopy(first)
    reshaped.last.weight = nn.Parameter(reshaped.last.weight.detach().reshape(4, 2))
    hashes = {state_sha256(module) for module in [first, *changes, moved, reshaped]}
    assert len(hashes) == 5


def test_the_hash_takes_every_dtype_and_scalars() -> None:
    module = nn.Module()
    for dtype in (torch.bfloat16, torch.float64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn):
        module.register_buffer(f"buffer_{str(dtype)[6:]}", torch.ones(2, 3).to(dtype).t())
    module.register_buffer("scalar", torch.tensor(3))
    module.register_buffer("empty", torch.zeros(0, 2))
    assert len(state_sha256(module)) == 64


@pytest.mark.parametrize("module", [nn.LazyLinear(3), nn.Linear(2, 2, device="meta")])
def test_a_module_without_values_has_no_hash(module: nn.Module) -> None:
    with pytest.raises(UsageError, match="has no values yet"):
        state_sha256(module)
