"""`python -m kdcache` is the `kdcache` command.

The one module of the library that imports the command line above it. Nothing imports this one, so no cycle can come
of it, and the test of the floors leaves it out.
"""

from __future__ import annotations

from kdcache_cli.main import run

if __name__ == "__main__":
    run()
