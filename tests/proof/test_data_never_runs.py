"""Promise S3: nothing in a file that comes from elsewhere runs; the real command refuses it with its exit code.

Every attack makes a folder if anything of it is unpickled, evaluated, imported or linked, and each kind is first shown
to work on a reader that lets it in (`test_the_traps_work`), so that a folder which never appears means something.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from h5py import h5d, h5p, h5s, h5t, h5z

from kdcache_cli.main import cli

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and torch.export

FILTER = 32_001
PLUGIN = """
#include <stddef.h>
#include <stdlib.h>
#include <sys/stat.h>
static size_t copy(unsigned f, size_t n, const unsigned v[], size_t b, size_t *s, void **p) { return b; }
static struct { int version, id; unsigned enc, dec; const char *name; void *can, *set; void *filter; } info =
    { 1, FILTER, 1, 1, "evil", NULL, NULL, (void *) copy };
__attribute__((constructor)) static void run(void) { mkdir(getenv("EVIL_MARKER"), 0700); }
int H5PLget_plugin_type(void) { return 0; }
const void *H5PLget_plugin_info(void) { return &info; }
"""
COMMANDS_ON_A_CACHE = [
    ["inspect", "CACHE"],
    ["verify", "CACHE"],
    ["merge", "CACHE", "merged.h5"],
    ["export", "CACHE", "out.npz"],
    ["export", "CACHE", "out.h5"],
    ["distill", "--cache", "CACHE", "--student", "mlp:4-3", "--data", "npz:train.npz", "--epochs", "1", "--out", "r"],
]


@pytest.fixture(scope="module")
def attacks() -> Any:
    import poison

    return poison


@pytest.fixture
def marker(attacks: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder that appears if anything runs; the current folder holds what the attacks need."""
    home, marker = tmp_path / "home", tmp_path / "EXECUTED"
    home.mkdir()
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    attacks.prepare(home, marker)
    yield marker
    sys.modules.pop(attacks.NETS, None)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Callable[[list[str]], tuple[int, str]]:
    """Runs a command and gives its exit code and output: with --long in a process of its own."""

    def in_process(arguments: list[str]) -> tuple[int, str]:
        result = CliRunner().invoke(cli, arguments)
        return result.exit_code, result.output

    def as_process(arguments: list[str]) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "kdcache", *arguments], capture_output=True, text=True, timeout=300
        )
        return done.returncode, done.stdout + done.stderr

    return as_process if request.config.getoption("--long") else in_process


def attack_names() -> list[Any]:
    """All of them; those on runs, which begin with 3 s of torch's own imports, only with --long."""
    sys.path.insert(0, str(Path(__file__).parent))
    import poison

    on_runs = ("a_checkpoint_with_an_object", "a_checkpoint_of_another_program", "a_finished_student_with_an_object")
    return [pytest.param(name, marks=pytest.mark.long if name in on_runs else ()) for name in poison.ATTACKS]


def assert_refused(found: tuple[int, str], code: int, marker: Path) -> None:
    assert not marker.exists(), f"something ran: {found}"
    assert found[0] == code, found
    assert "Error: " in found[1]
    assert "Traceback" not in found[1]
    assert "internal error" not in found[1]


