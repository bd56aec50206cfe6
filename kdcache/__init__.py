"""Teacher logits computed once, stored in plain HDF5, and joined to students by sample id.

    cache = kdcache.open("teacher.h5")
    loader = DataLoader(kdcache.join(dataset, cache), batch_size=256, shuffle=True)
    criterion = kdcache.DistillationLoss(alpha=0.9, temperature=4.0)

Attributes are looked up when they are first used (PEP 562), so that `import kdcache` takes some milliseconds and
loads neither torch nor h5py: `kdcache inspect` answers before torch would have been imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kdcache.errors import (
    CorruptCacheError,
    CoverageError,
    DataError,
    IncompleteCacheError,
    InterruptedRunError,
    KDCacheError,
    LogitsError,
    MismatchError,
    MissingExtraError,
    StorageError,
    UsageError,
)
from kdcache.version import __version__

if TYPE_CHECKING:
    from kdcache.format.identity import input_digest
    from kdcache.stages.calibrate import calibrate
    from kdcache.stages.distill import distill
    from kdcache.stages.distill_options import DistillOptions
    from kdcache.stages.ensemble_cache import ensemble
    from kdcache.stages.import_cache import import_cache
    from kdcache.stages.moving_teacher import MovingTeacher
    from kdcache.stages.peer import Peer
    from kdcache.stages.precompute import precompute
    from kdcache.stages.refresh import refresh
    from kdcache.stages.report import report
    from kdcache.stages.suspects import suspects
    from kdcache.stages.sweep import sweep
    from kdcache.stages.sweep_options import SweepOptions
    from kdcache.store.cache import Cache, open
    from kdcache.store.card import write_card
    from kdcache.store.convert import convert
    from kdcache.store.export import export
    from kdcache.store.merge import merge
    from kdcache.store.rows import TeacherRows
    from kdcache.store.verify import verify
    from kdcache.store.writer import Writer
    from kdcache.train import losses, views
    from kdcache.train.attach import attach
    from kdcache.train.criterion import DistillationLoss
    from kdcache.train.join import join
    from kdcache.train.with_ids import with_ids

__all__ = [
    "Cache",
    "CorruptCacheError",
    "CoverageError",
    "DataError",
    "DistillOptions",
    "DistillationLoss",
    "IncompleteCacheError",
    "InterruptedRunError",
    "KDCacheError",
    "LogitsError",
    "MismatchError",
    "MissingExtraError",
    "MovingTeacher",
    "Peer",
    "StorageError",
    "SweepOptions",
    "TeacherRows",
    "UsageError",
    "Writer",
    "__version__",
    "attach",
    "calibrate",
    "convert",
    "distill",
    "ensemble",
    "export",
    "import_cache",
    "input_digest",
    "join",
    "losses",
    "merge",
    "open",
    "precompute",
    "refresh",
    "report",
    "suspects",
    "sweep",
    "verify",
    "views",
    "with_ids",
    "write_card",
]

_HOMES = {
    "Cache": "kdcache.store.cache",
    "DistillOptions": "kdcache.stages.distill_options",
    "DistillationLoss": "kdcache.train.criterion",
    "MovingTeacher": "kdcache.stages.moving_teacher",
    "Peer": "kdcache.stages.peer",
    "SweepOptions": "kdcache.stages.sweep_options",
    "TeacherRows": "kdcache.store.rows",
    "Writer": "kdcache.store.writer",
    "attach": "kdcache.train.attach",
    "calibrate": "kdcache.stages.calibrate",
    "convert": "kdcache.store.convert",
    "distill": "kdcache.stages.distill",
    "ensemble": "kdcache.stages.ensemble_cache",
    "export": "kdcache.store.export",
    "import_cache": "kdcache.stages.import_cache",
    "input_digest": "kdcache.format.identity",
    "join": "kdcache.train.join",
    "losses": "kdcache.train.losses",
    "merge": "kdcache.store.merge",
    "open": "kdcache.store.cache",
    "precompute": "kdcache.stages.precompute",
    "refresh": "kdcache.stages.refresh",
    "report": "kdcache.stages.report",
    "suspects": "kdcache.stages.suspects",
    "sweep": "kdcache.stages.sweep",
    "verify": "kdcache.store.verify",
    "views": "kdcache.train.views",
    "with_ids": "kdcache.train.with_ids",
    "write_card": "kdcache.store.card",
}

_MODULES = ("losses", "views")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kdcache' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    value = home if name in _MODULES else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
