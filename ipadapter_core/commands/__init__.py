"""The command ``ipadapter``: one file per subcommand."""

import argparse
from typing import TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"  # pyright: ignore[reportPrivateUsage]
"""What ``add_subparsers`` gives and a subcommand adds itself to."""