def test_the_traps_work(attacks: Any, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trap = attacks.Trap(marker)
    readers: list[Callable[[], object]] = [
        lambda: pickle.loads(pickle.dumps(trap)),
        lambda: torch.load(attacks.save("w.pt", {"a": trap}), weights_only=False),
        lambda: np.load(_saved_npz(trap), allow_pickle=True)["x"],
        lambda: __import__(attacks.EVIL),
        lambda: _draw_postscript(attacks, trap, monkeypatch),
    ]
    for reader in readers:
        reader()
        marker.rmdir()  # raises if it is not there


def _saved_npz(trap: Any) -> str:
    np.savez("trap.npz", x=np.array([trap], object))
    return "trap.npz"


def _draw_postscript(attacks: Any, trap: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    image = pytest.importorskip("PIL.Image")
    attacks.postscript_as_an_image(trap)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
        # The image that this `gs` does not make is missing.
        with image.open("photos/cat/a.png") as opened, pytest.raises((OSError, subprocess.CalledProcessError)):
            opened.load()


@pytest.mark.parametrize("name", attack_names())
def test_a_file_that_would_run_code_is_refused(
    name: str,
    attacks: Any,
    marker: Path,
    run: Callable[[list[str]], tuple[int, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command, code = attacks.ATTACKS[name](attacks.Trap(marker))
    if Path("bin/gs").exists():
        monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
    assert_refused(run(command), code, marker)


def test_every_kind_of_file_that_is_read_has_its_attacks(attacks: Any, proved: Callable[..., None]) -> None:
    kinds = ("weights", "checkpoint", "inputs", "ids", "class_names", "image", "cache", "manifest", "attribute", "plan")
    assert all(any(kind in name for name in attacks.ATTACKS) for kind in kinds)
    assert len(attacks.ATTACKS) >= 25
    proved("S3", attacks=len(attacks.ATTACKS), executed=0)


def test_names_of_modules_in_a_sound_cache_are_only_names(
    attacks: Any, marker: Path, run: Callable[[list[str]], tuple[int, str]], count: Callable[[int, int], int]
) -> None:
    commands = COMMANDS_ON_A_CACHE[: count(-1, len(COMMANDS_ON_A_CACHE))]  # the last one imports torch
    for cache in ("teacher.h5", "teacher"):
        for command in [*commands, *([["card", "CACHE"]] if cache == "teacher" else [])]:
            code, output = run([argument.replace("CACHE", cache) for argument in command])
            assert code == 0, output
            assert not marker.exists()
        for made in ("merged.h5", "out.npz", "out.h5"):
            Path(made).unlink()
        shutil.rmtree("r", ignore_errors=True)


# ---- filter plug-ins of HDF5 ----


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a filter plug-in whose library makes the folder EVIL_MARKER when it is loaded."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    folder = tmp_path_factory.mktemp("plugin")
    source = folder / "evil.c"
    source.write_text(PLUGIN.replace("FILTER", str(FILTER)))
    command = [compiler, "-shared", "-fPIC", "-w", "-o", str(folder / "libevil.so"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def filtered(source: Path, target: Path) -> bytes:
    """A copy of a container whose logits pass through the filter of the plug-in."""
    with h5py.File(source) as ours, h5py.File(target, "w", libver=("v110", "v110")) as file:
        for name in ours:
            data = ours[name][...]
            properties = h5p.create(h5p.DATASET_CREATE)
            properties.set_chunk(data.shape)
            if name == "logits":
                properties.set_filter(FILTER, h5z.FLAG_OPTIONAL)
            kind, space = h5t.py_create(data.dtype), h5s.create_simple(data.shape)
            dataset = h5py.Dataset(h5d.create(file.id, name.encode(), kind, space, properties))
            dataset.id.write_direct_chunk((0,) * data.ndim, data.tobytes())
        file.attrs["kdcache"] = ours.attrs["kdcache"]
    return target.read_bytes()


def test_a_filter_plugin_that_a_cache_asks_for_is_never_loaded(
    plugin: Path, attacks: Any, marker: Path, count: Callable[[int, int], int], proved: Callable[..., None]
) -> None:
    from fuzz_reseal import reseal_manifest, reseal_shard

    filtered(Path("teacher.h5"), Path("evil.h5"))
    shutil.copytree("teacher", "evil")
    shard = Path("evil/shards/v000-00000.h5")
    image = filtered(shard, Path("shard.h5"))
    shard.unlink()
    shard.write_bytes(image)
    value = json.loads(Path("evil/manifest.json").read_bytes())
    reseal_shard(value["shards"][0], image)
    Path("evil/manifest.json").unlink()
    Path("evil/manifest.json").write_bytes(reseal_manifest(value))
    environment = {**os.environ, "HDF5_PLUGIN_PATH": str(plugin), "EVIL_MARKER": str(marker)}

    plain = "import h5py, sys; h5py.File(sys.argv[1])['logits'][...]"
    for victim in ("evil.h5", shard):  # plain h5py does load it
        subprocess.run([sys.executable, "-c", plain, str(victim)], env=environment, capture_output=True)
        marker.rmdir()

    script = (
        "import json, sys\n"
        "from click.testing import CliRunner\n"
        "from kdcache_cli.main import cli\n"
        "import h5py\n"  # in the same process, so that its library could load the plug-in
        "for command in json.load(sys.stdin):\n"
        "    result = CliRunner().invoke(cli, command)\n"
        "    print(json.dumps([result.exit_code, result.output]))\n"
    )
    commands = [
        [argument.replace("CACHE", cache) for argument in command]
        for cache in ("evil.h5", "evil")
        for command in COMMANDS_ON_A_CACHE[: count(-1, len(COMMANDS_ON_A_CACHE))]  # the last one imports torch: 3 s
    ]
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(commands), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert not marker.exists()
    for command, (code, output) in zip(commands, found, strict=True):
        expected = 0 if command == ["inspect", "evil"] else 3  # a folder's manifest says no more than it did
        assert code == expected, (command, output)
    proved("S3", commands_beside_a_plugin=len(found), executed=0)


# ---- exported programs ----


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, attacks: Any) -> Path:
    """An exported program that is none of the attacks."""
    path = tmp_path_factory.mktemp("pt2") / "sound.pt2"
    batch = torch.export.Dim("batch")
    example = (torch.zeros(4, attacks.WIDTH),)
    program = torch.export.export(attacks.Net().eval(), example, dynamic_shapes={"x": {0: batch}})
    torch.export.save(program, path)
    return path


@pytest.fixture
def programs(sound: Path, attacks: Any, marker: Path) -> dict[str, Callable[[], None]]:
    """By name: what writes an archive of which torch 2.13 would run something to net.pt2."""
    with zipfile.ZipFile(sound) as archive:
        top = archive.namelist()[0].partition("/")[0]
        program = json.loads(archive.read(f"{top}/models/model.json"))
    cases = attacks.in_programs(program, attacks.Trap(marker), top)
    return {
        name: partial(attacks.rewrite, sound, Path("net.pt2"), program=changed, entries=entries)
        for name, (changed, entries) in cases.items()
    }


@pytest.mark.long
def test_an_exported_program_with_more_than_arithmetic_in_it_is_refused(
    sound: Path, marker: Path, programs: dict[str, Callable[[], None]], proved: Callable[..., None]
) -> None:
    command = ["precompute", "--teacher", "pt2:net.pt2", "--data", "npz:train.npz", "--out", "out"]
    shutil.copy(sound, "net.pt2")
    assert CliRunner().invoke(cli, command).exit_code == 0
    shutil.rmtree("out")
    for name, write in programs.items():
        write()
        result = CliRunner().invoke(cli, command)
        assert not marker.exists(), name
        assert result.exit_code in (1, 2), (name, result.output)
        assert "Error: pt2: net.pt2" in result.output
    proved("S3", programs=len(programs), executed=0)


@pytest.mark.long
def test_the_traps_in_programs_work_on_torch_itself(marker: Path, programs: dict[str, Callable[[], None]]) -> None:
    """At least these run without the checks; which of the others do depends on the version of torch."""
    script = (
        "import contextlib, os, sys, torch\n"
        "for path in sys.argv[2:]:\n"
        "    with contextlib.suppress(BaseException):\n"
        "        torch.export.load(path).module()(torch.zeros(2, 4))\n"
        "    os.rmdir(sys.argv[1])\n"
    )
    names = ["size", "guard", "enumeration", "old format beside", "pickled weights", "sample inputs"]
    for number, name in enumerate(names):
        programs[name]()
        Path("net.pt2").rename(f"{number}.pt2")
    command = [sys.executable, "-c", script, str(marker), *(f"{number}.pt2" for number in range(len(names)))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
