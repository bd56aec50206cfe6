"""Files that run code if anything unpickles, evaluates, imports or links what is in them: each makes a folder.

`Trap` is the payload. Every attack is a function that writes its files into the current folder and returns the command
that a victim types there, with the exit code that must come of it.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_reseal
import numpy as np
import torch

import kdcache
from kdcache.format.hdf5_header import build_layout
from kdcache.format.sealed import dump_sealed

ROWS, WIDTH, CLASSES = 20, 4, 3
NETS = "nets_of_the_proof"
EVIL = "evil_of_the_proof"
TEACH = ["precompute", "--teacher", f"{NETS}:net", "--data", "npz:train.npz", "--out", "out"]
LEARN = ["distill", "--cache", "teacher.h5", "--student", "mlp:4-3", "--data", "npz:train.npz", "--epochs", "1"]
LEARN += ["--quiet", "--out", "run"]
Command = tuple[list[str], int]


class Trap:
    """Makes the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.marker,)


def prepare(home: Path, marker: Path) -> None:
    """What every attack needs beside its own files: a teacher, data, caches; a module that must not be imported."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(ROWS, WIDTH)).astype(np.float32), np.arange(ROWS) % CLASSES
    np.savez(home / "train.npz", x=x, y=y)
    (home / f"{NETS}.py").write_text(
        f"import torch\ndef net():\n    torch.manual_seed(0)\n    return torch.nn.Linear({WIDTH}, {CLASSES})\n"
    )
    (home / f"{EVIL}.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    provenance = {name: {"spec": f"{EVIL}:make", "name": f"py:{EVIL}:make"} for name in ("teacher", "data")}
    for name in ("teacher.h5", "teacher"):
        with kdcache.Writer(home / name, classes=CLASSES, provenance=provenance) as writer:
            writer.write(np.arange(ROWS), rng.normal(size=(ROWS, CLASSES)).astype(np.float32), y)


# ---- weights ----


def save(name: str, content: Any, **settings: Any) -> Path:
    torch.save(content, name, **settings)
    return Path(name)


def a_pickled_module(trap: Trap) -> Command:
    net = torch.nn.Linear(WIDTH, CLASSES)
    net.trap = trap  # type: ignore[assignment]
    save("w.pt", net)
    return [*TEACH, "--weights", "w.pt"], 2


def a_state_dict_with_an_object(trap: Trap) -> Command:
    save("w.pth", {"weight": trap, "bias": torch.zeros(CLASSES)})
    return [*TEACH, "--weights", "w.pth"], 2


def weights_of_the_old_format(trap: Trap) -> Command:
    save("w.pt", {"weight": trap}, _use_new_zipfile_serialization=False)
    return [*TEACH, "--weights", "w.pt"], 2


def a_bare_pickle_as_weights(trap: Trap) -> Command:
    Path("w.pt").write_bytes(pickle.dumps(trap, protocol=2))  # the one that torch reads without a warning
    return [*TEACH, "--weights", "w.pt"], 2


def a_bare_pickle_as_safetensors(trap: Trap) -> Command:
    Path("w.safetensors").write_bytes(pickle.dumps({"weight": trap}))
    return [*TEACH, "--weights", "w.safetensors"], 1


def a_scripted_module_as_weights(trap: Trap) -> Command:
    del trap  # TorchScript is a program: it must not even be loaded
    torch.jit.save(torch.jit.script(torch.nn.Linear(WIDTH, CLASSES)), "w.pt")
    return [*TEACH, "--weights", "w.pt"], 1


def a_pickled_teacher(trap: Trap) -> Command:
    save("net.pt", trap)
    return ["precompute", "--teacher", "net.pt", "--data", "npz:train.npz", "--out", "out"], 2


def weights_to_start_a_student_from(trap: Trap) -> Command:
    save("w.pt", {"0.weight": trap})
    return [*LEARN, "--init", "w.pt"], 2


def weights_to_verify_with(trap: Trap) -> Command:
    save("w.pt", {"weight": trap})
    return ["verify", "teacher.h5", "--teacher", f"{NETS}:net", "--weights", "w.pt", "--data", "npz:train.npz"], 2


# ---- runs ----


def a_checkpoint_with_an_object(trap: Trap) -> Command:
    Path("run").mkdir()
    save("run/resume.pt", {"format": 1, "identity": trap})
    return [*LEARN, "--resume"], 1


def a_checkpoint_of_another_program(trap: Trap) -> Command:
    del trap  # nothing to run in it, and nothing that a resumed run needs
    Path("run").mkdir()
    save("run/resume.pt", {"format": 1, "identity": {}, "student": {"a": torch.zeros(2)}})
    return [*LEARN, "--resume"], 5


def a_finished_student_with_an_object(trap: Trap) -> Command:
    Path("run").mkdir()
    Path("run/run.json").write_text('{"status": "done", "identity": {}, "steps": 1, "last": {}, "best": {}}')
    save("run/last.pt", {"0.weight": trap})
    return [*LEARN, "--resume"], 1


# ---- data ----


def with_array(name: str, values: np.ndarray) -> Command:
    """Data in which one array holds objects."""
    arrays = dict(np.load("train.npz"))
    np.savez("evil.npz", **{**arrays, name: values})
    return ["precompute", "--teacher", f"{NETS}:net", "--data", "npz:evil.npz", "--out", "out"], 1


def inputs_of_objects(trap: Trap) -> Command:
    return with_array("x", np.array([[trap]] * ROWS, object))


def labels_of_objects(trap: Trap) -> Command:
    return with_array("y", np.array([trap] * ROWS, object))


def ids_of_objects(trap: Trap) -> Command:
    return with_array("sample_id", np.array([trap] * ROWS, object))


def class_names_of_objects(trap: Trap) -> Command:
    return with_array("classes", np.array([trap] * CLASSES, object))


def an_array_header_that_is_an_expression(trap: Trap) -> Command:
    """The header of an .npy file is a Python literal; a call is none."""
    header = f"{{'descr': __import__('os').mkdir({trap.marker!r}), 'fortran_order': False, 'shape': (20, 4)}}"
    text = header.encode().ljust(117) + b"\n"
    with zipfile.ZipFile("evil.npz", "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(320))
    return ["precompute", "--teacher", f"{NETS}:net", "--data", "npz:evil.npz", "--out", "out"], 1


def a_bare_pickle_as_data(trap: Trap) -> Command:
    Path("evil.npz").write_bytes(pickle.dumps(trap))
    return [*LEARN[:5], "--data", "npz:evil.npz", "--out", "run"], 1


def postscript_as_an_image(trap: Trap) -> Command:
    """Pillow hands PostScript to the program `gs`, whatever the file's name ends in."""
    Path("photos/cat").mkdir(parents=True)
    Path("photos/cat/a.png").write_bytes(POSTSCRIPT)
    Path("bin").mkdir()
    Path("bin/gs").write_text(f"#!/bin/sh\nmkdir {trap.marker}\n")
    Path("bin/gs").chmod(0o755)
    return ["precompute", "--teacher", f"{NETS}:net", "--data", "folder:photos", "--out", "out"], 1


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EndComments\nshowpage\n"


