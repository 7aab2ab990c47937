from typing import Any

from torch import Tensor

def optimized_attention(*args: Any, **kwargs: Any) -> Tensor: ...
