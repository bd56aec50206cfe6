"""The process that reads a foreign file: its limits hold, and whatever becomes of it is an error message here."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from foreign_files import crashing_file, endless_file
from numpy.lib import format as npy_format

from kdcache.errors import DataError, UsageError
from kdcache.store import foreign_process
from kdcache.store.foreign import ForeignFile, Limits

LOGITS = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
LIMITS = Limits(memory_mib=256, seconds=60)
KNOWN_LIBRARY = h5py.version.hdf5_version == "2.0.0"  # whose faults the files of this test reach


def rows(path: Path, limits: Limits = LIMITS, **wanted: str) -> dict[str, np.ndarray]:
    """All rows of the wanted arrays by role, read as an import reads them."""
    with ForeignFile(path) as file:
        file.select(wanted or {"logits": "logits"}, limits)
        blocks = list(file.blocks())
    return {role: np.concatenate([block[role] for block in blocks]) for role in blocks[0]}


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "theirs.npz", logits=LOGITS, y=np.arange(50, dtype=np.uint8))
    return tmp_path / "theirs.npz"


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts another program in the place of the reading process, as an attack that took it over would."""

    def replace(script: str) -> None:
        start = (
            "import json, os, struct, sys, time\nsys.stdin.read()\n"
            "def send(kind, data):\n"
            "    data = json.dumps(data).encode() if kind == b'J' else data\n"
            "    os.write(1, struct.pack('<cQ', kind, len(data)) + data)\n"
            "def layout(shape=[50, 6], dtype='<f4', step=50):\n"
            "    send(b'J', {'arrays': {'logits': {'shape': shape, 'dtype': dtype}}, 'step': step})\n"
        )
        command = [sys.executable, "-I", "-S", "-c", start + script]
        monkeypatch.setattr(foreign_process, "command", lambda: command)

    return replace


# What is read.


def test_rows_of_more_than_one_block_arrive_as_they_were_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    logits, labels = rng.integers(-2, 2, (5000, 300)).astype(np.float64), rng.integers(0, 300, 5000).astype(">i2")
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file.create_dataset("logits", data=logits, chunks=(512, 300), compression="gzip", compression_opts=1)
        file["y"] = labels
        file["ids"] = [f"sample {number}" for number in range(5000)]
    found = rows(tmp_path / "a.h5", logits="logits", labels="y", ids="ids")
    np.testing.assert_array_equal(found["logits"], logits)
    np.testing.assert_array_equal(found["labels"], labels)
    assert found["ids"].dtype == "S11"
    assert found["ids"][4999] == b"sample 4999"


def test_a_listing_needs_no_names(npz: Path) -> None:
    with ForeignFile(npz) as file:
        assert file.listing(LIMITS) == (
            "  logits  (50, 6)  float32\n  y       (50,)    uint8\nfor example: --logits logits --labels y"
        )


def test_an_array_that_is_not_there_is_an_error_with_the_listing(npz: Path) -> None:
    with pytest.raises(UsageError, match=r"theirs\.npz has no array 'logit'; it holds\n  logits"):
        rows(npz, logits="logit")


