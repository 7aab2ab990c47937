"""Folders of base models that are damaged or hostile: one sentence each, and files that change kill nothing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from ipadapter_core.errors import AdapterError, CorruptFileError
from ipadapter_core.model_folders import load_pipeline
from ipadapter_core.training.frozen import encoder_sizes, files_stamp, load_base, model_home
from tiny_training import save_model

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


CONTENTS = {
    "cut": b'{"a": ', "list": b"[]", "text": b'"x"', "null": b"null", "deep": b"[" * 100_000, "digits": b'{"a": ' + b"9" * 5000 + b"}",
    "nan": b'{"a": NaN}', "bytes": b"\xff\xfe\x00\xd8", "code page": b'{"a": "caf\xe9"}', "zeros": bytes(50),
}  # fmt: skip
FILES = ("model_index.json", "unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json",
         "tokenizer/tokenizer_config.json")  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_damaged_configs_are_one_sentence(model: Path, tmp_path: Path, content: str) -> None:
    for name in FILES:
        folder = tmp_path / name.replace("/", " ")
        shutil.copytree(model, folder)
        (folder / name).write_bytes(CONTENTS[content])
        with pytest.raises(AdapterError) as caught:
            load_base(str(folder))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("model_index.json", {"_class_name": "os"}),
        ("model_index.json", {"_class_name": 3}),
        ("model_index.json", {"unet": ["diffusers", "Nothing"]}),
        ("model_index.json", {"unet": 3}),
        ("unet/config.json", {"block_out_channels": "many"}),
        ("unet/config.json", {"block_out_channels": []}),
        ("unet/config.json", {"cross_attention_dim": None, "_class_name": None}),
        ("vae/config.json", {"encoder_block_out_channels": 3}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**12}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": "x"}),
        ("scheduler/scheduler_config.json", {"beta_schedule": "x"}),
    ],
)
def test_configs_of_other_things_are_one_sentence(
    model: Path, tmp_path: Path, name: str, changes: dict[str, object]
) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / name
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(AdapterError) as caught:
        load_pipeline(tmp_path / "model")
    assert "\n" not in str(caught.value)


def test_pipes_among_a_models_files_are_refused(model: Path, tmp_path: Path) -> None:
    for number, name in enumerate((*FILES[1:], "unet/diffusion_pytorch_model.safetensors")):
        folder = tmp_path / str(number)
        shutil.copytree(model, folder)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(AdapterError, match="no plain file"):
            load_base(str(folder))
        files_stamp(str(folder), "unet", "vae")


@pytest.mark.parametrize(
    "config",
    [{}, [], {"image_size": 0}, {"patch_size": 0}, {"image_size": 10**12}, {"hidden_size": "x"}, {"patch_size": -1}, {"vision_config": 3}],
)  # fmt: skip
def test_encoder_configs_that_say_nothing_sensible(model: Path, tmp_path: Path, config: object) -> None:
    shutil.copytree(model / "image_encoder", tmp_path / "image_encoder")
    file = tmp_path / "image_encoder/config.json"
    values = {**json.loads(file.read_text()), **config} if config and isinstance(config, dict) else config
    file.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match=r"no readable config\.json") as caught:
        encoder_sizes(str(tmp_path), "")
    assert "\n" not in str(caught.value)


def test_a_single_files_configs_are_checked(model: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    keys = ("input_blocks.0.0.weight", "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight")
    save_file({f"model.diffusion_model.{key}": torch.ones(8, 16) for key in keys}, tmp_path / "a.safetensors")
    for number, content in enumerate((b"[]", b"{}", b'{"block_out_channels": 3, "cross_attention_dim": 16}', b"{")):
        shutil.copytree(model, tmp_path / str(number))
        (tmp_path / f"{number}/unet/config.json").write_bytes(content)
        with pytest.raises(AdapterError):
            model_home(str(tmp_path / "a.safetensors"), str(tmp_path / str(number)))
    (tmp_path / "a.safetensors").write_bytes(b"\x05\0\0\0\0\0\0\0{")
    with pytest.raises(CorruptFileError, match="not a readable safetensors file"):
        model_home(str(tmp_path / "a.safetensors"), str(model))


def test_weights_that_are_cut_off_while_in_use_kill_nothing(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    child = os.fork()
    if child == 0:
        base = load_base(str(tmp_path / "model"))
        base.to(CPU, torch.float32)
        before = [float(p.sum()) for p in base.unet.parameters()]
        for file in (tmp_path / "model").rglob("*.safetensors"):
            os.truncate(file, 0)
        parts = (base.unet, base.vae, *base.text_encoders)
        assert [float(p.sum()) for p in base.unet.parameters()] == before
        os._exit(int(not all(torch.isfinite(p).all() for part in parts for p in part.parameters())))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
