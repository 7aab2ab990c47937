"""What every algorithm is: a change of one layer's weight, as numbers, as a merge, as a side path, in files, in training.

Strength ``s`` is what the user sets: 0 is exactly the plain layer, 1 the trained change, any sign and size allowed.
Additive algorithms, and DoRA and OFT, are linear in it: ``W + s (W' - W)``; only BOFT is not (see ``butterfly.py``).
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import InvalidInputError
from .fresh import Settings, TrainedAs
from .layer import Layer
from .parts import Key, Parts

Change = Callable[[Tensor, Tensor, float], Tensor]
"""A prepared side path: input of the layer, its output, strength → what to add to the output."""


@dataclass(frozen=True, slots=True, eq=False)
class Update(ABC):
    """A change of one weight, and all that is to be known of its algorithm; a subclass is one in full.

    Tensors of a file in, everything computed in the dtype and on the device of what it meets.
    """

    algorithm: ClassVar[str] = ""
    """Its name for people."""
    reads_weight: ClassVar[bool] = False
    """Whether the change depends on the weight; then only pristine weights give the right one."""
    multiplies: ClassVar[bool] = False
    """Whether it only multiplies what is there, so that where there is nothing, nothing is lost."""

    @property
    def title(self) -> str:
        """Name of the algorithm for tables."""
        return self.algorithm

    @property
    def rank(self) -> int | None:
        """Inner width, None where there is none."""
        return None

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int | None, ...]:
        """Shape of the weight that it was made for, None for a size that is open. A kernel may be counted as columns."""

    @abstractmethod
    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether it can act on a weight of this shape."""

    def on(self, shape: tuple[int, ...]) -> Update:
        """The same for a weight of this shape; another reading where the file's tensors can be read in two ways."""
        return self

    def rows(self, start: int, length: int) -> Update:
        """The part that acts on some output rows, for layers that another model keeps apart."""
        return Rows(self, start, length)

    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by field name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Update:
        """The same with other tensors, named as ``tensors`` names them."""
        return replace(self, **tensors)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Update:
        """The same with its tensors moved or cast."""
        return self.with_tensors({name: t.to(device=device, dtype=dtype) for name, t in self.tensors().items()})

    def numel(self) -> int:
        """Numbers held."""
        return sum(t.numel() for t in self.tensors().values())

    # --- on a weight -------------------------------------------------------------------------------------------------

    @abstractmethod
    def delta(self, weight: Tensor) -> Tensor:
        """Change of ``weight`` at strength 1, in its shape, dtype and on its device."""

    def change(self, weight: Tensor, total: Tensor, strength: float) -> None:
        """Add the change of ``weight`` to ``total``, which may be a copy of it with other changes."""
        total.add_(self.delta(weight), alpha=strength)

    def merged(self, weight: Tensor, strength: float) -> Tensor:
        """The changed weight; at strength 0 the same object."""
        if strength == 0:
            return weight
        total = weight.clone()
        self.change(weight, total, strength)
        return total

    # --- beside a layer ----------------------------------------------------------------------------------------------

    joins: ClassVar[bool] = False
    """Whether it is a product of two matrices as it stands, which ``products`` gives; those on one layer run as one."""

    def products(self, layer: Layer, like: Tensor) -> tuple[Tensor, Tensor]:
        """``down`` in the layer's form (``r i``, a kernel for a convolution) and ``up`` ``o r``, which contains the scale."""
        raise NotImplementedError

    def unfused(self, layer: Layer, like: Tensor) -> Change:
        """The side path for a layer whose output has the dtype and device of ``like``."""
        delta = self.delta(layer.ghost(like))
        return lambda x, y, s: layer.apply(x, delta) * s

    def unfused_in_groups(self, layer: Layer, like: Tensor) -> Change:
        """The side path of a convolution whose channels are in groups: the change as a kernel, which is small there."""
        if not self.reads_weight:
            return Update.unfused(self, layer, like)
        weight = layer.weight(like.device, torch.promote_types(like.dtype, torch.float32))

        def change(x: Tensor, y: Tensor, s: float) -> Tensor:
            total = torch.zeros_like(weight)
            self.change(weight, total, s)
            return layer.apply(x, near(total, like))

        return change

    def unfused_bias(self, layer: Layer, like: Tensor) -> Change:
        """The side path of a change of the bias."""
        vector = self.delta(layer.bias_vector(like))
        return lambda x, y, s: layer.along(vector, y) * s

    # --- in files ----------------------------------------------------------------------------------------------------

    keys: ClassVar[tuple[Key, ...]] = ()
    """How files name its tensors, in every key format."""
    marks: ClassVar[tuple[str, ...]] = ()
    """Roles of tensors of which a module of this algorithm has at least one."""
    wraps: ClassVar[bool] = False
    """Whether it stands around another algorithm's update (``around``) instead of being read by itself."""
    inner_width: ClassVar[str] = ""
    """Role of the tensor whose first size is the rank."""
    peft: ClassVar[tuple[str, ...]] = ()
    """Methods of PEFT whose files it reads."""

    @classmethod
    def claims(cls, parts: Parts) -> bool:
        """Whether a module of a file is of this algorithm."""
        return any(mark in parts for mark in cls.marks)

    @classmethod
    @abstractmethod
    def from_parts(cls, parts: Parts) -> Update | Changes:
        """The update of a module of a file. Raises CorruptFileError for tensors that do not belong together."""

    @classmethod
    def bias_from_parts(cls, parts: Parts) -> Update | None:
        """The change of the module's bias, if it is said in this algorithm's tensors."""
        return None

    @classmethod
    def around(cls, inner: Update, parts: Parts) -> Update:
        """The update that this algorithm makes of another one, if the module has its tensors."""
        return inner

    def to_parts(self) -> dict[str, Tensor]:
        """Tensors of a file, by what follows the module's name. Raises InvalidInputError for what no file can say."""
        raise InvalidInputError(f"{self.title} cannot be written to a file")

    def to_peft(self) -> dict[str, Tensor] | None:
        """The same in PEFT's key format, which knows no alpha in a file; None if it cannot say it."""
        return None

    def bias_to_parts(self, weight: Update | None) -> dict[str, Tensor] | None:
        """The same of a change of a bias, beside this change of the weight; None if no file can say it."""
        return None

    # --- in algebra --------------------------------------------------------------------------------------------------

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel of the convolution that its factors are for; empty for linear layers."""
        return ()

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """``up`` (o r) and ``down`` (r i·y·x) in float32 with the scale inside ``up``; None if it is no product of two."""
        return None

    def norm(self) -> float | None:
        """‖ΔW‖ at strength 1, in no more memory than the file's tensors justify; None if it depends on the weight."""
        factors = self.factors()
        return None if factors is None else product_norm(*factors)

    # --- in training -------------------------------------------------------------------------------------------------

    trainings: ClassVar[tuple[TrainedAs, ...]] = ()
    """The names under which it is trained; empty if it cannot be begun from nothing."""
    learns: ClassVar[bool] = True
    """Whether one that was read from a file can be trained on."""

    @classmethod
    def fresh(cls, weight: Tensor, settings: Settings) -> Update:
        """A new one for this weight, which changes nothing yet.

        The weight is a matrix ``o i`` or a kernel ``o i y x``. An update that does not fit it is refused before anything is
        trained, so an algorithm of matrices alone may ignore the further axes.
        """
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Changes:
    """What a module of a file changes: the weight, and the bias if its algorithm does."""

    weight: Update
    bias: Update | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Wrapper(Update):
    """An update that acts through another one, whose tensors are its own."""

    inner: Update

    @property
    def title(self) -> str:
        return self.inner.title

    @property
    def rank(self) -> int | None:
        return self.inner.rank

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self.inner.weight_shape

    @classmethod
    def from_parts(cls, parts: Parts) -> Update | Changes:
        raise NotImplementedError  # it is never read by itself: see ``around``

    def tensors(self) -> dict[str, Tensor]:
        return {**self.inner.tensors(), **Update.tensors(self)}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Update:
        own = {name: tensors[name] for name in Update.tensors(self)}
        inner = {name: t for name, t in tensors.items() if name not in own}
        return replace(self, inner=self.inner.with_tensors(inner), **own)


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Wrapper):
    """Some rows of another update, for layers that the file's model fuses (q, k and v in one) and ours does not."""

    start: int
    length: int

    @property
    def weight_shape(self) -> tuple[int | None, ...]:
        return self.length, *self.inner.weight_shape[1:]

    def fits(self, shape: tuple[int, ...]) -> bool:
        """A part of a change that reads the weight would read rows that are elsewhere."""
        if self.inner.reads_weight or shape[0] != self.length:
            return False
        rows = self.inner.weight_shape[0] or shape[0]
        return rows >= self.start + self.length and self.inner.fits((rows, *shape[1:]))

    def delta(self, weight: Tensor) -> Tensor:
        whole = weight.new_empty(
            self.inner.weight_shape[0] or 0, *weight.shape[1:]
        )  # additive: its numbers are not read
        return self.inner.delta(whole)[self.start : self.start + self.length]


def shape_text(shape: tuple[int | None, ...]) -> str:
    """``320×768``, for messages."""
    return "×".join("any" if size is None else str(size) for size in shape)


def flat(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight: kernels count as columns, a vector is one column, a number one of one."""
    return (shape or (1,))[0], torch.Size(shape[1:]).numel()


def product_norm(a: Tensor | None, b: Tensor | None) -> float:
    """‖a b‖ for ``o r`` and ``r i`` (further axes of b count as i), by whichever is smaller: the product or r×r."""
    assert a is not None
    assert b is not None
    left, right = a.flatten(1).double(), b.flatten(1).double()  # squares of what float32 holds can overflow it
    if left.shape[0] * right.shape[1] <= left.shape[1] ** 2:
        return float(torch.linalg.vector_norm(left @ right))
    return float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())


def alike(*tensors: Tensor) -> list[Tensor]:
    """All in float32, or in float64 if one of them is."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def near(tensor: Tensor, like: Tensor) -> Tensor:
    """On the device and in the dtype of ``like``."""
    return tensor.to(like.device, like.dtype)


def wide(tensor: Tensor) -> Tensor:
    """In float32, or what it is already if that is wider."""
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