@pytest.mark.parametrize("kind", ["nothing", "folder", "fifo", "device"])
def test_only_regular_files_are_opened_and_nothing_waits_for_others(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "theirs.npz"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    with pytest.raises(UsageError, match="there is no file" if kind == "nothing" else "not a regular file"):
        ForeignFile(path)


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04\x95pickle", b"PK", bytes(4096)])
def test_a_file_of_no_known_format_is_refused_by_its_first_bytes(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.h5 is not HDF5, \.npz, \.npy or safetensors by its first bytes"):
        ForeignFile(tmp_path / "a.h5")


def test_a_file_that_changes_while_it_is_read_is_refused(npz: Path) -> None:
    with ForeignFile(npz) as file:
        file.check_unchanged()
        os.utime(npz, ns=(1, 1))
        with pytest.raises(DataError, match="was changed while it was read"):
            file.check_unchanged()


# What the process may do.


def test_the_limits_hold(tmp_path: Path) -> None:
    """In a process that took them, with a file for writing that was open before."""
    script = """
import errno, json, os, socket, sys
from kdcache.store.foreign_child import set_limits, settle_descriptors
target, report = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), os.dup(1)
os.dup2(target, 20), os.dup2(report, 21)
settle_descriptors(target)
closed = {fd: not os.path.exists(f"/proc/self/fd/{fd}") for fd in (20, 21)}
set_limits(64 << 20, 30, descriptors=0)
found = {}
def attempt(name, action):
    try:
        found[name] = repr(action())
    except (OSError, MemoryError) as error:
        found[name] = errno.errorcode[error.errno] if isinstance(error, OSError) else "MemoryError"
attempt("open", lambda: os.open("/etc/hostname", os.O_RDONLY))
attempt("socket", lambda: socket.socket())
attempt("pipe", lambda: os.pipe())
attempt("write", lambda: os.write(3, b"x"))
attempt("memory", lambda: len(bytearray(80 << 20)))
attempt("less memory", lambda: len(bytearray(40 << 20)))
def fork():
    process = os.fork()
    if not process:
        os._exit(0)
    return os.waitpid(process, 0)[1]
if os.geteuid():
    attempt("fork", fork)
os.write(4, json.dumps({**found, "closed": all(closed.values())}).encode())
"""
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, check=True)
    expected = {"open": "EMFILE", "socket": "EMFILE", "pipe": "EMFILE", "write": "EFBIG", "closed": True}
    expected |= {"memory": "MemoryError", "less memory": str(40 << 20)} if sys.platform == "linux" else {}
    expected |= {"fork": "EAGAIN"} if os.geteuid() else {}
    found = json.loads(done.stdout)
    assert {name: found[name] for name in expected} == expected


def test_the_process_gets_no_variables_but_those_that_libraries_are_found_by(monkeypatch) -> None:
    for name in ("HDF5_PLUGIN_PATH", "PYTHONPATH", "LD_PRELOAD", "SECRET", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "/somewhere")
    found = foreign_process.environment()
    assert {"HDF5_PLUGIN_PATH", "PYTHONPATH", "LD_PRELOAD", "SECRET"}.isdisjoint(found)
    assert found["LD_LIBRARY_PATH"] == "/somewhere"
    assert found["HDF5_PLUGIN_PRELOAD"] == "::"


def test_packages_are_found_where_this_process_finds_them_and_never_in_the_current_folder(monkeypatch) -> None:
    monkeypatch.setattr(sys, "path", ["", "relative", "/a/package", *sys.path])
    paths = foreign_process.command()[5:]
    assert paths[0] == "/a/package"
    assert not [path for path in paths if not os.path.isabs(path)]


@pytest.mark.skipif(os.system("cc --version > /dev/null 2>&1") != 0, reason="needs a C compiler")
def test_libhdf5_loads_no_plug_in_from_a_path_in_the_environment(tmp_path: Path, monkeypatch) -> None:
    """A library that makes a file when it is loaded, and an array whose filter only a plug-in could know."""
    mark, folder = tmp_path / "loaded", tmp_path / "plugins"
    folder.mkdir()
    source = f'#include <fcntl.h>\n__attribute__((constructor)) void go(void) {{ creat("{mark}", 0600); }}\n'
    build = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(folder / "libh5evil.so")]
    subprocess.run(build, input=source.encode(), check=True)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk((50, 6))
    properties.set_filter(31999, h5py.h5z.FLAG_OPTIONAL)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        space = h5py.h5s.create_simple((50, 6))
        logits = h5py.h5d.create(file.id, b"logits", h5py.h5t.IEEE_F32LE, space, properties)
        logits.write_direct_chunk((0, 0), LOGITS.tobytes())
    monkeypatch.setenv("HDF5_PLUGIN_PATH", str(folder))
    with pytest.raises(DataError, match="filter 31999; plug-ins are not loaded"):
        rows(tmp_path / "a.h5")
    read = [sys.executable, "-c", "import h5py, sys; h5py.File(sys.argv[1])['logits'][:]", str(tmp_path / "a.h5")]
    path = {"HDF5_PLUGIN_PATH": str(folder)}
    subprocess.run(read, env={**foreign_process.environment(), **path}, capture_output=True)
    assert not mark.exists()
    subprocess.run(read, env=path, capture_output=True)
    assert mark.exists()  # so the test can fail