# ---- caches ----


def a_pickle_as_a_cache(trap: Trap) -> Command:
    Path("evil.h5").write_bytes(pickle.dumps(trap))
    return ["verify", "evil.h5"], 3


def a_pickle_as_a_manifest(trap: Trap) -> Command:
    Path("teacher/manifest.json").unlink()
    Path("teacher/manifest.json").write_bytes(pickle.dumps(trap))
    return ["inspect", "teacher"], 3


def a_pickle_as_a_class_list(trap: Trap) -> Command:
    data = pickle.dumps(trap)
    value = json.loads(Path("teacher/manifest.json").read_bytes())
    value["classes"]["sha256"] = fuzz_reseal.hashlib.sha256(data).hexdigest()
    Path("teacher/manifest.json").unlink()
    Path("teacher/manifest.json").write_bytes(fuzz_reseal.reseal_manifest(value))
    Path("teacher/classes.json").write_bytes(data)
    return ["inspect", "teacher"], 3


def a_pickle_in_the_attribute(trap: Trap) -> Command:
    """The header's JSON text is a protocol 0 pickle, which is ASCII."""
    layout = build_layout(_specs(), ROWS, pickle.dumps(trap, protocol=0).decode("ascii"))
    image = bytearray(layout.size)
    for offset, piece in layout.metadata:
        image[offset : offset + len(piece)] = piece
    Path("evil.h5").write_bytes(image)
    return ["distill", "--cache", "evil.h5", *LEARN[3:]], 3


