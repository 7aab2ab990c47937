from typing import Any

class WeightAdapterBase:
    name: str
    loaded_keys: object
    weights: Any
