"""The LoRA algorithms, one class and one file each. ``ALGORITHMS`` is the only list of them."""

from __future__ import annotations

from ..fresh import TrainedAs
from ..update import Update
from .butterfly import Butterfly
from .channel_scale import ChannelScale
from .decomposed import Decomposed
from .difference import Difference
from .generalized import Generalized
from .hadamard import Hadamard
from .input_butterfly import InputButterfly
from .input_orthogonal import InputOrthogonal
from .kronecker import Kronecker
from .low_rank import LowRank
from .orthogonal import Orthogonal
from .reflections import Reflections
from .replacement import Replacement
from .widening import Widened

ALGORITHMS: tuple[type[Update], ...] = (
    LowRank,
    Hadamard,
    Kronecker,
    Generalized,
    Butterfly,
    Orthogonal,
    InputOrthogonal,
    InputButterfly,
    ChannelScale,
    Reflections,
    Difference,
    Replacement,
    Decomposed,
    Widened,
)
"""A module of a file is of the first one that claims it. Reading, training, the config and the nodes ask this tuple."""


def trainings() -> dict[str, tuple[type[Update], TrainedAs]]:
    """Every name under which something is trained, the first one being the default."""
    return {training.name: (algorithm, training) for algorithm in ALGORITHMS for training in algorithm.trainings}