def _specs() -> tuple[Any, ...]:
    with kdcache.open("teacher.h5") as cache:
        return cache.catalog.schema.specs


def with_views(**views: Any) -> Command:
    """A sound cache that says by which pipeline of transforms its views were drawn."""
    recorded = {"augment": f"{EVIL}:make", "named": False, "seed": 0, "mix": None, "versions": {EVIL: "1"}, **views}
    with kdcache.Writer("views.h5", classes=CLASSES, provenance={"views": recorded}) as writer:
        writer.write(np.arange(ROWS), np.zeros((ROWS, CLASSES), np.float32), np.arange(ROWS) % CLASSES)
    return ["distill", "--cache", "views.h5", *LEARN[3:]], 2


def a_pipeline_of_a_cache_that_is_code(trap: Trap) -> Command:
    del trap
    return with_views()


def a_pipeline_of_a_cache_that_is_called_built_in(trap: Trap) -> Command:
    del trap
    return with_views(named=True)[0], 5


def a_pickle_as_a_plan(trap: Trap) -> Command:
    Path("out/shards").mkdir(parents=True)
    Path("out/plan.json").write_bytes(pickle.dumps(trap))
    return TEACH, 3


def a_plan_that_names_a_module(trap: Trap) -> Command:
    del trap  # the plan is sound, and a module of the name that it gives is in the current folder
    with kdcache.Writer("made", classes=CLASSES, shard_rows=4) as writer:
        writer.write(np.arange(4), np.zeros((4, CLASSES), np.float32))
        value = json.loads(Path("made/plan.json").read_bytes())
    del value["seal"]
    value["provenance"] = {"teacher": {"spec": f"{EVIL}:make"}, "data": {"name": f"{EVIL}:make"}}
    Path("out/shards").mkdir(parents=True)
    Path("out/shards/v000-00000.h5").write_bytes(b"rows of somebody")
    Path("out/plan.json").write_bytes(dump_sealed(value))
    return TEACH, 5


ATTACKS: dict[str, Callable[[Trap], Command]] = {
    attack.__name__: attack
    for attack in (
        *(a_pickled_module, a_state_dict_with_an_object, weights_of_the_old_format, a_bare_pickle_as_weights),
        *(a_bare_pickle_as_safetensors, a_scripted_module_as_weights, a_pickled_teacher),
        *(weights_to_start_a_student_from, weights_to_verify_with, a_checkpoint_with_an_object),
        *(a_checkpoint_of_another_program, a_finished_student_with_an_object, inputs_of_objects, labels_of_objects),
        *(ids_of_objects, class_names_of_objects, an_array_header_that_is_an_expression, a_bare_pickle_as_data),
        *(postscript_as_an_image, a_pickle_as_a_cache, a_pickle_as_a_manifest, a_pickle_as_a_class_list),
        *(a_pickle_in_the_attribute, a_pickle_as_a_plan, a_plan_that_names_a_module),
        *(a_pipeline_of_a_cache_that_is_code, a_pipeline_of_a_cache_that_is_called_built_in),
    )
}


# ---- exported programs ----


