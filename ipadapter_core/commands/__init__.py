"""The command ``ipadapter``: one file per subcommand."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn, TypeAlias

from ..entries import number
from ..errors import AdapterError, InvalidInputError, quoted


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


class WrongUsage(AdapterError):
    """A value or a file of the command line that cannot be used, told before anything was begun."""


@contextmanager
def usage() -> Generator[None]:
    """What goes wrong in the block is wrong usage."""
    try:
        yield
    except (AdapterError, OSError) as error:
        raise WrongUsage(str(error)) from error


@contextmanager
def folder_for(path: Path, what: str, option: str = "--out") -> Generator[None]:
    """A folder for what is made in the block; those made for it go again where they stay empty.

    Raises InvalidInputError where there can be none.
    """
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{quoted(path)} cannot be the folder for {what} ({getattr(error, 'strerror', None) or error}): name another one with {option}"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # one holds something, or is gone
            for folder in made:
                folder.rmdir()


def within(low: float, high: float) -> Callable[[str], float]:
    """The type of an argument: a finite number in a range."""

    def read(text: str) -> float:
        value = number(text)
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no number{_range(low, high)}")
        return value

    return read


def whole(low: int, high: int) -> Callable[[str], int]:
    """The type of an argument: a whole number in a range."""

    def read(text: str) -> int:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]{1,19}", text) else low - 1
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is no whole number{_range(low, high)}")
        return value

    return read


def _range(low: float, high: float) -> str:
    return f" from {low} to {high}" if high < ANY else ""


ANY = 1e30
"""The end of a range that has none."""