# What may become of it.


def test_a_file_that_crashes_libhdf5_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"crashed \(SIGSEGV\): the file is damaged, or made" if KNOWN_LIBRARY else ""):
        rows(crashing_file(tmp_path / "a.h5"))


def test_a_file_that_libhdf5_reads_for_ever_is_an_error_when_the_time_is_over(tmp_path: Path) -> None:
    message = "not read within the 1 s of --time-limit. Raise the limit if" if KNOWN_LIBRARY else ""
    with pytest.raises(DataError, match=message):
        rows(endless_file(tmp_path / "a.h5"), Limits(256, seconds=1), logits="logits", ids="ids")


SMALL = Limits(memory_mib=32, seconds=60)


def test_a_chunk_that_unpacks_to_a_giant_is_stopped_by_the_memory_limit(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        logits = file.create_dataset("logits", (1 << 17, 80), "f4", chunks=(1 << 17, 80), compression="gzip")
        logits.id.write_direct_chunk((0, 0), zlib.compress(bytes(40 << 20), 1))
    message = r"takes more than the 32 MiB of --memory-limit \(array logits has chunks of 41943040 bytes\)"
    with pytest.raises(DataError, match=message):
        rows(tmp_path / "a.h5", SMALL)


def test_a_chunk_that_unpacks_to_more_than_it_says_is_stopped_by_the_memory_limit(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        logits = file.create_dataset("logits", (64, 64), "f4", chunks=(64, 64), compression="gzip")
        logits.id.write_direct_chunk((0, 0), zlib.compress(bytes(40 << 20), 1))
    with pytest.raises(DataError, match=r"filter returned failure|--memory-limit"):
        rows(tmp_path / "a.h5", SMALL)


def zeros(path: Path, shape: tuple[int, int], *, is_fortran: bool) -> Path:
    """An .npz file of float32 zeros, packed to a thousandth."""
    header = io.BytesIO()
    npy_format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": is_fortran, "shape": shape})
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("logits.npy", header.getvalue() + bytes(4 * shape[0] * shape[1]))
    return path


def test_an_array_that_must_be_read_whole_is_stopped_by_the_memory_limit(tmp_path: Path) -> None:
    path = zeros(tmp_path / "a.npz", (1 << 17, 80), is_fortran=True)
    with pytest.raises(DataError, match="takes more than the 32 MiB of --memory-limit"):
        rows(path, SMALL)


def test_an_array_that_is_larger_than_the_memory_limit_is_streamed(tmp_path: Path) -> None:
    path = zeros(tmp_path / "a.npz", (1 << 17, 80), is_fortran=False)
    with ForeignFile(path) as file:
        file.select({"logits": "logits"}, SMALL)
        assert sum(len(block["logits"]) for block in file.blocks()) == 1 << 17


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGKILL, "was killed, most likely because the machine ran out of memory"),
        (signal.SIGXCPU, "not read within the 60 s of --time-limit"),
        (signal.SIGBUS, r"crashed \(SIGBUS\)"),
        (signal.SIGABRT, r"crashed \(SIGABRT\)"),
        (signal.SIGTERM, "was ended by SIGTERM"),
    ],
)
def test_a_process_that_dies_of_a_signal_is_an_error_that_says_so(npz: Path, reader, number, message: str) -> None:
    reader(f"layout()\nos.kill(os.getpid(), {int(number)})\ntime.sleep(60)")
    with pytest.raises(DataError, match=message):
        rows(npz)