class Net(torch.nn.Module):
    """What is exported."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.linear(x)
        return logits


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def rewrite(sound: Path, target: Path, *, program: Any = None, entries: dict[str, bytes] | None = None) -> None:
    """A copy of a `.pt2` archive with another program, and with entries added or replaced; names are whole ones."""
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(target, "w") as archive:
        changed = dict(entries or {})
        for name in source.namelist():
            data = changed.pop(name, None) or source.read(name)
            if program is not None and name.endswith("models/model.json"):
                data = json.dumps(program).encode()
            archive.writestr(name, data)
        for name, data in changed.items():
            archive.writestr(name, data)


def in_programs(program: dict[str, Any], trap: Trap, top: str) -> dict[str, tuple[Any, dict[str, bytes]]]:
    """By name: the JSON of a program, and the archive's entries, of which torch 2.13 would run something."""
    code = f"__import__('os').mkdir({trap.marker!r})"
    size = {"as_expr": {"expr_str": code, "hint": {"as_int": 4}}}

    def with_change(change: Callable[[dict[str, Any]], object]) -> tuple[Any, dict[str, bytes]]:
        value = json.loads(json.dumps(program))
        change(value)
        return value, {}

    def structure(context: Any, kind: str = "builtins.dict") -> Callable[[dict[str, Any]], object]:
        spec = [1, {"type": kind, "context": context, "children_spec": []}]
        return lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(in_spec=json.dumps(spec))

    def add_call(v: dict[str, Any]) -> None:
        node = {"target": "torch.os.mkdir", "metadata": {}, "is_hop_single_tensor_return": None, "name": "evil"}
        call = {"inputs": [{"name": "", "arg": {"as_string": trap.marker}, "kind": 1}], "outputs": [{"as_none": True}]}
        v["graph_module"]["graph"]["nodes"].insert(0, {**node, **call})

    def tensors(v: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = v["graph_module"]["graph"]["tensor_values"]
        return found

    enum = json.dumps({"__enum__": True, "fqn": f"{EVIL}:A", "name": "B"})
    factory = {"default_factory_module": EVIL, "default_factory_name": "a", "dict_context": []}
    pickled = saved(trap)
    config = {"x": {"path_name": "weight_0", "is_param": True, "use_pickle": True, "tensor_meta": None}}
    names = json.dumps(program).replace('"linear"', json.dumps(f"linear; {code}"))
    return {
        "size": with_change(lambda v: tensors(v)["x"]["sizes"].__setitem__(0, size)),
        "size of a tensor called metadata": with_change(
            lambda v: tensors(v).update(metadata={**tensors(v)["x"], "sizes": [size, {"as_int": 3}]})
        ),
        "guard": with_change(lambda v: v.update(guards_code=[f"{code} is None"])),
        "guard behind a size": with_change(lambda v: v.update(guards_code=[f"L['x'].size()[0] >= 0 or {code}"])),
        "operator": with_change(add_call),
        "enumeration": with_change(structure(enum)),
        "default factory": with_change(structure(factory, "collections.defaultdict")),
        "argument": with_change(
            lambda v: v["graph_module"]["module_call_graph"][0]["signature"].update(forward_arg_names=[f"x={code}"])
        ),
        "names of steps": (json.loads(names), {}),
        "old format beside": (
            None,
            {
                "version": b"8.20",
                "serialized_exported_program.json": json.dumps(program).encode(),
                **{f"serialized_{name}.pt": pickled for name in ("state_dict", "constants", "example_inputs")},
            },
        ),
        "pickled weights": (None, {f"{top}/data/weights/model.pt": pickled}),
        "weights listed as pickled": (
            None,
            {f"{top}/data/weights/model_weights_config.json": json.dumps({"config": config}).encode()},
        ),
        "names in capitals": (
            None,
            {f"{top}/DATA/weights/model_weights_config.json": json.dumps({"config": config}).encode()},
        ),
        "sample inputs": (None, {f"{top}/data/sample_inputs/model.pt": pickled}),
    }
