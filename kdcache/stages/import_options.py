"""The options of `import`: one frozen record, from which the command line is generated."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdcache.errors import UsageError
from kdcache.format.encodings import DTYPES, EncodingChoice
from kdcache.stages.option import flag, option
from kdcache.stages.precompute_options import DTYPE_HELP, TEACHER_SAW, TEMPERATURES_HELP, TOP_K_HELP, choice_of

LOGITS, LOG_PROBABILITIES, PROBABILITIES = KINDS = ("logits", "log-probabilities", "probabilities")
_BASE_SECONDS = 60
_BYTES_PER_SECOND = 10_000_000  # a tenth of what one core unpacks of gzip


@dataclass(frozen=True)
class ImportOptions:
    """What `import_cache` is asked to do; every field has a default and a help text in its metadata."""

    logits: str | None = option(None, "Array of logits (N, C, ...); without it, the arrays are listed.", group="arrays")
    labels: str | None = option(None, "Array of integer labels (N,), -1 for none.", group="arrays")
    ids: str | None = option(
        None, "Array of sample ids (N,), integers or text (default: the row's number).", group="arrays"
    )
    kind: str | None = option(
        None,
        "What --logits holds (default: logits; what looks like probabilities is refused). The logarithm of "
        "probabilities is stored, of 0 as that of 1.2e-38.",
        group="arrays",
        choices=KINDS,
    )
    class_names: Path | None = option(None, "JSON list of the ordered class names.", group="arrays")

    out: Path | None = option(None, "Folder of the cache, or a name in .h5 for one file.", group="cache")
    dtype: str = option("float16", DTYPE_HELP, group="cache", choices=DTYPES)
    top_k: int | None = option(None, TOP_K_HELP, group="cache")
    temperatures: str | None = option(None, TEMPERATURES_HELP, group="cache")
    shard_rows: int | None = option(None, "Rows of a shard (default: up to 131,072, and 256 MiB).", group="cache")
    teacher_saw: str = option("unknown", "Was the teacher trained on these rows?", group="cache", choices=TEACHER_SAW)
    licence: str | None = option(None, "Licence and terms of the logits, for the card.", group="cache")
    overwrite: bool = option(False, "Replace the cache at --out.", group="cache")

    memory_limit: int = option(
        4096, "MiB that the process which reads the file may allocate (one chunk, unpacked).", group="limits"
    )
    time_limit: int | None = option(
        None, "Seconds by the clock (default: 60, and 1 for every 10 MB of the file).", group="limits"
    )
    quiet: bool = option(False, "No progress on stderr.", group="run")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            choices, value = field.metadata["choices"], getattr(self, field.name)
            if choices and value is not None and value not in choices:
                raise UsageError(f"{flag(field.name)} {value!r} is not known; choose one of {', '.join(choices)}")
        for name in ("shard_rows", "memory_limit", "time_limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} must be at least 1, found {value}")
        choice_of(self.dtype, self.top_k, self.temperatures)

    @property
    def encoding(self) -> EncodingChoice:
        """What the options say about the encoding."""
        return choice_of(self.dtype, self.top_k, self.temperatures)

    def seconds_for(self, file_bytes: int) -> int:
        """The time limit for a file of that size."""
        return self.time_limit or _BASE_SECONDS + file_bytes // _BYTES_PER_SECOND


def options_of(settings: dict[str, Any]) -> ImportOptions:
    """The record for keyword arguments; paths may be text.

    Raises:
        UsageError: an unknown name, or a value out of range.
    """
    known = {f.name for f in dataclasses.fields(ImportOptions)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise UsageError(f"import_cache has no setting {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    paths = {name: Path(settings[name]) for name in ("out", "class_names") if settings.get(name) is not None}
    return ImportOptions(**{**settings, **paths})
