"""The versions that a dump's bytes depend on, for its provenance. torch's is added by who runs a teacher."""

from __future__ import annotations

import h5py
import numpy as np

from kdcache.version import __version__


def versions() -> dict[str, str]:
    """kdcache, NumPy, h5py and HDF5, as text."""
    return {
        "kdcache": __version__,
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
    }
