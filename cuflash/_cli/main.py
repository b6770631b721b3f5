"""The command line: ``python -m cuflash info``, ``bench`` and ``tune``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cuflash import __version__
from cuflash._cli import info, tune
from cuflash._cli.bench import command as bench


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the result is the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cuflash",
        description="cuflash: exact flash attention on CuPy and NumPy arrays.",
    )
    parser.add_argument("--version", action="version", version=f"cuflash {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{info,bench,tune}")
    for module in (info, bench, tune):
        module.add_parser(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        return 0
    except OSError as error:  # a file that was named cannot be read or written
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 1
    return status
