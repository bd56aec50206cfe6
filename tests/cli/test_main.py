"""The border of the command line: lazy commands, and which exit code an exception becomes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from kdcache import errors
from kdcache.version import __version__
from kdcache_cli import main
from kdcache_cli.command import Command

ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Runs the command line with a command that raises what it is given."""

    def run(error: BaseException):
        def callback(**_: object) -> None:
            raise error

        command = Command("inspect", callback=callback)
        monkeypatch.setattr(main.CommandGroup, "get_command", lambda *_: command)
        return CliRunner().invoke(main.cli, ["inspect"])

    return run


@pytest.mark.parametrize("error", ERRORS)
def test_each_error_of_kdcache_exits_with_its_code_and_only_its_message(
    failing, error: type[errors.KDCacheError]
) -> None:
    result = failing(error("row 3 of a.h5 is damaged"))
    assert result.exit_code == error.exit_code
    assert result.stderr == "Error: row 3 of a.h5 is damaged\n"
    assert result.stdout == ""


def test_an_interrupted_command_exits_with_75(failing) -> None:
    assert failing(KeyboardInterrupt()).exit_code == 75


def test_an_error_of_the_operating_system_is_told_without_being_called_internal(failing) -> None:
    result = failing(PermissionError(13, "Permission denied", "teacher.h5"))
    assert result.exit_code == 1
    assert result.stderr == "Error: [Errno 13] Permission denied: 'teacher.h5'\n"


def test_an_unexpected_exception_asks_for_a_report_instead_of_a_traceback(failing) -> None:
    result = failing(ZeroDivisionError("division by zero"))
    assert result.exit_code == 1
    assert "internal error: ZeroDivisionError: division by zero" in result.stderr
    assert "Traceback" not in result.stderr


def test_kdcache_debug_prints_the_traceback(failing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KDCACHE_DEBUG", "1")
    assert "Traceback" in failing(errors.DataError("no length")).stderr


def test_an_unknown_command_or_option_is_a_usage_error() -> None:
    assert CliRunner().invoke(main.cli, ["inspct"]).exit_code == 2
    assert CliRunner().invoke(main.cli, ["completion", "bash", "--colour"]).exit_code == 2


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(main.cli, ["--version"], prog_name="kdcache")
    assert result.output == f"kdcache {__version__}\n"


def test_the_help_lists_the_commands_in_the_order_of_work() -> None:
    text = CliRunner().invoke(main.cli, ["--help"]).output
    positions = [text.index(f"\n  {name} ") for name in main.COMMANDS]
    assert positions == sorted(positions)


def test_python_m_kdcache_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "kdcache", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"kdcache {__version__}\n"


def test_windows_is_refused_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit, match="POSIX file locks"):
        main.run()


def test_a_closed_pipe_ends_a_command_quietly(tmp_path: Path) -> None:
    """`kdcache ... | head -0`: no message, no traceback."""
    script = f"{sys.executable} -m kdcache completion zsh 2> {tmp_path / 'stderr'} | true"
    subprocess.run(["bash", "-c", script], check=True)
    assert (tmp_path / "stderr").read_text() == ""
