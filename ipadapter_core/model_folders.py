"""Base models for headless use: a folder of diffusers, or one file beside a folder with its configs."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import (
    CorruptFileError,
    InvalidInputError,
    UnsafeFileError,
    one_line,
    out_of_memory,
    quoted,
    reason,
)
from .files.state_dict import StoredTensors, describe_state_dict
from .files.text import read_json, regular_file
from .models import layout_of
from .models.sites import ModelLayout
from .models.unet import unet_of_width
from .narrowing import is_row, is_table
from .quiet import quietly

DENOISERS = ("transformer", "unet")
"""The part of a pipeline in which image prompts act, by its names in ``model_index.json``."""

PREFIX = "model.diffusion_model."
"""Of a denoiser's tensors in a file that holds a whole model."""


def load_pipeline(
    model: str | Path,
    *,
    config: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Any:
    """The text-to-image pipeline in a diffusers model folder or in one file (SD1.5, SD2, SDXL, FLUX.1, Chroma, SD3.5).

    ``config`` is the folder that one file is described by, with a ``model_index.json``; without it that beside the file, of its
    name. Of a UNet's file everything is read, of a transformer's the transformer alone: text encoders and autoencoder, which
    fine-tunes share, are then the folder's. Only local files are read. Raises InvalidInputError if there is no such pipeline,
    CorruptFileError for a damaged one.
    """
    path = Path(model)
    home = config_folder(path, config)
    check_configs(home)
    pipeline = _single_file(path, home, dtype) if path.is_file() else _folder(home, dtype)
    denoiser = next((name for name in DENOISERS if getattr(pipeline, name, None) is not None), "")
    for part in (denoiser or "unet or transformer", "vae", "text_encoder"):
        if getattr(pipeline, part, None) is None:
            raise InvalidInputError(
                f"{home} holds a {type(pipeline).__name__} without {part}; image prompts need an SD1.5, SD2, SDXL, FLUX.1, Chroma or "
                "SD3.5 pipeline"
            )
    if hasattr(pipeline, "safety_checker"):
        pipeline.safety_checker = None
    return pipeline.to(device)


def config_folder(model: Path, config: str | Path | None = None) -> Path:
    """The folder with a model's configs and tokenizers: the model itself, or for one file ``config`` or its neighbour.

    Raises InvalidInputError where there is none, FileNotFoundError where there is no model.
    """
    if not model.is_file():
        if not model.exists():
            raise FileNotFoundError(f"the model {quoted(model)} does not exist: check the path and the spelling")
        if not (model / "model_index.json").is_file():
            raise InvalidInputError(f"{model} is not a diffusers model folder: it has no model_index.json")
        return model
    if model.suffix not in (".safetensors", ".sft"):
        raise InvalidInputError(
            f"{model} is a {model.suffix or 'nameless'} file; models in one file are read as .safetensors, which run no code"
        )
    home = Path(config) if config else model.with_suffix("")
    if not (home / "model_index.json").is_file():
        raise InvalidInputError(
            f"{model.name} holds no configs, tokenizers and text encoders, and {home} is no diffusers folder that has them: name one of "
            "the same kind of model with --config, or put it there"
        )
    return home


def _folder(folder: Path, dtype: torch.dtype, **parts: Any) -> Any:
    try:
        with quietly("diffusers", "transformers"):
            from diffusers import DiffusionPipeline

            made: Any = DiffusionPipeline
            return made.from_pretrained(folder, **{_dtype_name(): dtype}, local_files_only=True, **parts)
    except Exception as error:  # diffusers and transformers let every kind through
        if out_of_memory(error):
            raise
        raise CorruptFileError(
            f"{quoted(folder)} cannot be loaded as a diffusers pipeline ({reason(error)}): download it again"
        ) from error


def _single_file(path: Path, home: Path, dtype: torch.dtype) -> Any:
    part, kind = _denoiser(home)
    if part == "unet":
        return open_single_file(path, home, **{_dtype_name(): dtype})
    stored = StoredTensors(path)
    keys = [key for key in stored.described.tensors if key.startswith(PREFIX)] or list(stored.described.tensors)
    tensors = {key.removeprefix(PREFIX): tensor for key, tensor in stored.read_some(keys).items()}
    try:
        with quietly("diffusers"):
            model = kind.from_single_file(
                tensors, config=str(home), subfolder=part, local_files_only=True, **{_dtype_name(): dtype}
            )
    except Exception as error:  # diffusers lets KeyErrors and its own kinds through
        if out_of_memory(error):
            raise
        raise InvalidInputError(
            f"{path} cannot be loaded as the {part} that {home} describes ({reason(error)}); give a folder of the same kind of "
            "model, or a file with the weights of its transformer"
        ) from error
    check_complete(model, path, part, home)
    return _folder(home, dtype, **{part: model})


def open_single_file(path: Path, config: Path, **parts: Any) -> Any:
    """diffusers' pipeline of one file in the original layout, described by the folder ``config``; nothing is downloaded."""
    import diffusers

    try:
        index = read_table(config / "model_index.json")
        made: Any = getattr(diffusers, index["_class_name"])
        # no base model's file holds these, whatever the folder lists
        left_out = {part: None for part in ("image_encoder", "feature_extractor", "safety_checker") if part in index}
        pipeline: Any = made.from_single_file(str(path), config=str(config), local_files_only=True, **left_out, **parts)
    except Exception as error:  # diffusers lets KeyErrors and its own kinds through
        if out_of_memory(error):
            raise
        raise InvalidInputError(
            f"{path} cannot be loaded as {config} describes it ({reason(error)}); text encoder, "
            "autoencoder and UNet must all be in the file, and its config must be of its architecture"
        ) from error
    for part, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            check_complete(module, path, part, config)
    return pipeline


def check_complete(module: nn.Module, path: Path, part: str, config: Path) -> None:
    """Raise InvalidInputError if weights were not in the file, of which diffusers says nothing."""
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise InvalidInputError(
            f"{path} lacks {len(empty)} weights of {part} as {config} describes it, such as {empty[0]}"
        )


def _denoiser(home: Path) -> tuple[str, Any]:
    """The part of a pipeline in which image prompts act, and its class. Raises InvalidInputError where there is none."""
    import diffusers

    index = read_table(home / "model_index.json")
    for part in DENOISERS:
        named = index.get(part)
        if isinstance(named, list) and named[:1] == ["diffusers"] and isinstance(named[-1], str):
            kind = getattr(diffusers, named[-1], None)
            if isinstance(kind, type) and issubclass(kind, nn.Module):
                return part, kind
    raise InvalidInputError(
        f"{home} is a pipeline without a unet or transformer of diffusers, so there is nothing in which an image prompt could act"
    )


def denoiser_of(home: Path) -> str:
    """``unet`` or ``transformer``: the part of a model folder in which image prompts act. Raises InvalidInputError."""
    return _denoiser(home)[0]


def published_as(path: Path) -> str | None:
    """The repository with the configs of a UNet's model in one file, told by its shapes; None for any other file."""
    if path.suffix not in (".safetensors", ".sft"):
        return None
    tensors = describe_state_dict(path).tensors
    width = next((int(t.shape[1]) for key, t in tensors.items() if _TEXT.search(key)), 0)
    known = unet_of_width(width)
    return None if known is None or known.published is None else known.published.repository


_TEXT = re.compile(r"^model\.diffusion_model\..*attn2\.to_k\.weight$")


def layout_in(model: str | Path, config: str | Path | None = None) -> ModelLayout:
    """The sites of the model in a diffusers folder, or in one file that a folder describes, from its config; no weight is read.

    Raises InvalidInputError, CorruptFileError, and IncompatibleAdapterError for a model in which image prompts cannot act.
    """
    home = config_folder(Path(model), config)
    check_configs(home)
    part, kind = _denoiser(home)
    said = read_table(home / part / "config.json")
    for key, value in said.items():
        numbers = value if is_row(value) else (value,)
        if any(isinstance(number, int) and not 0 <= number <= MOST for number in numbers):
            raise CorruptFileError(
                f"{quoted(home / part / 'config.json')}: {one_line(key)} is {quoted(value)}, more than any model has"
            )
    try:
        with quietly("diffusers"), torch.device("meta"):
            module = kind.from_config(said)
    except Exception as error:  # diffusers checks values in its own ways
        raise CorruptFileError(
            f"{quoted(home / part / 'config.json')} describes no {kind.__name__} ({reason(error)}): download it again"
        ) from error
    return layout_of(module)


MOST = 200_000
"""Of any number in a denoiser's config; SDXL's and Flux's are below 10,000. Layers on ``meta`` take time, if no memory."""

CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
"""What diffusers and transformers read of a model's parts before any weights."""

LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)
"""Where the parts of pipelines come from; the third is where old folders have their safety checker."""

