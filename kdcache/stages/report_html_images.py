"""Small pictures of suspicious samples, where the data are images: PNG files of at most 64 pixels a side.

An input counts as an image if it has the shape (H, W), or (C, H, W) or (H, W, C) with C of 1 or 3. Values of 0 to 1 and
bytes are shown as they are; others (normalised inputs) are stretched over their own range, so that colours are not
those of the file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from kdcache.errors import MissingExtraError
from kdcache.stages.data import LoadedData
from kdcache.train.ids import resolve
from kdcache.train.items import first_input

MAX_PICTURES = 50
MAX_SIDE = 64
_SMALLEST, _CHANNELS = 4, (1, 3)


def thumbnails(data: LoadedData, sample_ids: Sequence[Any]) -> dict[str, bytes]:
    """PNG files of the first 50 samples, by id as text; empty where the data are no images.

    Args:
        data: the data set of the cache.
        sample_ids: of the samples to show, as the report lists them; those that the data lack are left out.

    Raises:
        MissingExtraError: Pillow is not installed.
        KDCacheError: the data set cannot be read, or has no ids.
    """
    if not len(sample_ids):
        return {}
    known = resolve(data.dataset, sample_ids=data.sample_ids)
    wanted = dict.fromkeys(_text(one) for one in sample_ids[:MAX_PICTURES])
    places = {name: place for place, one in enumerate(known.tolist()) if (name := _text(one)) in wanted}
    found: dict[str, bytes] = {}
    for name in wanted:
        if name not in places:
            continue
        pixels = as_pixels(first_input(data.dataset[places[name]]))
        if pixels is None:
            return {}
        found[name] = _png(pixels)
    return found


def as_pixels(value: Any) -> np.ndarray | None:
    """An input as (H, W) or (H, W, 3) uint8; None where it is no image."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
    try:
        pixels = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if pixels.dtype.kind not in "fuib" or not 2 <= pixels.ndim <= 3:
        return None
    if pixels.ndim == 3 and pixels.shape[0] in _CHANNELS:
        pixels = np.moveaxis(pixels, 0, -1)
    if min(pixels.shape[:2]) < _SMALLEST or (pixels.ndim == 3 and pixels.shape[-1] not in _CHANNELS):
        return None
    if pixels.dtype != np.uint8:
        shares = np.nan_to_num(pixels.astype(np.float64), posinf=0, neginf=0)
        low, high = float(shares.min()), float(shares.max())
        if low < 0 or high > 1:
            shares = (shares - low) / (high - low or 1)
        pixels = np.round(255 * shares).astype(np.uint8)
    return pixels[..., 0] if pixels.ndim == 3 and pixels.shape[-1] == 1 else pixels


def _text(sample_id: Any) -> str:
    return sample_id.decode("utf-8", "replace") if isinstance(sample_id, bytes) else str(sample_id)


def _png(pixels: np.ndarray) -> bytes:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtraError.of("pillow", extra="vision", what="thumbnails") from error
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
