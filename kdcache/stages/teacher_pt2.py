"""`pt2:FILE`: a program saved with `torch.export.save`.

Two things are checked that would otherwise go wrong late or silently. The batch dimension must be dynamic, since
batches never cross a shard's border and the last one of a shard is short. And the program must have been exported in
eval mode: exported dropout and batch norm cannot be switched afterwards.

torch.export.load unpickles what an archive marks as pickled (custom objects, unusual weights, old formats), and
evaluates texts of the program. Archives with more than plain tensors and arithmetic in them are refused before torch
sees them. What is left is still a program: run only one that you would run as code.
"""

from __future__ import annotations

import contextlib
import io
import logging
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from kdcache.errors import DataError, KDCacheError, UsageError
from kdcache.format.strict_json import load_json
from kdcache.stages.pt2_program import UnsafeProgramError, check_graph, check_text
from kdcache.stages.specs import one_line

USAGE = "pt2:FILE"

_TRAIN_FLAGS = frozenset({"train", "training"})
_SAVE_AGAIN = "save it again with torch.export.save of torch 2.8 or later"


class ExportedTeacher(nn.Module):
    """An exported program as a module whose mode is fixed.

    Args:
        program: from `torch.export.load`.
    """

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        super().__init__()
        self.forward_keys = tuple(program.graph_signature.user_inputs)
        self.positional = program.call_spec.in_spec.children()[0].num_leaves
        self.max_batch = _check_batch_dimension(program)
        self.program = program.module()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the program returns; it tells positional from named arguments, as they were when it was exported."""
        if not args:
            args = tuple(kwargs.pop(key) for key in self.forward_keys[: self.positional] if key in kwargs)
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> ExportedTeacher:
        """Marks the mode; the program itself cannot change it, and torch raises when it is asked to."""
        self.training = mode
        return self


def load_pt2(path: Path) -> ExportedTeacher:
    """The program in a `.pt2` file.

    Raises:
        UsageError: no such file, a fixed batch, exported in training mode, or an archive that would be unpickled.
        DataError: not a .pt2 file, or a damaged one.
    """
    if not path.is_file():
        raise UsageError(f"pt2: there is no file {path}; expected {USAGE}")
    refuse_pickles(path)
    try:
        with _without_warnings():
            program = torch.export.load(path)
        check_graph(program)
        _check_mode(program)
        return ExportedTeacher(program)
    except KDCacheError:
        raise
    except UnsafeProgramError as error:
        raise _unsafe(path.name, str(error)) from error
    # The deserialiser raises assertion, key, type and runtime errors on damaged programs.
    except Exception as error:
        raise DataError(f"pt2: {path.name} cannot be loaded: {one_line(error)}") from error


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """torch logs the traceback of an error before it raises another one; what it raises tells enough."""
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def refuse_pickles(path: Path) -> None:
    """Looks through a `.pt2` archive for everything that `torch.export.load` would unpickle, evaluate or import.

    Raises:
        UsageError: there is such an entry, or the archive is of a format before torch 2.8.
        DataError: not a zip archive, or a damaged one.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = [PurePosixPath(name) for name in archive.namelist()]
        inside = sorted("/".join(name.parts[1:]) for name in names)  # below the archive's own folder
        # Beside the one folder torch would look for the older format, if it fails to load the newer one.
        if "archive_format" not in inside or len({name.parts[0] for name in names}) > 1:
            raise UsageError(f"pt2: {path.name} is of a format before torch 2.8, which is unpickled; {_SAVE_AGAIN}")
        if len({name.casefold() for name in inside}) < len(inside):  # torch looks names up in either case
            raise DataError(f"pt2: {path.name} has two entries of one name")
        reader = torch._C.PyTorchFileReader(str(path))
        if sorted(reader.get_all_records()) != inside:
            raise DataError(f"pt2: {path.name} holds other entries for torch than for zip readers")
        for name in inside:
            _refuse_entry(name, reader, path.name)
    except KDCacheError:
        raise
    # zipfile, zlib and torch raise a dozen types between them on damaged files.
    except Exception as error:
        raise DataError(f"pt2: {path.name} is not a readable .pt2 archive: {one_line(error)}") from error


def _refuse_entry(name: str, reader: torch._C.PyTorchFileReader, file: str) -> None:
    why = ""
    if name.startswith("models/"):
        try:
            check_text(reader.get_record(name))
        except UnsafeProgramError as error:
            why = str(error)
    elif name.startswith("data/sample_inputs/"):
        try:
            content = reader.get_record(name)
            if content:
                torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception:  # whatever it is, torch.export.load would go on to unpickle it
            why = "its sample inputs are more than tensors and plain containers"
    elif name.startswith("data/aotinductor/"):
        why = "it holds machine code"
    elif name.startswith(("data/weights/", "data/constants/")):
        kind = PurePosixPath(name).name
        if kind.endswith("_config.json"):
            entries = load_json(reader.get_record(name), where=f"{file}: {name}").get("config")
            if not isinstance(entries, dict) or not all(_is_plain_tensor(entry) for entry in entries.values()):
                why = f"{name} lists pickled objects"
        elif not kind.startswith(("weight_", "tensor_")):
            why = f"{name} is a pickled object"
    if why:
        raise _unsafe(file, why)


def _unsafe(file: str, why: str) -> UsageError:
    return UsageError(
        f"pt2: {file} is refused, since loading it would run code from the file: {why}. Export a model of plain "
        f"tensors, or give the teacher as module:factory with --weights"
    )


def _is_plain_tensor(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.get("use_pickle") is False
        and isinstance(entry.get("path_name"), str)
        and entry["path_name"].startswith(("weight_", "tensor_"))
    )


def _check_mode(program: torch.export.ExportedProgram) -> None:
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        values = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
        if any(values.get(flag) is True for flag in _TRAIN_FLAGS):
            raise UsageError(
                f"pt2: the program was exported in training mode ({schema.name} at {node.name}): its outputs would be "
                f"random or depend on the batch; call model.eval() and export it again"
            )


def _check_batch_dimension(program: torch.export.ExportedProgram) -> int | None:
    """The largest batch that the program takes, None for any."""
    inputs = set(program.graph_signature.user_inputs)
    shapes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs and isinstance(node.meta.get("val"), Tensor)
    ]
    batches = [shape[0] for shape in shapes if len(shape)]
    dynamic = [size for size in batches if not isinstance(size, int)]
    if not dynamic:
        raise UsageError(
            f"pt2: the program takes batches of {', '.join(map(str, batches)) or 'no size'} only, and the last batch "
            f"of a shard is shorter. Export it with dynamic_shapes={{'x': {{0: torch.export.Dim('batch')}}}}"
        )
    limits = [program.range_constraints.get(size.node.expr) for size in dynamic]
    upper = [int(limit.upper) for limit in limits if limit is not None and limit.upper.is_Integer]
    return min(upper) if upper else None
