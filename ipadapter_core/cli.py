"""The former place of the command; ``python -m ipadapter_core`` is its name now. Kept for one version."""

from .commands.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
