from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from .ui import PreviewText

class Input:
    id: str
    extra_dict: dict[str, Any]

class Output: ...

class _Socket:
    """A type of values that only links carry."""

    class Input(Input):
        def __init__(self, id: str, *, optional: bool = ..., tooltip: str = ...) -> None: ...

    class Output(Output):
        def __init__(self, *, display_name: str, tooltip: str = ...) -> None: ...

Model = _Socket
Clip = _Socket
ClipVision = _Socket
Vae = _Socket
Image = _Socket
Latent = _Socket
Mask = _Socket

def Custom(io_type: str) -> type[_Socket]: ...

class Boolean:
    class Input(Input):
        def __init__(self, id: str, *, default: bool, tooltip: str, optional: bool = ...) -> None: ...

class Combo:
    class Input(Input):
        def __init__(
            self, id: str, options: list[str], *, tooltip: str, default: str = ..., optional: bool = ...
        ) -> None: ...

class Int:
    class Input(Input):
        def __init__(
            self, id: str, *, default: int, min: int, max: int, tooltip: str, step: int = ..., optional: bool = ...
        ) -> None: ...

class Float:
    class Input(Input):
        def __init__(
            self,
            id: str,
            *,
            default: float,
            min: float,
            max: float,
            step: float,
            tooltip: str,
            round: bool | float = ...,
            optional: bool = ...,
        ) -> None: ...

class String:
    class Input(Input):
        def __init__(
            self, id: str, *, default: str, tooltip: str, multiline: bool = ..., optional: bool = ...
        ) -> None: ...

    class Output(Output):
        def __init__(self, *, display_name: str, tooltip: str = ...) -> None: ...

class Hidden(Enum):
    unique_id = "UNIQUE_ID"

class HiddenHolder:
    unique_id: str

@dataclass
class Schema:
    def __init__(
        self,
        node_id: str,
        display_name: str,
        category: str,
        description: str,
        inputs: Sequence[Input],
        outputs: Sequence[Output],
        hidden: Sequence[Hidden] = ...,
        search_aliases: Sequence[str] = ...,
        is_output_node: bool = ...,
    ) -> None: ...

class NodeOutput:
    def __init__(self, *args: Any, ui: PreviewText | Mapping[str, Any] = ...) -> None: ...

class ComfyNode:
    hidden: ClassVar[HiddenHolder]
    @classmethod
    def define_schema(cls) -> Schema: ...

class NodeReplace:
    def __init__(
        self,
        *,
        new_node_id: str,
        old_node_id: str,
        old_widget_ids: list[str],
        input_mapping: Iterable[Mapping[str, Any]],
        output_mapping: Iterable[Mapping[str, Any]],
    ) -> None: ...
