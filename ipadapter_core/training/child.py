"""The script that ``job`` starts: the command ``ipadapter``, found beside this file and nowhere else.

A script, and not ``python -m``: that would look for modules in the working directory first. (Python 3.11's ``-P`` would do, but
3.10 lacks it, and ``-I`` would hide the packages that people install for themselves.)
"""

import os
import sys

_HERE = os.path.dirname(os.path.abspath(__file__))
_ROOT = os.path.dirname(os.path.dirname(_HERE))

if __name__ == "__main__":
    # this folder's modules have names that other packages' have too
    sys.path[:] = [_ROOT, *(p for p in sys.path if p and os.path.abspath(p) not in (_HERE, _ROOT))]
    import importlib

    sys.exit(importlib.import_module("ipadapter_core.commands.cli").main())
