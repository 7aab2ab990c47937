"""``python -m ipadapter_core``: the command ``ipadapter``, for launchers that start a module."""

from .commands.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