MAX_TIMESTEPS = 100_000
"""Of a scheduler, which makes tables of as many numbers; published models have 1000."""


def check_configs(folder: Path) -> None:
    """Read the configs of a diffusers folder before diffusers does, whose readers hang at pipes and fail in many ways.

    Raises InvalidInputError for what is no plain file, CorruptFileError for what is no table of JSON, UnsafeFileError for a
    folder that brings code, which older versions of diffusers run unasked.
    """
    code = next((path for pattern in ("*.py", "*/*.py") for path in folder.glob(pattern)), None)
    parts: list[list[object]] = [
        part for part in read_table(folder / "model_index.json").values() if isinstance(part, list)
    ]
    if code is not None or any(part[:1] and part[0] not in LIBRARIES for part in parts):
        raise UnsafeFileError(
            f"{quoted(folder)} brings code of its own ({quoted(code.name) if code else 'model_index.json names it'}), which is not run; "
            "choose a folder whose parts are of diffusers and transformers"
        )
    for path in sorted(folder.glob("*/*")):
        if path.exists() and not path.is_dir():
            regular_file(path)
    for path in (folder / "model_index.json", *(path for name in CONFIGS for path in sorted(folder.glob(f"*/{name}")))):
        config = read_table(path)
        steps = config.get("num_train_timesteps", 0)
        if not isinstance(steps, int) or not 0 <= steps <= MAX_TIMESTEPS:
            raise CorruptFileError(f"{quoted(path)}: num_train_timesteps is {quoted(steps)}; 1000 is usual")


def read_table(path: Path) -> dict[str, Any]:
    """The table in a JSON file. Raises as ``text_files.read_json``, and CorruptFileError for any other value."""
    table = read_json(path)
    if not is_table(table):
        raise CorruptFileError(f"{quoted(path)} holds no table of settings; download it again")
    return table


def hold_in_memory(module: nn.Module) -> None:
    """Copy weights on the CPU, which may be mapped from their files: a file that is replaced then kills no process."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()


def _dtype_name() -> str:
    import diffusers
    from packaging.version import Version

    return "dtype" if Version(diffusers.__version__) >= Version("0.42") else "torch_dtype"  # deprecated since
