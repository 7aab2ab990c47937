"""Calls of a model under way: what a hook on one of its layers belongs to, in whatever thread and at whatever time it runs.

A call belongs to its thread. Gradient checkpointing runs layers again in the backward pass, long after their call and
perhaps in a thread of autograd's; the call is then found by the place of the recomputed part in the autograd graph, whose
nodes are numbered in the order in which they were made.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import InvalidInputError
from ..narrowing import is_mapping, is_row

Call = TypeVar("Call")
Given = ParamSpec("Given")
Result = TypeVar("Result")
_torch: Any = torch
_C = _torch._C  # autograd's own numbers have no public names


class _Thread(threading.local):
    """What one thread is doing: the innermost call, and those around it."""

    def __init__(self) -> None:
        # no class attributes: torch.compile would take them for the threads' own
        self.call: Any = None
        self.task = -1
        self.first = 0
        self.grad = self.reentrant = self.known = False
        self.outer: list[tuple[Any, int, int, bool, bool]] = []


@dataclass(eq=False)
class _Record(Generic[Call]):
    """A call that may be recomputed, kept alive by the graph of its output; its nodes are ``first`` to ``last``."""

    call: Call
    first: int
    last: int
    thread: int
    task: int
    reentrant: bool
    begun: bool = False

    def note_backward(self, gradients: object) -> None:
        self.begun = True


class Calls(Generic[Call]):
    """The calls of one model as one owner of hooks sees them. A copy starts empty: it belongs to another model."""

    def __init__(self) -> None:
        self._thread = _Thread()
        self._thread.known = True
        self._inside: set[int] = set()
        self._records: set[weakref.ref[_Record[Call]]] = set()
        self._since = self._changed = _next_node()
        self._when_over: Callable[[], object] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def begin(self, call: Call) -> None:
        """A call of the model starts in this thread."""
        thread, task = self._thread, int(_C._current_graph_task_id())
        if task != -1:  # a whole model inside a checkpoint
            node = _current_node()
            call = self._recorded(node) or call
            if node < self._changed and not self._matching(node):
                raise InvalidInputError(
                    "strengths or adapters were changed between a call and its backward pass, which computes that call "
                    "again; change them after backward(), or use checkpoints with use_reentrant=False"
                )
        thread.outer.append((thread.call, thread.task, thread.first, thread.grad, thread.reentrant))
        thread.call, thread.task, thread.first = call, task, _next_node()
        thread.grad, thread.reentrant, thread.known = torch.is_grad_enabled(), False, True
        self._inside.add(threading.get_ident())

    def end(self, output: object) -> None:
        """The innermost call of this thread is over, with this output or, after an error, None."""
        thread = self._thread
        if not thread.outer:
            return
        if thread.grad:
            node = next((t.grad_fn for t in _tensors(output) if t.grad_fn is not None), None)
            if node is not None:
                me = threading.get_ident()
                record = _Record[Call](thread.call, thread.first, _next_node(), me, thread.task, thread.reentrant)
                self._records.add(weakref.ref(record, self._forget))
                node.register_prehook(record.note_backward)
        thread.call, thread.task, thread.first, thread.grad, thread.reentrant = thread.outer.pop()
        if not thread.outer:
            self._inside.discard(threading.get_ident())
            self._leave()

    def running(self) -> Call | None:
        """The call that this thread is inside of; None outside of one and in a recomputation, for which ask ``found``."""
        thread = self._thread
        if torch.is_grad_enabled():
            now = torch.compiler.is_compiling() or _C._current_graph_task_id() == thread.task
            return thread.call if now else None
        if thread.grad:
            thread.reentrant = True
        return thread.call

    def found(self, without: Call, outside: Callable[[], Call]) -> Call:
        """The call that the backward pass computes again; ``without`` if it began before this owner was there.

        A layer that runs on its own belongs to no call: ``outside()``.
        """
        if _C._current_graph_task_id() == -1:
            # a thread that has never begun a call is inside one that began before
            return outside() if self._thread.known else without
        node = _current_node()
        call = self._recorded(node)
        if call is not None:
            return call
        return without if node < self._since else outside()

    def changed(self) -> None:
        """What later calls see is another thing from now on."""
        self._changed = _next_node()

    def when_over(self, act: Callable[[], object]) -> None:
        """Do something once no other thread is inside a call and no recomputation is due; perhaps now."""
        self._when_over = act
        self._leave()

    def _leave(self) -> None:
        if self._when_over is None:
            return
        due = (record for ref in list(self._records) if (record := ref()) is not None)
        if self._inside.issubset({threading.get_ident()}) and not any(r.reentrant and not r.begun for r in due):
            self._when_over()

    def _forget(self, ref: weakref.ref[_Record[Call]]) -> None:
        self._records.discard(ref)
        self._leave()

    def _matching(self, node: int) -> list[_Record[Call]]:
        records = [record for ref in list(self._records) if (record := ref()) is not None]
        return [record for record in records if record.first <= node < record.last]

    def _recorded(self, node: int) -> Call | None:
        found = self._matching(node)
        if len({id(record.call) for record in found}) > 1:  # every thread numbers its nodes from the same start
            found = [record for record in found if record.thread == threading.get_ident() and record.task == -1]
        if len(found) == 1 or len({id(record.call) for record in found}) == 1:
            return found[0].call
        if self._matching(node):
            raise InvalidInputError(
                "two threads train through one model with gradient checkpointing, and which call is to be computed again "
                "cannot be told; let one thread train at a time, or give each a model of its own"
            )
        return None


def _next_node() -> int:
    return int(_torch.autograd._get_sequence_nr())


def _current_node() -> int:
    return int(_C._current_autograd_node()._sequence_nr())


def _tensors(output: object) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif is_mapping(output) or is_row(output):
        for value in output.values() if is_mapping(output) else output:
            yield from _tensors(value)


# --- torch.compile ---------------------------------------------------------------------------------------------------


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what ``torch.compile(module)`` gives; any other module itself."""
    inner = getattr(model, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else model


def eagerly(function: Callable[Given, Result], *args: Given.args, **kwargs: Given.kwargs) -> Result:
    """Call something that torch.compile shall not trace; it breaks the graph there."""
    if torch.compiler.is_compiling():
        function = cast("Callable[Given, Result]", torch.compiler.disable(function))
    return function(*args, **kwargs)


Operation = Callable[..., Tensor]


def uncaptured(name: str, function: Operation, like: Operation) -> Operation | None:
    """A function as an operation that compiled code calls by name; ``like`` gives the shape of its result.

    None where this torch cannot keep it out of CUDA graphs.
    """
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        return None
    operation = torch.library.custom_op(f"image_prompt::{name}", function, mutates_args=(), tags=(tag,))
    operation.register_fake(like)
    return operation


def watch_hooks() -> None:
    """Let torch.compile see hooks that come and go, which it does not by itself (skip_nnmodule_hook_guards).

    What was compiled before is forgotten, once. Does nothing where nothing was compiled yet.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return
    config = dynamo.config
    if config.skip_nnmodule_hook_guards:
        config.skip_nnmodule_hook_guards = False
        entry = getattr(config, "_config", {}).get("skip_nnmodule_hook_guards")
        # current torch keeps settings per thread; a model compiled elsewhere counts too
        if entry is not None and hasattr(entry, "default"):
            entry.default = False
        torch.compiler.reset()


class Hooks:
    """Hooks that are on their modules while at least one call needs them, first in line and always the same.

    ``after`` are forward hooks and ``before`` those that run in front of a module, by its path; several may be on one.
    ``with_kwargs`` are forward hooks that see a module's keyword arguments too.
    A key that is always the same, unlike that of ``register_forward_hook``, lets compiled code serve the next call; one
    of its own for every layer keeps it from serving another layer.
    """

    def __init__(
        self,
        after: Iterable[tuple[str, Callable[..., object]]],
        before: Iterable[tuple[str, Callable[..., object]]] = (),
        with_kwargs: Iterable[tuple[str, Callable[..., object]]] = (),
    ) -> None:
        wide = tuple(with_kwargs)
        kinds = (("_forward_hooks", (*after, *wide)), ("_forward_pre_hooks", before))
        self._hooks = [
            (path, kind, RemovableHandle(OrderedDict()).id, hook) for kind, hooks in kinds for path, hook in hooks
        ]
        self._wide = {hook for _, hook in wide}
        self._lock = threading.Lock()
        self._users: dict[int, int] = {}

    @contextmanager
    def on(self, model: nn.Module, find: Callable[[str], nn.Module] | None = None) -> Generator[None]:
        """``with hooks.on(unet): …``; the hooks' names are paths in the model, or what ``find`` makes of them."""
        find = find or model.get_submodule
        places = [(vars(find(path))[kind], key, hook) for path, kind, key, hook in self._hooks]
        wide = [(find(path), key) for path, _, key, hook in self._hooks if hook in self._wide]
        with self._lock:
            users = self._users[id(model)] = self._users.get(id(model), 0) + 1
            if users == 1:
                for hooks, key, hook in reversed(places):
                    hooks[key] = hook
                    hooks.move_to_end(key, last=False)
                for module, key in wide:
                    vars(module)["_forward_hooks_with_kwargs"][key] = True
        try:
            yield
        finally:
            with self._lock:
                self._users[id(model)] -= 1
                if not self._users[id(model)]:
                    del self._users[id(model)]
                    for hooks, key, _ in places:
                        hooks.pop(key, None)
                    for module, key in wide:
                        vars(module)["_forward_hooks_with_kwargs"].pop(key, None)
