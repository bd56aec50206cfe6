"""Runs mutants one after another in a process of little memory: `fuzz_child.py FOLDER TARGET:FIRST:COUNT ...`.

Prints a JSON summary. Every number is a seed: `fuzz_child.py FOLDER one_file:1234:1` repeats one case and leaves the
mutant in FOLDER. What kills the process (a crash; SIGPROF after a second of CPU time in one case) leaves the case in
FOLDER/at.
"""

from __future__ import annotations

import collections
import json
import os
import resource
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import fuzz_bases
import fuzz_doors
import numpy as np
from fuzz_dumps import PlanFile, RecordFile
from fuzz_regressions import Regressions
from fuzz_targets import Case, ClassesFile, FileHeader, HeadFile, ManifestFile, OneFile, Shard, Target

TARGETS: dict[str, type[Target]] = {
    "one_file": OneFile,
    "file_header": FileHeader,
    "shard": Shard,
    "manifest": ManifestFile,
    "classes": ClassesFile,
    "head": HeadFile,
    "plan": PlanFile,
    "record": RecordFile,
    "regressions": Regressions,
}
EXTRA_BYTES = 200 << 20
HANG_CPU_SECONDS = 1.0
HANG_WALL_SECONDS = 120.0  # for a wait that takes no CPU time; generous, since the machine may be busy
KEPT_EVERY = 50


def limit_memory() -> None:
    """A mutant may ask for 200 MiB more than the sound caches need; an allocation above fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + EXTRA_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def check(case: Case) -> str:
    """What became of a mutant: `refused`, `damaged` (rows were read, and `verify` finds it), or accepted.

    Accepted are mutants that `verify` finds sound: `same` rows as the original's, `other` ones, which plain h5py must
    confirm, or dumps that were `finished`.
    """
    outcome, base = case.outcome, case.base
    if outcome.rows is None or outcome.numbers is None:
        return "finished" if outcome.sound else "refused"
    if not outcome.sound:
        return "damaged"
    numbers = outcome.numbers[outcome.numbers < base.samples * len(base.views)]
    original = {name: array[numbers] for name, array in base.rows.items()}
    return "same" if fuzz_doors.same(outcome.rows, original) else "other"


def keep(case: Case, kept: Path) -> None:
    """Puts a mutant and the rows that were read of it where plain h5py can be asked."""
    assert case.outcome.rows is not None
    assert case.outcome.numbers is not None
    files = [case.path] if case.path.is_file() else sorted(p for p in case.path.rglob("*") if p.is_file())
    for file in files:
        target = kept / "cache" / (file.name if case.path.is_file() else file.relative_to(case.path))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    np.savez(kept / "rows.npz", numbers=case.outcome.numbers, **case.outcome.rows)


def run(name: str, target: Target, first: int, count: int, folder: Path) -> dict[str, Any]:
    """Cases `first` to `first + count - 1` of a target."""
    results: collections.Counter[str] = collections.Counter()
    refusals: collections.Counter[str] = collections.Counter()
    failed = []
    at = os.open(folder / "at", os.O_CREAT | os.O_WRONLY)
    for number in range(first, first + count):
        os.pwrite(at, f"{name}:{number}:1".ljust(40).encode(), 0)
        signal.setitimer(signal.ITIMER_PROF, HANG_CPU_SECONDS)
        signal.setitimer(signal.ITIMER_REAL, HANG_WALL_SECONDS)
        try:
            case = target.case(number)
            result = check(case)
        except Exception:  # whatever it is: nothing but our errors may come out, and those do not reach this line
            failed.append(f"{name}:{number}:1")
            if len(failed) <= 5:
                print(f"--- {failed[-1]} ---", file=sys.stderr)
                traceback.print_exc(limit=-6)
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        results[result] += 1
        refusals.update(f"{door} {kind}" for door, kind in case.outcome.refusals.items())
        if result == "other" or (result == "same" and results[result] % KEPT_EVERY == 1):
            keep(case, folder / "kept" / f"{name}-{number}")
    os.close(at)
    return {"cases": count, "failed": failed, "results": results, "refusals": refusals}


def main(folder: Path, jobs: list[str]) -> int:
    """Prepares all targets, limits the memory, and runs them."""
    warnings.simplefilter("error")
    fuzz_bases.without_fsync()
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    (folder / "kept").mkdir()
    wanted = [(name, int(first), int(count)) for name, first, count in (job.split(":") for job in jobs)]
    targets = {name: TARGETS[name](folder / name) for name, _, _ in wanted}
    for target in targets.values():
        target.warm_up()
    limit_memory()
    summary = {name: run(name, targets[name], first, count, folder) for name, first, count in wanted}
    print(json.dumps(summary))
    return 1 if any(part["failed"] for part in summary.values()) else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
