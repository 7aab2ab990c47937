"""What a node is given, checked against what it asks for, before it runs.

ComfyUI compares widgets with their limits, but not what comes through a link, no value for a socket (a graph may hold a
plain text there), no list (``{"__value__": [...]}``), and no number with NaN. So every node of this pack checks once more.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar, cast

from torch import Tensor

from ...ipadapter_core import AdapterError, ImagePrompt, InvalidInputError, WeightSchedule
from ...ipadapter_core.errors import quoted
from ...ipadapter_core.files.text import check_length
from .adapters import ManagedAdapter
from .frontend import show_in_running_node
from .recording import Recording

LINE, TEXT = 10_000, 100_000
"""Most characters of a text widget of one line, and of several."""
LONGER = {"captions": 1_000_000}
ENTRIES = 100_000
"""Most numbers in a list that takes the place of one number, as the old pack's weights over frames."""
BEYOND = 1000
"""A linked float may exceed a widget's limits by this factor: artists exceed them on purpose, overflows do so by far."""

_TENSORS = {"IMAGE": (4,), "MASK": (2, 3, 4), "EMBEDS": (2, 3, 4)}
"""Sockets that carry tensors, and how many axes these have; embeds of before March 2024 are pairs."""
_CLASSES = {
    "IMAGE_PROMPT_ADAPTER": ManagedAdapter,
    "IMAGE_PROMPT": ImagePrompt,
    "IMAGE_PROMPT_SCHEDULE": WeightSchedule,
    "IMAGE_PROMPT_RECORDING": Recording,
}
_PLAIN = {
    "IPADAPTER": Mapping, "IPADAPTER_PARAMS": dict, "WEIGHTS_STRATEGY": dict, "CONDITIONING": list, "LATENT": dict,
    "LORA_STACK": (list, tuple), "FLOAT,CURVE": (Real, list, tuple),
}  # fmt: skip
"""Sockets of old packs whose values are plain Python; the nodes look at what is inside."""

Node = TypeVar("Node", bound=type)


def valid(*checks: tuple[Callable[[str], object], object]) -> bool | str:
    """What ``validate_inputs`` of a node answers: True, or the sentence of the first text that its reader refuses.

    Before anything runs; a text that a link brings is None here, and is read when the node runs.
    """
    for read, text in checks:
        if isinstance(text, str):
            try:
                read(text)
            except InvalidInputError as error:
                return str(error)
    return True


def check_inputs(node: Node, method: str) -> Node:
    """Let a node's method look at its arguments first, and write into the node what it refuses; returns the class.

    Signatures stay as they are.
    """
    owner = next(base for base in node.__mro__ if method in base.__dict__)
    found: Any = owner.__dict__[method]
    of_class = isinstance(found, classmethod)  # as those of our nodes; those of the old ones are of objects
    function: Callable[..., Any] = getattr(found, "__func__", found)
    if hasattr(function, "__wrapped__"):  # by a relative that shares it
        return node
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(self, *args, **kwargs).arguments
        for parameter in signature.parameters.values():
            if parameter.kind is parameter.VAR_KEYWORD:
                given |= given.pop(parameter.name, {})
        # our nodes take what their lists offer; the old ones have options by other names, and know them themselves
        try:
            check_values(self.INPUT_TYPES(), given, strict=of_class)
            return function(self, *args, **kwargs)
        except AdapterError as error:
            show_in_running_node(str(error))
            raise

    setattr(owner, method, classmethod(checked) if of_class else checked)
    return node


def check_values(inputs: Mapping[str, Mapping[str, Any]], given: Mapping[str, Any], *, strict: bool) -> None:
    """Raise InvalidInputError for a value that is not what the input of its name asks for.

    ``inputs`` are those of ComfyUI's INPUT_TYPES; None stands for what is not connected. Without ``strict``, options need
    not be on their list and numbers may be lists of numbers.
    """
    for section in ("required", "optional"):
        for name, (kind, *more) in inputs.get(section, {}).items():
            value = given.get(name)
            if value is None and strict and section == "required":
                raise InvalidInputError(f"{name} is missing: connect a node, or choose a value")
            if value is not None:
                _check(name, kind, more[0] if more else {}, value, strict)


