"""Who computed and who published what: one line an event, in a file that all processes of a dump append to.

A line is one `write` to a descriptor opened with O_APPEND, so that lines never mix and those of a killed process
stay. `publishing` and `committing` are written before the act, `published` and `committed` after it; a kill between
them leaves the first alone.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def install(path: str) -> None:
    """Traces this process into `path`, under the name TASK_PROCESS (and its rank, where a launcher gave one)."""
    from kdcache.format.manifest import shard_name
    from kdcache.stages import dump_sink
    from kdcache.store import dump, posix

    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    who = f"{os.environ.get('TASK_PROCESS', 'unnamed')}:{os.environ.get('RANK', '0')}"
    put, commit, publish = dump_sink.ShardSink.put, dump.DumpFolder.commit, posix.publish

    def note(*words: object) -> None:
        os.write(fd, f"{who} {' '.join(map(str, words))}\n".encode())

    def traced_put(self: Any, batch: Any) -> None:
        note("computed", shard_name(batch.claim.view, batch.claim.index), batch.start, batch.stop)
        put(self, batch)

    def traced_commit(self: Any, writer: Any, record: Any, index: int) -> None:
        note("committing", record.file)
        commit(self, writer, record, index)
        note("committed", record.file)

    def traced_publish(temporary: Path, final: Path) -> bool:
        note("publishing", final.name)
        is_new = publish(temporary, final)
        note("published" if is_new else "found", final.name)
        return is_new

    dump_sink.ShardSink.put = traced_put
    dump.DumpFolder.commit = traced_commit
    posix.publish = traced_publish
