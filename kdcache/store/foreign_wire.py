"""How the process that reads a foreign file talks to the one that asked: frames of a kind, a length and bytes.

The request goes one way (JSON on stdin), everything else the other. A frame is a letter, eight bytes of length and the
bytes: `J` holds a JSON object, `D` the rows of one array, little-endian. Nothing is pickled, and the asking side knows
the length of each `D` before it comes, so that a reader which was taken over can send wrong numbers but nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from kdcache.errors import printable

JSON, DATA = b"J", b"D"
HEAD = struct.Struct("<cQ")
MAX_JSON_BYTES = 1 << 20
MAX_LISTED = 200
MAX_BLOCK_ROWS = 1 << 16
BLOCK_BYTES = 8 << 20
ONLY_ARRAY = "array"  # what the one array of an .npy file is called
ROLES = ("logits", "labels", "ids")
FILE_FD, CHANNEL_FD = 3, 4


def rows_at_once(row_bytes: int, chunk_rows: Sequence[int] = ()) -> int:
    """How many rows go into a block: about 8 MiB of them, and whole chunks where these are smaller than that.

    >>> rows_at_once(4000)
    2097
    >>> rows_at_once(4000, [500])
    2000
    """
    rows = max(1, min(BLOCK_BYTES // max(1, row_bytes), MAX_BLOCK_ROWS))
    largest = max(chunk_rows, default=1)
    return rows - rows % largest if largest <= rows else rows


def clipped(text: str, limit: int = 600) -> str:
    """Text out of a file in one line that a terminal does not obey, cut where it is long."""
    clean = printable(text)
    return clean if len(clean) <= limit else f"{clean[:limit]}..."