def _check(name: str, kind: Any, limits: Mapping[str, Any], value: Any, strict: bool) -> None:
    items = _listed(value)
    if items is not None and kind in ("INT", "FLOAT") and not strict:
        if len(items) > ENTRIES:
            raise InvalidInputError(f"{name} has {len(items):,} numbers; at most {ENTRIES:,} can be used")
        for item in items:
            _check(name, kind, limits, item, strict)
    elif kind == "STRING":
        _check_text(name, value, LONGER.get(name, TEXT if limits.get("multiline") else LINE))
    elif kind in ("INT", "FLOAT", "BOOLEAN"):
        _check_number(name, kind, limits, value)
    elif isinstance(kind, (list, tuple)) or kind == "COMBO":
        options = cast("Sequence[str]", limits.get("options", ()) if kind == "COMBO" else kind)
        if not isinstance(value, str) or (strict and value not in options):
            raise InvalidInputError(f"{name} is {quoted(value)}; choose one that the list offers{_few(options)}")
    else:
        _check_socket(name, kind, value)


def _listed(value: Any) -> Sequence[Any] | None:
    """A list or a pair as such; None for anything else."""
    return cast("Sequence[Any]", value) if isinstance(value, (list, tuple)) else None


def _few(options: Sequence[str]) -> str:
    return f": {', '.join(options)}" if 0 < len(options) <= 20 else ""


def _check_text(name: str, value: Any, limit: int) -> None:
    if not isinstance(value, str):
        raise InvalidInputError(f"{name} is {_a(value)}; a text was expected")
    check_length(value, name, limit)
    odd = next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), "")
    if odd:
        raise InvalidInputError(
            f"{name} is {quoted(value)}, which has U+{ord(odd):04X}; that is no character of a text"
        )


def _check_number(name: str, kind: str, limits: Mapping[str, Any], value: Any) -> None:
    wanted: Any = Real if kind == "FLOAT" else Integral
    if not isinstance(value, wanted):
        what = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}[kind]
        raise InvalidInputError(f"{name} is {_a(value)}; {what} was expected")
    low, high = limits.get("min", -math.inf), limits.get("max", math.inf)
    if kind == "FLOAT":
        low, high = (BEYOND * limit if limit * sign > 0 else sign * BEYOND for limit, sign in ((low, -1), (high, 1)))
    if kind != "BOOLEAN" and not low <= value <= high:  # NaN is in no range
        raise InvalidInputError(f"{name} is {str(value)[:40]}; it must lie in {limits.get('min')}..{limits.get('max')}")


def _check_socket(name: str, kind: Any, value: Any) -> None:
    if kind in _TENSORS:
        parts = _listed(value) if kind == "EMBEDS" else None
        parts = [value] if parts is None else parts
        if not parts or not all(isinstance(t, Tensor) and t.ndim in _TENSORS[kind] for t in parts):
            raise InvalidInputError(f"{name} is {_a(value)}; {kind} was expected: connect a node that makes it")
    elif kind in _CLASSES:
        if not isinstance(value, _CLASSES[kind]):
            raise InvalidInputError(f"{name} is {_a(value)}; {kind} was expected: connect a node that makes it")
    # what a graph can hold by itself, and no node's output
    elif isinstance(value, (str, Real, list, tuple, Mapping)) and not isinstance(value, _PLAIN.get(kind, ())):
        raise InvalidInputError(f"{name} is {_a(value)}; {kind} was expected: connect a node that makes it")


def _a(value: Any) -> str:
    """What somebody gave, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" {quoted(value)}" if isinstance(value, (str, Real)) else "")
