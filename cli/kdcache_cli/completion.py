"""`kdcache completion`: the script that lets a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from kdcache_cli.command import define
from kdcache_cli.output import emit

SHELLS = ("bash", "zsh", "fish")


@define(
    "completion",
    examples=(
        "kdcache completion bash > ~/.local/share/bash-completion/completions/kdcache",
        "kdcache completion fish > ~/.config/fish/completions/kdcache.fish",
    ),
)
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str, as_json: bool) -> None:
    """Print the completion script for a shell; the shell calls `kdcache` for the candidates."""
    script = completion_script(shell)
    emit({"shell": shell, "script": script}, as_json=as_json, text=script.rstrip("\n"))


def completion_script(shell: str) -> str:
    """The script that click makes for `kdcache` in one of `SHELLS`."""
    completer = get_completion_class(shell)
    assert completer is not None, shell
    # The template itself: `source()` would first start the shell to look at its version.
    instance = completer(click.Command("kdcache"), {}, "kdcache", "_KDCACHE_COMPLETE")
    return instance.source_template % instance.source_vars()
