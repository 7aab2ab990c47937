"""Face models in ComfyUI's folders."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ...ipadapter_core import InvalidInputError
from ...ipadapter_core.errors import quoted
from ...ipadapter_core.images.faces import FaceAnalyzer, open_face_model

PACKS = ("buffalo_l", "antelopev2")
_FACE_MODELS: dict[tuple[str, str], FaceAnalyzer] = {}


def load(pack: str, provider: str) -> FaceAnalyzer:
    """A face model of ``models/insightface``, one copy per pack and provider. Raises InvalidInputError for another pack."""
    if pack not in PACKS:  # a folder's name, which the package insightface would also download
        raise InvalidInputError(f"the face model {quoted(pack)} is none of {', '.join(PACKS)}")
    key = (pack, provider)
    if key not in _FACE_MODELS:
        _FACE_MODELS[key] = open_face_model(_root(), pack, provider)
    return _FACE_MODELS[key]


def there() -> list[str]:
    """The packs that lie in ``models/insightface/models``."""
    return [pack for pack in PACKS if any((_root() / "models" / pack).glob("*.onnx"))]


def _root() -> Path:
    return Path(folder_paths.models_dir) / "insightface"