NONSENSE = {
    "nothing": ("", "ended with exit code 0"),
    "an exit code and a reason": ("print('no disk', file=sys.stderr); sys.exit(3)", "ended with exit code 3: no disk"),
    "text": ("print('hello, this is no frame at all')", "sent a frame"),
    "a frame of 2**60 bytes": ("os.write(1, struct.pack('<cQ', b'J', 2**60))", "sent a frame"),
    "JSON that is none": ("os.write(1, struct.pack('<cQ', b'J', 3) + b'{no')", "sent something that is not JSON"),
    "no arrays": ("send(b'J', {'step': 4})", "announced the shape None"),
    "arrays of another kind": ("send(b'J', {'arrays': [1, 2]})", "announced the shape None"),
    "negative sizes": ("layout([-1, 6])", "announced the shape"),
    "sizes beyond all limits": ("layout([2**60, 6])", "announced the shape"),
    "sizes that are true": ("layout([True, 6])", "announced the shape"),
    "objects": ("layout(dtype='|O')", "announced the type"),
    "a structure": ("layout(dtype='f4,f4')", "announced the type"),
    "text of 9 MB": ("layout(dtype='|S9999999')", "announced the type"),
    "no blocks": ("layout(step=0)", "announced blocks of 0 rows"),
    "blocks beyond all limits": ("layout(step=2**62)", "announced blocks of"),
    "no rows": ("layout([0, 6])", r"announced arrays of \[0\] rows"),
    "more than the file can hold": ("layout([2**40, 6])", "cannot hold 1,099,511,627,776 rows"),
    "a row beyond all limits": ("layout([1, 2**40])", "a row takes 4,398,046,511,104 bytes"),
    "a short block": ("layout(); send(b'D', bytes(50 * 24 - 1))", "sent a block of another length"),
    "a long block": ("layout(); send(b'D', bytes(50 * 24 + 1))", "sent a frame"),
    "half a block": ("layout(); os.write(1, struct.pack('<cQ', b'D', 1200) + bytes(9))", "ended with exit code 0"),
    "JSON for a block": ("layout(); send(b'J', {'done': True})", "sent a frame"),
    "a block too many": ("layout(); [send(b'D', bytes(1200)) for _ in range(2)]", "sent a frame"),
    "no end": ("layout(); send(b'D', bytes(1200)); send(b'J', {'more': 1})", "sent rows without an end"),
    "more behind the end": (
        "layout(); send(b'D', bytes(1200)); send(b'J', {'done': True}); os.write(1, b'x')",
        "sent more than it announced",
    ),
    "an end and another exit code": (
        "layout(); send(b'D', bytes(1200)); send(b'J', {'done': True}); os._exit(9)",
        "ended with exit code 9",
    ),
    "silence": ("time.sleep(600)", "not read within the 1 s"),
    "silence behind the end": (
        "layout(); send(b'D', bytes(1200)); send(b'J', {'done': True}); os.close(1); time.sleep(600)",
        "not read within the 1 s",
    ),
    "letters that a terminal obeys": (
        r"send(b'J', {'error': 'data', 'message': 'a\u001b[2Jb\nc'})",
        r"theirs\.npz: a\\x1b\[2Jb",
    ),
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_reading_process_that_was_taken_over_can_send(npz: Path, reader, what: str) -> None:
    script, message = NONSENSE[what]
    reader(script)
    with pytest.raises(DataError, match=message) as caught:
        rows(npz, Limits(256, seconds=1 if "1 s" in message else 60))
    assert "\x1b" not in str(caught.value)


def test_a_library_may_print_more_than_a_pipe_holds(npz: Path, reader) -> None:
    """libhdf5 prints its errors: nobody may wait for a reader of them."""
    reader("layout(); os.write(2, bytes(1 << 20)); send(b'D', bytes(1200)); send(b'J', {'done': True})")
    assert rows(npz)["logits"].shape == (50, 6)


def test_no_process_is_left_when_the_reading_is_broken_off(npz: Path) -> None:
    with ForeignFile(npz) as file:
        file.select({"logits": "logits"}, LIMITS)
        pid = file._process.pid
        os.kill(pid, 0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_time_that_hashing_takes_is_not_the_readers(npz: Path, reader) -> None:
    reader("layout(); send(b'D', bytes(1200)); send(b'J', {'done': True})")
    with ForeignFile(npz) as file:
        file.select({"logits": "logits"}, Limits(256, seconds=60))
        file._process._deadline -= 59.9  # nearly over
        with file._process.pausing():
            before = file._process._deadline
        assert file._process._deadline > before
