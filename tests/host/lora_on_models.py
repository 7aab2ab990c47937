"""LoRAs on every kind of model that a ComfyUI builds, in every spelling that its key map offers, next to its own loader.

    COMFY/.venv/bin/python lora_on_models.py COMFY [MODEL ...]

Prints one JSON object per line and model: what was built, how many names in how many spellings, the largest difference of our
merged weights to the host's (relative to the weight), of our side paths to the merge, and what was dropped or refused.
tests/host/test_lora_on_models.py judges.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

host_folder, *chosen = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host_folder)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")

import comfy.lora  # noqa: E402
import comfy.supported_models  # noqa: E402
import host_models  # noqa: E402
import lora_cases  # noqa: E402
import torch  # noqa: E402
from host_loras import (  # noqa: E402
    LoRAPatch,
    beside,
    by_host,
    host_lora,
    is_there,
    largest,
    load_lora,
    lora_for,
    merged,
    patcher_of,
    spellings,
    weights_of,
)  # fmt: skip


def row_of(name: str) -> dict[str, Any]:
    start = time.perf_counter()
    patcher = patcher_of(name)
    base, plain = patcher.model, weights_of(patcher)
    names = comfy.lora.model_lora_keys_unet(base, {})
    row: dict[str, Any] = {
        "model": name, "base": type(base).__name__, "unet": type(base.diffusion_model).__name__, "names": len(names), "spellings": {},
        "merged": 0.0, "live": 0.0, "beside": 0, "merge alone": 0, "zero": True, "dropped": [], "refused": [], "not there": [],
    }  # fmt: skip
    wrong = {to[0] for to in names.values() if isinstance(to, tuple) and to[0] in plain and not is_there(to, plain)}
    for spelling, rounds in spellings(names).items():
        for entries in rounds:
            there = {
                n: to
                for n, to in entries.items()
                if is_there(to, plain) and not (isinstance(to, tuple) and to[0] in wrong)
            }
            row["not there"] += sorted(set(entries) - set(there))
            lora = lora_for(there, plain)
            if not lora:
                continue
            theirs = merged(by_host(patcher, lora, 0.7), plain)
            try:
                loaded = host_lora.LoadedLoRA(load_lora(lora, name=f"{name} {spelling}"))
                model, _, _, _ = host_lora.apply(patcher, None, loaded, "merged", strength=0.7)
            except Exception as error:
                row["refused"].append(f"{spelling}: {type(error).__name__}: {error}"[:600])
                continue
            ours = merged(model, plain)
            matched = host_lora.backend.place(loaded.weights, patcher, names=names)
            row["dropped"] += [f"{spelling}: {left.name}: {left.why}" for left in matched.left_out]
            if set(ours) != set(theirs):
                row["dropped"] += [
                    f"{spelling}: {key} is changed by one of the two" for key in sorted(set(ours) ^ set(theirs))
                ]
                ours = {k: t for k, t in ours.items() if k in theirs}
            row["merged"] = max(row["merged"], largest(ours, theirs))
            patch = LoRAPatch(matched, strength=0.7)
            layers, live, zero = beside(base.diffusion_model, patch.beside_layers(), ours)
            row["beside"] += layers
            row["merge alone"] += sum(match.needs_merged is not None for match in matched.matches)
            row["live"] = max(row["live"], live)
            off, _, _, _ = host_lora.apply(patcher, None, loaded, "merged", strength=0.0)
            row["zero"] = row["zero"] and zero and not off.patches
            row["spellings"][spelling] = row["spellings"].get(spelling, 0) + len(there)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def kinds() -> Iterator[str]:
    known = {kind.__name__ for kind in comfy.supported_models.models}
    yield from (name for name in host_models.MODELS if name in known and (not chosen or name in chosen))


torch.set_num_threads(1)
logging.getLogger().setLevel(logging.ERROR)
with torch.inference_mode():
    for kind in kinds():
        print(json.dumps(row_of(kind)), flush=True)
    for case in lora_cases.cases(chosen):
        print(json.dumps(case), flush=True)
known = [kind.__name__ for kind in comfy.supported_models.models]
left_out = {kind: why for kind, why in host_models.LEFT_OUT.items() if kind in known}
print(json.dumps({"known": known, "left out": left_out}), flush=True)
