"""Versions of the libraries whose arithmetic decides the pixels: what decodes images, and what draws views.

A decoder is known by more than its package: Pillow of one version comes with libjpeg-turbo in one wheel and with
another libjpeg in a distribution, and the pixels of a JPEG are those of that library.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

# Names in a cache decide what is looked up, so only these are ever imported.
_PACKAGES = {
    "torch": "torch",
    "torchvision": "torchvision",
    "albumentations": "albumentations",
    "timm": "timm",
    "numpy": "numpy",
    "PIL": "Pillow",
    "cv2": "OpenCV",
    "kdcache": "kdcache",
}
_NOT_HERE = "not installed"


def pillow_versions() -> dict[str, str]:
    """Pillow, and the libraries that it decodes JPEG, PNG and WebP with, as far as it has them.

    Raises:
        ImportError: Pillow is not installed.
    """
    from PIL import __version__, features

    found = {"pillow": __version__, "libjpeg_turbo": _feature(features, "libjpeg_turbo")}
    if found["libjpeg_turbo"] is None:  # another libjpeg
        found["libjpeg"] = _feature(features, "jpg")
    found["zlib"] = _feature(features, "zlib")
    found["libwebp"] = _feature(features, "webp")
    return {name: version for name, version in found.items() if version is not None}


def changed_versions(provenance: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(library, version in the dump, version here) of each that decoded or augmented, and is another here.

    Args:
        provenance: of the cache; what it does not say, or says in another form than kdcache writes, is left out.
    """
    recorded: dict[str, tuple[str, str]] = {}
    decoder = _part(provenance, "data", "decoder")
    if decoder:
        try:
            here = pillow_versions()
        except ImportError:
            here = {}
        for name in ("pillow", "libjpeg_turbo", "libjpeg", "zlib", "libwebp"):
            if isinstance(decoder.get(name), str):
                recorded[name] = decoder[name], here.get(name, _NOT_HERE)
    drawn = _part(provenance, "views", "versions")
    for name, title in _PACKAGES.items():
        if isinstance(drawn.get(name), str) and title.lower() not in recorded:
            recorded[title] = drawn[name], _installed(name)
    return [(name, there, here) for name, (there, here) in recorded.items() if there != here]


def _installed(name: str) -> str:
    try:
        return str(getattr(importlib.import_module(name), "__version__", ""))
    except ImportError:
        return _NOT_HERE


def _feature(features: Any, name: str) -> str | None:
    if name in features.features:
        return str(features.version(name)) if features.check(name) else None
    return None if features.version(name) is None else str(features.version(name))


def _part(provenance: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    value: Any = provenance
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}
