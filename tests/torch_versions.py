"""What torch.compile of older versions cannot do: tests ask the rest of all versions, and this of those that can."""

from __future__ import annotations

import torch

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])

WHOLE_GRAPHS = _VERSION >= (2, 9)
"""Whether image prompts and LoRAs break no graph. Code of older versions has breaks where dictionaries are asked by values of
dataclasses, and predicts the same."""

GUARD_FILTERS = _VERSION >= (2, 8)
"""Whether one may say which guards a compiled model has, without which ComfyUI compiles none."""
