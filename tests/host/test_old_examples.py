"""Every example workflow that the old pack ships, of both its versions, runs with our nodes, and what `ipadapter migrate`
makes of it gives the same pictures. Needs $IPADAPTER_PLUS_PATH.

``nodes/legacy/README.md`` lists what ran, and what stood in for models and other packs' nodes.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from host.comfy_server import ComfyServer
from host.old_examples import Example
from ipadapter_core.legacy.migrate import migrate

OLD = os.environ.get("IPADAPTER_PLUS_PATH")
FIRST_VERSION = "6a411dc"  # the last commit before the old pack's rewrite of 2024-03-23


VARIANT = "variant of ipadapter_advanced.json"


def history(*command: str) -> str:
    """A git command's output in the old pack's checkout; nothing where that has no such history."""
    done = subprocess.run(["git", "-C", str(OLD), *command], capture_output=True, text=True, check=False)
    return done.stdout


def examples() -> dict[str, str]:
    """Name and text of every workflow, and of some with other settings that migrate in another way."""
    if not OLD:
        return {}
    found = {file.name: file.read_text() for file in sorted(Path(OLD).glob("examples/*.json"))}
    for path in history("ls-tree", "--name-only", FIRST_VERSION, "examples/").splitlines():
        if path.endswith(".json"):
            found[f"first version, {Path(path).name}"] = history("show", f"{FIRST_VERSION}:{path}")
    advanced = found["ipadapter_advanced.json"]
    found[f"{VARIANT}, style and composition"] = advanced.replace('"linear"', '"style and composition"')
    for kind in ("StyleTransfer", "CompositionBatch"):
        precise = advanced.replace('"IPAdapterAdvanced"', f'"IPAdapterPrecise{kind}"').replace('"linear"', "0.3")
        found[f"{VARIANT}, precise {kind}"] = precise
    return found


EXAMPLES = examples()


@pytest.mark.skipif(not EXAMPLES, reason="no old pack at $IPADAPTER_PLUS_PATH")
@pytest.mark.parametrize("name", sorted(EXAMPLES, key=lambda name: ("xl" in EXAMPLES[name].lower(), name)))
def test_an_example_of_the_old_pack_runs_and_migrates_to_the_same_pictures(
    server: ComfyServer, model_cache: Path, adapters: Path, name: str, record_property: pytest.RecordProperty
) -> None:
    example = Example(json.loads(EXAMPLES[name]), server, model_cache, adapters)
    result = server.run(example.prompt())
    pictures = {number: result.tensor(saved) for number, saved in example.saved.items()}
    assert pictures
    assert all(np.isfinite(picture).all() for picture in pictures.values())
    record_property("stand_ins", ", ".join(sorted(example.stand_ins)))
    print(f"{name}: {', '.join(sorted(example.stand_ins))}")

    migrated, report = migrate(json.loads(EXAMPLES[name]), example.unet)
    print("\n".join(report))
    assert not name.startswith(VARIANT) or "ImagePromptSchedule" in {node["type"] for node in migrated["nodes"]}
    again = Example(migrated, server, model_cache, adapters)
    again.hidden = example.hidden
    result = server.run(again.prompt())
    assert again.saved.keys() == pictures.keys()
    for number, saved in again.saved.items():
        np.testing.assert_allclose(result.tensor(saved), pictures[number], rtol=0, atol=1e-4, err_msg=number)
