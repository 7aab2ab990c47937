"""Adapters and LoRAs for others: a model card of what a file says of itself, and both on the Hugging Face Hub."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoints import load_adapter
from .errors import InvalidInputError, UnknownFormatError, one_line, quoted, reason
from .hub import HubPlace
from .lora.inspection import lora_facts
from .report import spec_facts

CARD = "README.md"
TRAINED = {
    "steps": "steps", "ss_steps": "steps", "batch": "batch", "ss_batch_size_per_device": "batch", "pictures": "pictures",
    "ss_num_train_images": "pictures", "ss_resolution": "resolution", "ss_learning_rate": "learning rate",
    "ss_optimizer": "optimizer", "ss_lr_scheduler": "schedule", "ss_mixed_precision": "precision", "ss_sd_model_name": "trained on",
    "base_files": "trained on", "prediction": "prediction", "modelspec.prediction_type": "prediction", "trained_by": "trained by",
}  # fmt: skip
"""What files say of their training, and what the card calls it."""


@dataclass(frozen=True, slots=True)
class Card:
    """What nobody but the author knows: the base model's repository, the licence, what it is for."""

    base_model: str = ""
    license: str = ""
    about: str = ""


def model_card(file: Path, repository: str = "", told: Card | None = None) -> str:
    """A model card for an adapter or a LoRA, in Markdown: how to use it, and the facts in its file; nothing is made up.

    ``repository`` is where it will be, ``owner/name``. Raises as ``load_adapter`` and ``lora_facts`` for what is neither.
    """
    told = told or Card()
    try:
        adapter = load_adapter(file)
    except UnknownFormatError:
        facts, front, usage, metadata = _lora(file, repository)
    else:
        facts, front, usage, metadata = _adapter(file, repository, spec_facts(adapter.spec)), _tags("ip-adapter"), _use(
            file, repository
        ), adapter.metadata  # fmt: skip
    training = {name: one_line(metadata[key]) for key, name in TRAINED.items() if key in metadata}
    parts = [
        _front({**front, "base_model": told.base_model, "license": told.license}),
        f"# {file.stem}",
        told.about,
        usage,
        "## What is in the file",
        _table({"file": file.name, "size": f"{file.stat().st_size / 1e6:.1f} MB", **facts}),
        *(["## How it was trained", _table(training)] if training else []),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def push_to_hub(file: Path, repository: str, *, told: Card | None = None, private: bool = True, api: Any = None) -> str:
    """Put an adapter or a LoRA with its model card into a repository of the Hub; returns its address.

    The repository is made if there is none, private unless told otherwise; a card that is there stays. The account is that of
    ``hf auth login``. ``api`` is a ``huggingface_hub.HfApi``. Raises InvalidInputError in one sentence where it does not work.
    """
    place = HubPlace.read(repository)
    if place is None or place.path or place.revision:
        raise InvalidInputError(f"{quoted(repository)} is no name of a repository; write owner/name")
    card = model_card(file, repository, told)
    import huggingface_hub

    api = api or huggingface_hub.HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        added = [huggingface_hub.CommitOperationAdd(file.name, str(file))]
        if not api.file_exists(repository, CARD):
            added.append(huggingface_hub.CommitOperationAdd(CARD, card.encode()))
        api.create_commit(repository, operations=added, commit_message=f"Add {file.name}")
    except Exception as error:
        raise InvalidInputError(
            f"{quoted(repository)} could not be written ({reason(error)}); log in with: hf auth login, to an account that may "
            "write there"
        ) from error
    return f"https://huggingface.co/{repository}"


def _adapter(file: Path, repository: str, facts: Mapping[str, object]) -> dict[str, str]:
    names = {"family": "family", "base_model": "base model", "tokens": "image tokens", "encoder": "image encoder", "unconditional": "unconditional"}  # fmt: skip
    told = {name: one_line(facts[key]) for key, name in names.items() if facts.get(key)}
    return {**told, "features": f"{facts['feature']}, {facts['feature_dim']} wide", "layers": str(facts["layers"])}


def _use(file: Path, repository: str) -> str:
    name = f"{repository}:{file.name}" if repository else file.name
    return f"""## Use

```python
from ipadapter_core import image_prompt

with image_prompt(pipeline, "{name}", "cat.png", strength=0.8):
    pictures = pipeline("a garden").images
```

In ComfyUI put the file into `models/ipadapter`; `ipadapter generate --adapter {name} --image cat.png` draws with it from a
terminal."""


def _lora(file: Path, repository: str) -> tuple[dict[str, str], dict[str, Any], str, Mapping[str, str]]:
    from .lora import load_lora

    facts, metadata = lora_facts(file), load_lora(file).metadata
    words = facts["trigger_words"]
    front = _tags("lora") | ({"instance_prompt": words[0]} if words else {})
    name = f"{repository}:{file.name}" if repository else file.name
    usage = f"## Use\n\nIn ComfyUI put the file into `models/loras`; `ipadapter generate --lora {name}:0.8` draws with it from a terminal."
    if words:
        usage += f"\n\nWords that it listens to: {', '.join(map(one_line, words))}"
    told = {
        "base model": facts["base_model"], "keys": facts["key_format"], "modules": _counted(facts["modules"]),
        "algorithms": _counted(facts["algorithms"]), "ranks": ", ".join(facts["ranks"]),
    }  # fmt: skip
    return {name: one_line(value) for name, value in told.items() if value}, front, usage, metadata


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _tags(kind: str) -> dict[str, Any]:
    return {"pipeline_tag": "text-to-image", "library_name": "diffusers", "tags": [kind, "ipadapter-studio"]}


def _front(values: Mapping[str, str | Sequence[str]]) -> str:
    """The block of YAML in front of a card. Texts are written as JSON, which YAML reads."""
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items() if value]
    return "\n".join(("---", *lines, "---"))


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(
        ("| | |", "|---|---|", *(f"| {name} | {value.replace('|', chr(92) + '|')} |" for name, value in rows.items()))
    )
