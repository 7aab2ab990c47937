"""Model cards say what files say; files reach a repository with their card; plus adapters fit diffusers' own loader."""

# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ipadapter_core.checkpoints import describe_adapter, load_adapter, save_adapter
from ipadapter_core.checkpoints.plus import deepened
from ipadapter_core.commands.cli import main
from ipadapter_core.demo.world import FOLDER
from ipadapter_core.errors import AdapterError, InvalidInputError
from ipadapter_core.sharing import Card, model_card, push_to_hub
from tiny import tiny_state

BASE, PLUS = (FOLDER / "adapters" / f"ip-adapter-{name}.safetensors" for name in ("base", "plus"))
STYLE = FOLDER / "loras" / "demo-world-style.safetensors"


class FakeApi:
    """A Hub with repositories in memory."""

    def __init__(self, refuses: str = "") -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.refuses = refuses

    def create_repo(self, name: str, private: bool, exist_ok: bool) -> None:
        if self.refuses:
            raise RuntimeError(self.refuses)
        assert exist_ok
        if name not in self.repositories:
            self.repositories[name], self.private[name] = {}, private

    def file_exists(self, name: str, file: str) -> bool:
        return file in self.repositories[name]

    def create_commit(self, name: str, operations: list[Any], commit_message: str) -> None:
        assert commit_message.startswith("Add ")
        for one in operations:
            given = one.path_or_fileobj
            self.repositories[name][one.path_in_repo] = given if isinstance(given, bytes) else Path(given).read_bytes()


def test_a_card_tells_what_an_adapter_says_of_itself(tmp_path: Path) -> None:
    adapter = load_adapter(PLUS)
    told = {
        "steps": "1200",
        "pictures": "480",
        "base_files": "my | model",
        "settings": '{"model": {"base": "/home/me/model"}}',
    }
    file = save_adapter(adapter, tmp_path / "mine.safetensors", metadata=told)
    card = model_card(file, "me/adapters", Card("someone/base", "apache-2.0", "For testing."))
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    values = dict(line.split(": ", 1) for line in front.splitlines())
    assert json.loads(values["base_model"]) == "someone/base"
    assert json.loads(values["license"]) == "apache-2.0"
    assert json.loads(values["tags"])[0] == "ip-adapter"
    spec = describe_adapter(PLUS)
    for row in (
        "| family | plus |", f"| image tokens | {spec.num_tokens} |", f"| features | penultimate, {spec.feature_dim} wide |",
        "| steps | 1200 |", "| pictures | 480 |", "| trained on | my \\| model |",
    ):  # fmt: skip
        assert row in body
    assert 'image_prompt(pipeline, "me/adapters:mine.safetensors"' in body
    assert "For testing." in body
    assert "/home/me" not in card


def test_what_nobody_said_is_not_in_a_card() -> None:
    card = model_card(PLUS)
    for word in ("base_model:", "license", "How it was trained", "steps"):
        assert word not in card


def test_a_card_of_a_lora_names_its_words(tmp_path: Path) -> None:
    weights = {"lora_unet_x.lora_down.weight": torch.ones(2, 8), "lora_unet_x.lora_up.weight": torch.ones(8, 2)}
    told = {"modelspec.trigger_phrase": "in ink: «style»", "ss_steps": "400", "ss_optimizer": "adamw"}
    save_file(weights, tmp_path / "ink.safetensors", told)
    card = model_card(tmp_path / "ink.safetensors", "me/loras")
    assert 'instance_prompt: "in ink: «style»"' in card
    assert "| ranks | 2 |" in card
    assert "| steps | 400 |" in card
    assert "--lora me/loras:ink.safetensors:0.8" in card
    (tmp_path / "x.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterError):
        model_card(tmp_path / "x.safetensors")


def test_a_file_and_its_card_reach_a_repository() -> None:
    hub = FakeApi()
    assert push_to_hub(STYLE, "me/loras", api=hub) == "https://huggingface.co/me/loras"
    assert hub.private == {"me/loras": True}
    files = hub.repositories["me/loras"]
    assert files[STYLE.name] == STYLE.read_bytes()
    assert files["README.md"].decode() == model_card(STYLE, "me/loras")
    files["README.md"] = b"written by hand"
    push_to_hub(BASE, "me/loras", api=hub, private=False)
    assert set(files) == {STYLE.name, BASE.name, "README.md"}
    assert files["README.md"] == b"written by hand"
    push_to_hub(BASE, "me/open", api=hub, private=False)
    assert hub.private["me/open"] is False


@pytest.mark.parametrize("name", ["loras", "me/loras:file", "me/loras@main", "/me/loras"])
def test_no_name_of_a_repository_is_one_sentence(name: str) -> None:
    with pytest.raises(InvalidInputError, match="write owner/name"):
        push_to_hub(STYLE, name, api=FakeApi())


def test_a_hub_that_refuses_is_one_sentence() -> None:
    with pytest.raises(InvalidInputError, match=r"could not be written .*401.*hf auth login") as caught:
        push_to_hub(STYLE, "me/loras", api=FakeApi("401 Client Error\nUnauthorized"))
    assert "\n" not in str(caught.value)


def test_the_command_writes_a_card_and_leaves_one_that_is_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "mine.safetensors"
    assert main(["export", str(BASE), str(target), "--card", "--license", "mit", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert Path(facts["card"]).read_text() == model_card(target, told=Card(license="mit"))
    assert main(["export", str(BASE), str(target), "--card"]) == 2
    assert "is there already" in capsys.readouterr().err


# --- diffusers' own loader --------------------------------------------------------------------------------------------


def test_diffusers_own_loader_reads_the_demo_worlds_plus_adapter(tmp_path: Path) -> None:
    """Its resamplers have 4 layers; the shipped one has fewer, and ``--for diffusers`` adds some that do nothing."""
    from diffusers import StableDiffusionPipeline

    file = tmp_path / "plus.safetensors"
    assert main(["export", str(PLUS), str(file), "--for", "diffusers", "--dtype", "float32"]) == 0
    pipeline: Any = StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None, local_files_only=True)
    pipeline.load_ip_adapter(str(tmp_path), subfolder="", weight_name=file.name)
    adapter = load_adapter(PLUS, dtype=torch.float32)
    features = torch.randn(2, 65, adapter.spec.feature_dim, generator=torch.Generator().manual_seed(0))
    theirs = pipeline.unet.encoder_hid_proj.image_projection_layers[0]
    torch.testing.assert_close(theirs(features), adapter.tokens(features), rtol=1e-4, atol=1e-5)
    deeper = load_adapter(file)
    torch.testing.assert_close(deeper.tokens(features), adapter.tokens(features), rtol=0, atol=0)
    assert deeper.spec.options["depth"] == 4


def test_only_plus_adapters_can_be_deepened() -> None:
    with pytest.raises(InvalidInputError, match="is a base adapter; plus adapters"):
        deepened(load_adapter(BASE), 4)
    deep = load_adapter(tiny_state("plus", depth=3))
    with pytest.raises(InvalidInputError, match="with 3 layers"):
        deepened(deep, 2)
