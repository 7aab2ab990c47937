"""What a run goes on from, as safetensors and JSON: never a pickle, which can run code when it is opened.

A state is a tree of dictionaries, lists, numbers and tensors. The tensors are those of a safetensors file, and the tree,
with names in their place, is a JSON text in its header. It is read into the tree of a run that is ready to start, which
says which tensors there must be: what does not fit is refused.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import AdapterError, CorruptFileError, InvalidInputError, out_of_memory, quoted, reason
from ..files.text import as_table, parse_json
from ..narrowing import is_mapping, is_row
from .tensor_files import TensorReader, write_tensors

TRAINING = "training.safetensors"
"""Weights, average, optimiser, schedule, scaler and counts; written by the first process."""

PICTURES = "pictures.safetensors"
"""Digests of the names and contents of the pictures that are trained on."""


def random_file(rank: int) -> str:
    """The random generators of a process."""
    return f"random-{rank}.safetensors"


Tree = object
"""Tables, lists, plain values and tensors, or the JSON form of such a tree."""


class Stateful(Protocol):
    """A part of a run with a state of its own: a schedule, a scaler."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> object: ...


class Training:
    """The parts of a run that change, as one tree; ``optimizer`` is the plain one, without accelerate around it."""

    def __init__(
        self,
        module: nn.Module,
        average: nn.Module | None,
        optimizer: torch.optim.Optimizer,
        schedule: Stateful,
        scaler: Stateful | None,
    ) -> None:
        self.module, self.average, self.optimizer, self.schedule = module, average, optimizer, schedule
        self.scaler = scaler

    def tree(self) -> dict[str, Tree]:
        """Its tensors are those of the parts themselves."""
        return {
            "weights": self.module.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
        }

    def save(self, folder: Path, counts: Mapping[str, object]) -> None:
        """Write the parts, and ``counts``, plain values that belong to them. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tree(folder / TRAINING, {**self.tree(), "counts": dict(counts)})

    def load(self, folder: Path) -> dict[str, object]:
        """Put a saved state into the parts; returns its counts.

        Raises CorruptFileError and FileNotFoundError; InvalidInputError for a state of other tensors. After an error the parts
        hold something of both, so that another state has to be loaded or the run has to end.
        """
        file = TensorReader(folder / TRAINING)
        try:
            saved = _entries(_tree_of(file))
            prepare_optimizer(self.optimizer)
            found = {key: _fitted(value, saved.get(key), file, key) for key, value in self.tree().items()}
            self.optimizer.load_state_dict(found["optimizer"])
            self.schedule.load_state_dict(found["schedule"])
            if self.scaler is not None:
                self.scaler.load_state_dict(found["scaler"])
            return as_table(_plain(saved.get("counts")))
        except AdapterError:
            raise
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise _other(file.path, reason(error)) from error
        finally:
            file.close()


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimiser that made no step yet make its tensors, by a step of zero gradients. The weights change.

    torch.distributed.checkpoint does the same before it loads (its ``_init_optim_state``).
    """
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def save_random(folder: Path, rank: int) -> None:
    """Write the state of this process's random generators."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tree(folder / random_file(rank), {name: get() for name, (get, _) in _generators().items()})


DEVICES = ("cuda", "xpu", "mps")


def load_random(folder: Path, rank: int) -> None:
    """Set the random generators. Processes and devices that were others keep theirs: all draws go by seed and place.

    Raises CorruptFileError and InvalidInputError.
    """
    path = folder / random_file(rank)
    if not path.exists():
        return
    file = TensorReader(path)
    try:
        saved = _entries(_tree_of(file))
        for name, (get, put) in _generators().items():
            try:
                put(_fitted(get(), saved.get(name), file, name))
            except AdapterError:
                if name not in DEVICES:
                    raise
    except AdapterError:
        raise
    except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise CorruptFileError(f"{quoted(path)} holds no state of random generators ({reason(error)})") from error
    finally:
        file.close()


Numbers = dict[str, Tensor]
Generator = tuple[Callable[[], Tree], Callable[[Any], object]]


def _generators() -> dict[str, Generator]:
    """How the state of each generator is asked for and set: a table of tensors, or a list with one for each device."""
    found: dict[str, Generator] = {
        "python": (_get_python, _set_python),
        "numpy": (_get_numpy, _set_numpy),
        "torch": (lambda: {"state": torch.get_rng_state()}, lambda value: torch.set_rng_state(value["state"])),
    }
    for name in DEVICES[:2]:
        device: Any = getattr(torch, name, None)
        if device is not None and device.is_available():
            found[name] = (device.get_rng_state_all, device.set_rng_state_all)
    if torch.backends.mps.is_available():
        found["mps"] = (lambda: [torch.mps.get_rng_state()], lambda value: torch.mps.set_rng_state(value[0]))
    return found


def _get_python() -> Numbers:
    _, words, gauss = random.getstate()
    return {"words": torch.tensor(words), "gauss": _numbers(math.nan if gauss is None else gauss)}


def _set_python(value: Numbers) -> None:
    gauss = float(value["gauss"][0])
    random.setstate((3, tuple(value["words"].tolist()), None if math.isnan(gauss) else gauss))


def _get_numpy() -> Numbers:
    state = np.random.get_state(legacy=False)
    words = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return {"words": words, "numbers": _numbers(state["state"]["pos"], state["has_gauss"], state["gauss"])}


def _set_numpy(value: Numbers) -> None:
    at, has_gauss, gauss = value["numbers"].tolist()
    words = value["words"].numpy().astype(np.uint32)
    np.random.set_state(("MT19937", words, int(at), int(has_gauss), gauss))


def _numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# --- trees ----------------------------------------------------------------------------------------------------------------


def save_tree(path: Path, tree: Mapping[str, Tree]) -> None:
    """Write a tree of tables, lists, plain values and tensors to one safetensors file."""
    tensors: dict[str, Tensor] = {}
    packed = _packed(dict(tree), tensors, "")
    write_tensors(path, tensors, {"tree": json.dumps(packed)})


def _packed(value: Tree, tensors: dict[str, Tensor], name: str) -> Tree:
    """The JSON form: containers and what JSON lacks are tables of one key that says what they are."""
    if isinstance(value, Tensor):
        tensors[name] = value
        return {"tensor": name}
    if is_mapping(value):
        return {"table": [[key, _packed(item, tensors, f"{name}/{key}")] for key, item in value.items()]}
    if is_row(value):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_packed(item, tensors, f"{name}/{number}") for number, item in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}, which a state cannot hold")


def _tree_of(file: TensorReader) -> Tree:
    text = file.metadata.get("tree")
    if not isinstance(text, str):
        raise CorruptFileError(f"{quoted(file.path)} is damaged: it says not what its tensors are")
    return parse_json(text, file.path)


def _items(packed: Tree, kind: str) -> list[Any]:
    items = as_table(packed).get(kind)
    if not isinstance(items, list):
        raise InvalidInputError(f"a state lacks a {kind} that this run has; choose another output.folder")
    return items


def _entries(packed: Tree) -> dict[object, Tree]:
    return dict(_items(packed, "table"))


def _plain(packed: Any) -> Any:
    """The value of a tree without tensors. Raises ValueError."""
    if not isinstance(packed, dict):
        return packed
    ((kind, inside),) = packed.items()
    match kind:
        case "table":
            return {key: _plain(value) for key, value in inside}
        case "list":
            return [_plain(item) for item in inside]
        case "tuple":
            return tuple(_plain(item) for item in inside)
        case "float":
            return float(inside)
        case _:
            raise ValueError(f"{quoted(kind)} where a plain value was expected")


def _fitted(wanted: Tree, saved: Tree, file: TensorReader, name: str) -> Any:
    """The saved value, if it is such a one as ``wanted``, whose own tensors take the saved numbers.

    A parameter that got no gradient yet has no entry in its optimiser. Plain values that only one of the two has are options
    of another version of torch: what is wanted stays.
    """
    if isinstance(wanted, Tensor):
        key = as_table(saved).get("tensor")
        if not isinstance(key, str):
            raise _other(file.path, f"{name} is no tensor")
        dtype, shape = file.describe(key)
        if (dtype, shape) != (wanted.dtype, tuple(wanted.shape)):
            raise _other(file.path, f"{name} is {dtype} {list(shape)}, not {wanted.dtype} {list(wanted.shape)}")
        with torch.no_grad():
            wanted.copy_(file.read(key))
        return wanted
    if is_mapping(wanted):
        entries = _entries(saved)
        strange = [key for key, value in entries.items() if key not in wanted and _has_tensors(value)]
        if strange:
            raise _other(file.path, f"{name} has {quoted(strange[0])} too")
        found: dict[object, Tree] = {}
        for key, value in wanted.items():
            if key in entries:
                found[key] = _fitted(value, entries[key], file, f"{name}/{key}")
            elif not isinstance(key, int):
                if _has_tensors(_packed(value, {}, "")):
                    raise _other(file.path, f"{name} lacks {quoted(key)}")
                found[key] = value
        return found
    if is_row(wanted):
        others = _items(saved, "list" if isinstance(wanted, list) else "tuple")
        if len(wanted) != len(others):
            raise _other(file.path, f"{name} has {len(others)} entries, not {len(wanted)}")
        pairs = enumerate(zip(wanted, others, strict=True))
        made = [_fitted(one, other, file, f"{name}/{number}") for number, (one, other) in pairs]
        return made if isinstance(wanted, list) else tuple(made)
    value = _plain(saved)
    if _is_number(wanted) and _is_number(value):
        if not math.isfinite(value) and math.isfinite(wanted):
            raise _other(file.path, f"{name} is {value}")
    elif type(value) is not type(wanted):
        raise _other(file.path, f"{name} is {quoted(value)}, not such as {quoted(wanted)}")
    return value


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _has_tensors(packed: Tree) -> bool:
    return '"tensor"' in json.dumps(packed)


def _other(path: Path, why: str) -> InvalidInputError:
    return InvalidInputError(
        f"{quoted(path)} does not fit this run ({why}); it was saved by a training of something else, or by another version: "
        "choose another output.folder"
    )
