"""`head.h5`: the last layer of a factored teacher as a container, and what a manifest and a plan say about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdcache.errors import CorruptCacheError
from kdcache.format.arrays import ArrayLayout, ArraySpec, layouts_from_json, layouts_to_json
from kdcache.format.encoding import Encoding
from kdcache.format.factored import Factored
from kdcache.format.identity import canonical_json
from kdcache.format.schema import FORMAT_VERSION, check_layout

HEAD_FILE = "head.h5"


@dataclass(frozen=True)
class HeadRecord:
    """The head of a folder: its bytes, its sha256 (hex), and where `weight` and `bias` lie in it."""

    size: int
    sha256: str
    arrays: dict[str, ArrayLayout]

    def to_json(self) -> dict[str, Any]:
        """As in a manifest or a plan."""
        return {"size": self.size, "sha256": self.sha256, "arrays": layouts_to_json(self.arrays)}


def head_specs(features: int) -> tuple[ArraySpec, ArraySpec]:
    """`weight` (C, D) and `bias` (C,), float32."""
    return ArraySpec("weight", "<f4", (features,)), ArraySpec("bias", "<f4")


def head_header(classes: int, features: int) -> str:
    """The root attribute of a head: nothing but what its arrays are, so that equal layers make equal files."""
    return canonical_json({"format": FORMAT_VERSION, "kind": "head", "classes": classes, "features": features})


def parse_head(value: Any, encoding: Encoding, *, where: str) -> HeadRecord | None:
    """The head that a manifest or a plan lists; None where rows need none.

    Args:
        value: the field `head`, None where there is no such field.
        encoding: of the rows, which names the sha256.
        where: for messages.

    Raises:
        CorruptCacheError: it is missing, too many, another one than that of the rows, or of another shape.
    """
    if not isinstance(encoding, Factored):
        if value is not None:
            raise CorruptCacheError(f"{where}: a head stands beside factored rows only, found {value!r:.80}")
        return None
    if not isinstance(value, dict) or set(value) != {"size", "sha256", "arrays"}:
        raise CorruptCacheError(f"{where}: factored rows need a head with size, sha256 and arrays, found {value!r:.80}")
    size, sha256 = value["size"], value["sha256"]
    if type(size) is not int or not 0 < size < 2**48:
        raise CorruptCacheError(f"{where}: the head's size must be a positive integer, found {size!r:.50}")
    if sha256 != encoding.head:
        raise CorruptCacheError(f"{where}: the head has the sha256 {sha256!r:.80}, the rows name {encoding.head}")
    arrays = layouts_from_json(value["arrays"], where=f"{where}, head")
    expected = {spec.name: spec for spec in head_specs(encoding.features)}
    check_layout(expected, arrays, encoding.num_classes, size, where=f"{where}, head")
    return HeadRecord(size, encoding.head, arrays)
