"""What can go wrong on the way from a file and a picture to a patched model, one class per cause."""

from __future__ import annotations


class AdapterError(ValueError):
    """Base of every error this package raises on purpose; says what was seen, what was expected, what to do."""


class UnknownFormatError(AdapterError):
    """The tensors are readable, but they are not (or not only) an IP-Adapter of a family that can be loaded."""


class UnsafeFileError(AdapterError):
    """A pickle that would run code when opened; nothing in it was run."""


class CorruptFileError(AdapterError):
    """The file is truncated, damaged, not a file of tensors, incomplete, or holds NaN or infinite weights."""


class IncompatibleAdapterError(AdapterError):
    """The adapter does not fit the model it is applied to."""


class IncompatibleEncoderError(AdapterError):
    """The adapter was trained on features of another image encoder than the one given."""


class InvalidInputError(AdapterError):
    """A value from the user that cannot be used: an empty batch, an image of 0 pixels, an unknown option."""
