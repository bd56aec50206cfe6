"""Every error that kdcache raises on purpose, and the exit code that the command line gives it.

    KDCacheError                    1   anything that went wrong
    ├── StorageError                1   the disk or the file system said no (full, read-only, I/O error)
    ├── LogitsError                 1   the teacher returned something that cannot be stored (NaN, wrong rank ...)
    ├── DataError                   1   the data set returned something that cannot be used
    ├── UsageError                  2   a call or an option that cannot be meant
    │   └── MissingExtraError       2   an optional package is not installed
    ├── CorruptCacheError           3   bytes that are not what our writer wrote
    ├── IncompleteCacheError        4   a dump that is not finished, or a shard that is not there
    ├── MismatchError               5   two things that do not belong together (teacher, data, classes, view)
    │   └── CoverageError           5   samples that the cache does not hold
    └── InterruptedRunError        75   stopped by a signal; run the same command again to go on

Each carries one message string, so that it pickles and survives a DataLoader worker. A message says
what was found, what was expected, where, and what to do next.
"""

from __future__ import annotations


class KDCacheError(Exception):
    """Base of all errors raised by kdcache; `exit_code` is what the command line exits with.

    Messages quote names out of files that others wrote, so what could move a terminal's cursor is escaped here.
    """

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__("\n".join(map(printable, message.split("\n"))))


class StorageError(KDCacheError):
    """The disk or the file system refused: full, not writable, read-only, an I/O error."""


class LogitsError(KDCacheError):
    """The teacher's output cannot be stored: NaN, +inf, a wrong rank, a changing width."""


class DataError(KDCacheError):
    """The data set, or an item of it, cannot be used: no length, labels out of range, duplicate ids."""


class UsageError(KDCacheError):
    """A call or an option that cannot be meant: unknown scheme, alpha outside [0, 1], out path exists."""

    exit_code = 2


class MissingExtraError(UsageError):
    """An optional package is missing; the message holds the `pip install "kdcache[NAME]"` to run."""

    @classmethod
    def of(cls, package: str, *, extra: str, what: str) -> MissingExtraError:
        """The error for `what` needing `package`, which `extra` installs."""
        return cls(f'{what} needs the package {package}, which is not installed. Run: pip install "kdcache[{extra}]"')


class CorruptCacheError(KDCacheError):
    """Bytes that are not what our writer wrote; nothing of them was used."""

    exit_code = 3


class IncompleteCacheError(KDCacheError):
    """A dump without a manifest, or a manifest whose shard is not there."""

    exit_code = 4


class MismatchError(KDCacheError):
    """Two things that do not belong together: another teacher, data set, class list or view."""

    exit_code = 5


class CoverageError(MismatchError):
    """The data set has samples that the cache does not hold."""


class InterruptedRunError(KDCacheError):
    """SIGINT or SIGTERM stopped the run at a safe point; the same command resumes it."""

    exit_code = 75


def printable(text: str) -> str:
    """The text with control and other invisible characters escaped as Python writes them, line ends included.

    >>> print(printable("a name" + chr(27) + "[2J"))
    a name\\x1b[2J
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
