"""The side file of `kdcache calibrate`: what to do to the logits of one cache, bound to its root hash.

Sealed JSON, so that an edited or damaged file is refused, as is the file of another cache: a temperature of other
logits would soften these by a wrong amount without a word.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from kdcache.errors import CorruptCacheError, MismatchError, UsageError
from kdcache.format.identity import fingerprint
from kdcache.format.sealed import dump_sealed, load_sealed
from kdcache.format.strict_json import MAX_JSON_BYTES
from kdcache.store import posix
from kdcache.store.cache import Cache
from kdcache.train.calibrated import Calibration, check_serves

FORMAT = 1
SUFFIX = ".calibration.json"
_KEYS = {"kdcache_calibration", "root", "method", "temperature", "scale", "bias", "fitted_on", "before", "after"}
_ADVICE = "make it again with `kdcache calibrate`"


@final
@dataclass(frozen=True)
class StoredCalibration:
    """A calibration as a file holds it.

    Attributes:
        calibration: what is done to the logits.
        root: of the cache whose logits it is for.
        method: temperature, bias or vector.
        fitted_on: `cache`, `root`, `teacher_seen`, `seed`, `holdout` and numbers of rows: what it was fitted to.
        before: measured on the rows that were held out, without it.
        after: and with it; None where a number cannot be told.
    """

    calibration: Calibration
    root: str
    method: str
    fitted_on: dict[str, Any]
    before: dict[str, Any]
    after: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The content of the file, without its seal."""
        scale, bias = self.calibration.scale, self.calibration.bias
        return {
            "kdcache_calibration": FORMAT,
            "root": self.root,
            "method": self.method,
            "temperature": float(self.calibration.temperature),
            "scale": None if scale is None else list(scale),
            "bias": None if bias is None else list(bias),
            "fitted_on": self.fitted_on,
            "before": _finite(self.before),
            "after": _finite(self.after),
        }

    def describe(self) -> dict[str, Any]:
        """For a run record: everything but the numbers of single classes, and the seal, which stands for them."""
        content = self.to_json()
        shown = {name: value for name, value in content.items() if name not in ("scale", "bias")}
        return {**shown, "seal": fingerprint(content)}


def default_path(cache: Cache) -> Path:
    """Beside the cache: its name and `.calibration.json`."""
    return cache.path.with_name(cache.path.name + SUFFIX)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Refuses a path that is taken, before anything is computed.

    Raises:
        UsageError: it exists and `overwrite` is not asked for, or is no calibration.
    """
    if not posix.exists(path):
        return
    if not overwrite:
        raise UsageError(f"{path} exists; pass --overwrite to replace it, or another -o FILE")
    try:
        _parse(path)
    except CorruptCacheError:
        raise UsageError(f"{path} is no calibration file, so it is not replaced; choose another -o FILE") from None


def save_calibration(path: Path, stored: StoredCalibration, *, overwrite: bool) -> None:
    """Writes the file.

    Raises:
        UsageError: it exists and `overwrite` is not asked for.
        StorageError: it cannot be written.
    """
    if not posix.write_file(path, dump_sealed(stored.to_json()), replace=overwrite):
        raise UsageError(f"{path} exists; pass --overwrite to replace it, or another -o FILE")


def read_calibration(path: str | Path) -> StoredCalibration:
    """What a file holds, of whatever cache it is.

    Raises:
        CorruptCacheError: not what `kdcache calibrate` wrote.
        UsageError: no such file.
    """
    return _parse(Path(path))


def load_calibration(path: str | Path, cache: Cache) -> StoredCalibration:
    """The calibration of a cache.

    Args:
        path: what `kdcache calibrate` wrote.
        cache: it must be of this one.

    Raises:
        MismatchError: it is of another cache.
        UsageError: no such file, or this cache's rows cannot serve it.
        CorruptCacheError: not what `kdcache calibrate` wrote.
    """
    where = Path(path)
    stored = _parse(where)
    if stored.root != cache.root:
        raise MismatchError(
            f"{where.name} calibrates the cache with the root hash {stored.root}, and {cache.path.name} has "
            f"{cache.root}: it belongs to other logits. Run `kdcache calibrate {cache.path.name}`"
        )
    check_serves(stored.calibration, cache.encoding)
    return stored


def _parse(path: Path) -> StoredCalibration:
    if not posix.exists(path):
        raise UsageError(f"there is no file {path}: a calibration is what `kdcache calibrate` writes")
    content = load_sealed(posix.read_file(path, MAX_JSON_BYTES), where=path.name, advice=_ADVICE)
    version = content.get("kdcache_calibration")
    if type(version) is not int or version != FORMAT or content.keys() != _KEYS:
        raise CorruptCacheError(
            f"{path.name} is no calibration of format {FORMAT} (its keys: {sorted(content)!r:.200}); {_ADVICE}"
        )
    root, method, temperature = content["root"], content["method"], content["temperature"]
    notes = [content[name] for name in ("fitted_on", "before", "after")]
    texts = all(isinstance(text, str) for text in (root, method))
    if not texts or type(temperature) is not float or not all(isinstance(note, dict) for note in notes):
        raise CorruptCacheError(f"{path.name}: a field has another type than expected; {_ADVICE}")
    scale, bias = (_numbers(content[name], path) for name in ("scale", "bias"))
    try:
        calibration = Calibration(temperature, scale, bias)
    except UsageError as error:
        raise CorruptCacheError(f"{path.name}: {error}; {_ADVICE}") from error
    return StoredCalibration(calibration, root, method, *notes)


def _numbers(values: Any, path: Path) -> tuple[float, ...] | None:
    if values is None:
        return None
    if not isinstance(values, list) or any(type(value) is not float for value in values):
        raise CorruptCacheError(f"{path.name}: scale and bias are lists of fractions or null; {_ADVICE}")
    return tuple(values)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Infinities as None, for JSON."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
