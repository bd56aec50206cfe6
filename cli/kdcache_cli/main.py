"""The command `kdcache`: the group, when a command is imported, and which exit code an error becomes.

Commands are imported when they are named, and call torch-heavy functions through the lazy attributes of `kdcache`:
`kdcache inspect` and every `--help` answer without importing torch, which alone takes 1-2 s.
"""

from __future__ import annotations

import contextlib
import importlib
import keyword
import os
import sys
import traceback
from typing import IO, Any, NoReturn

import click

from kdcache.errors import KDCacheError, StorageError
from kdcache.version import __version__
from kdcache_cli.output import EMITTED, WANTS_JSON, emit

COMMANDS = (
    "demo",
    "precompute",
    "distill",
    "sweep",
    "inspect",
    "verify",
    "calibrate",
    "suspects",
    "report",
    "ensemble",
    "merge",
    "convert",
    "export",
    "import",
    "card",
    "doctor",
    "completion",
)
INTERRUPTED = 75


class CommandFailed(click.ClickException):
    """An error on its way to stderr, with the exit code that the documentation promises."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # click declares it for the class

    def show(self, file: IO[Any] | None = None) -> None:
        """Print the message; where stderr is a file on a full disk, the exit code alone must tell."""
        with contextlib.suppress(OSError):
            super().show(file)


class CommandGroup(click.Group):
    """The commands, each from the module of its name, and the border where exceptions become exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in the order of work, which is how the help shows them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"kdcache_cli.{module_of(cmd_name)}").command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; whatever it raises leaves as one message and one exit code, without a traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own; it ends quietly when the reader of a pipe has gone
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get("KDCACHE_DEBUG", "") not in ("", "0"):
                traceback.print_exc()
            failure = failure_of(error)
            if ctx.meta.get(WANTS_JSON) and not ctx.meta.get(EMITTED):
                with contextlib.suppress(StorageError):  # stdout on a full disk
                    emit({"error": failure.message, "exit_code": failure.exit_code}, as_json=True)
            raise failure from error


def module_of(command: str) -> str:
    """The module of a command: `import_` for `import`, which is a word of Python's."""
    return f"{command}_" if keyword.iskeyword(command) else command


def failure_of(error: BaseException) -> CommandFailed:
    """The message and exit code of an exception that reached the command line."""
    if isinstance(error, KDCacheError):
        return CommandFailed(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return CommandFailed("interrupted; the same command goes on where it can be resumed", INTERRUPTED)
    if isinstance(error, OSError):
        return CommandFailed(str(error), 1)
    return CommandFailed(
        f"internal error: {type(error).__name__}: {error}\n"
        "This is a fault of kdcache. Please report it with what KDCACHE_DEBUG=1 and the same command print.",
        1,
    )


@click.group(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="%(prog)s %(version)s")
def cli() -> None:
    """One teacher pass, then any number of students.

    Teacher logits are computed once, stored in plain HDF5 files, and joined to students by sample id.

    \b
    Every option can also be set in the environment (KDCACHE_DISTILL_ALPHA or KDCACHE_ALPHA for
    `distill --alpha`) or in a table of a file (--config run.toml with [distill] alpha = 0.9);
    --print-config shows what is in force and where it comes from.

    \b
    Exit codes: 0 done, 1 error, 2 usage, 3 corrupt, 4 incomplete, 5 mismatch (teacher, data,
    classes, view), 75 interrupted and resumable. KDCACHE_DEBUG=1 prints tracebacks. A command that
    fails under --json prints an object with `error` and `exit_code`.
    """


def run() -> NoReturn:
    """The entry point of `kdcache` and of `python -m kdcache`."""
    if sys.platform == "win32":
        sys.exit("kdcache needs POSIX file locks and links, which Windows lacks. Run it under WSL.")
    try:
        cli.main(prog_name="kdcache")
    except OSError as error:  # a help text on a full disk
        sys.exit(f"Error: could not print: {error.strerror}; let stdout go elsewhere")
    raise AssertionError("click exits by itself")
