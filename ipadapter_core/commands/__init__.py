"""The command ``ipadapter``: one file per subcommand."""

from __future__ import annotations

import argparse
import sys
from typing import NoReturn, TypeAlias


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {' '.join(message.split())} (see {self.prog} --help)", file=sys.stderr)
        raise SystemExit(2)


class Grouped(argparse.RawDescriptionHelpFormatter):
    """Options in one column, what they mean in another, and the text behind them as it is written."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=28)


Commands: TypeAlias = "argparse._SubParsersAction[Parser]"  # pyright: ignore[reportPrivateUsage]
"""What ``add_subparsers`` gives and a subcommand adds itself to."""
