from typing import Any

manual_cast: Any
disable_weight_init: Any
