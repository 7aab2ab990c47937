"""A section of ``check.py``: the trainer's precisions, resumption and memory on the device, and samples per second.

    python tests/gpu/trainer.py [--toy]

What a run does is tried on a tiny model; memory and speed on SD1.5's and SDXL's shapes with random weights.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor, nn

from gpu.in_diffusers import REAL, real_unet
from gpu.rows import attempt, cuda, holds, seconds, set_toy, show, without
from ipadapter_core import load_adapter
from ipadapter_core.images.encoder import TransformersImageEncoder
from ipadapter_core.training import parse_config, train, write_config
from ipadapter_core.training.accelerator import build_accelerator
from ipadapter_core.training.adapter import fresh_adapter
from ipadapter_core.training.adapter_trainee import AdapterStep, AdapterTrainee
from ipadapter_core.training.batches import Batch, Nothing
from ipadapter_core.training.config import AdapterConfig
from ipadapter_core.training.frozen import EncoderSizes, FrozenBase, freeze
from ipadapter_core.training.memory import predict
from ipadapter_core.training.objectives import LossConfig, objective_for
from ipadapter_core.training.optimizers import build_optimizer
from ipadapter_core.training.order import draw
from tiny_training import save_model, save_pictures, tiny_config

DEVICE = torch.device("cuda" if cuda() else "cpu")
STEPS = 6


# --- whole runs of a tiny model --------------------------------------------------------------------------------------


class Runs:
    """A tiny model, pictures and a cache, and trainings of it on the device."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model, self.pictures = save_model(folder / "model"), save_pictures(folder / "pictures", 9)

    def config(self, name: str, **changes: Any) -> Any:
        more = {"data__cache": str(self.folder / "cache"), "train__device": DEVICE.type, **changes}
        return tiny_config(self.model, self.pictures, self.folder / name, **more)

    def losses(self, name: str) -> Tensor:
        lines = (self.folder / name / "progress.jsonl").read_text().splitlines()
        return torch.tensor([row["loss"] for row in map(json.loads, lines) if row["event"] == "step"])

    def weights(self, name: str) -> dict[str, Tensor]:
        return load_adapter(self.folder / name / "ip-adapter.safetensors").module.checkpoint_state()

    def same(self, a: str, b: str) -> bool:
        ours, theirs = self.weights(a), self.weights(b)
        return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def precisions(runs: Runs) -> None:
    """Half precision next to float32, step by step; fp16 with its scaler."""
    train(runs.config("fp32"))
    expected = runs.losses("fp32")
    for precision in ("bf16", "fp16"):
        name = f"trainer, {precision}: losses next to fp32"
        if precision == "fp16" and not cuda():
            without(name, "needs CUDA")
            continue
        train(runs.config(precision, train__precision=precision))
        found = runs.losses(precision)
        show(name, float(((found - expected) / expected).abs().max()), "relative", 0.03)


def resumed(runs: Runs) -> None:
    """A run whose end is taken away goes on from its middle to the same bits, also in half precision with a scaler."""
    for precision in ("fp32", "fp16" if cuda() else "bf16"):
        changes = {
            "train__precision": precision,
            "train__accumulate": 2,
            "train__schedule": "cosine",
            "output__keep_states": 9,
        }
        config = runs.config(f"whole {precision}", **changes)
        train(config)
        whole, other = runs.folder / f"whole {precision}", runs.folder / f"resumed {precision}"
        shutil.copytree(whole, other)
        for file in other.glob("*.safetensors"):
            file.unlink()
        states = sorted(other.glob("state-*"))
        shutil.rmtree(states[-1])
        outcome = train(replace(config, output=replace(config.output, folder=str(other))))
        again = len(states) > 1 and outcome.step == STEPS
        holds(f"trainer, {precision}: resumed after step {states[-2].name[-1]} to the same bits", again and runs.same(whole.name, other.name))  # fmt: skip


def under_torchrun(runs: Runs) -> None:
    """One process of torchrun (NCCL on a GPU) trains what a plain run does."""
    name = f"trainer, one process under torchrun{' (NCCL)' if cuda() else ''}"
    train(runs.config("alone"))
    write_config(runs.config("launched"), runs.folder / "launched.toml")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=1",
        "--master_port=29517",
        "-m",
        "ipadapter_core",
    ]
    done = subprocess.run(
        [*command, "train", str(runs.folder / "launched.toml")], capture_output=True, text=True, timeout=120
    )
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no output"])[-1])
    apart = (runs.losses("launched") - runs.losses("alone")).abs().max()
    show(f"{name}: losses next to a plain run", float(apart), "", 1e-6)


def eight_bit(runs: Runs) -> None:
    """8-bit AdamW learns about what AdamW does."""
    name = "trainer, 8-bit AdamW: losses next to AdamW's"
    if importlib.util.find_spec("bitsandbytes") is None:
        return without(name, "bitsandbytes is not installed")
    if not cuda():
        return without(name, "needs CUDA")
    train(runs.config("adamw"))
    train(runs.config("adamw8bit", train__optimizer="adamw8bit"))
    show(name, float((runs.losses("adamw8bit") / runs.losses("adamw") - 1).abs().max()), "relative", 0.1)
    return None


# --- real shapes -----------------------------------------------------------------------------------------------------


SCHEDULER = SimpleNamespace(
    config={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
)


def filled(build: Any) -> Any:
    """A model of transformers or diffusers with random weights on the device, made without numbers first."""
    with torch.device("meta"):
        model = build()
    model.to_empty(device=DEVICE)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02)
        else:
            tensor.copy_(torch.arange(tensor.numel(), device=DEVICE).reshape(tensor.shape))
    freeze(model)
    return model


def real_models(kind: str, toy: bool) -> tuple[FrozenBase, TransformersImageEncoder]:
    """The UNet, text encoders and VAE of SD1.5 or SDXL and OpenCLIP ViT-H/14, or all of them narrow."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPVisionConfig,
        CLIPVisionModelWithProjection,
    )

    torch.manual_seed(0)

    def text(width: int, layers: int) -> Any:
        wide, deep = (width // 16, 1) if toy else (width, layers)
        return CLIPTextConfig(
            hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=deep, num_attention_heads=wide // (16 if toy else 64),
            projection_dim=80 if toy else 1280,
        )  # fmt: skip

    if toy:
        xl = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 24 + 80,
        }
        sizes: dict[str, Any] = {
            "block_out_channels": (16, 32), "norm_num_groups": 4, "layers_per_block": 1, "attention_head_dim": 2,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            **({**xl, "cross_attention_dim": 48 + 80} if kind == "SDXL" else {"cross_attention_dim": 48}),
        }  # fmt: skip
        unet = filled(lambda: UNet2DConditionModel(**sizes))
    else:
        assert kind in REAL
        unet = real_unet(kind, torch.float32)
        freeze(unet)
    channels = (8, 16, 16, 16) if toy else (128, 256, 512, 512)
    vae = filled(lambda: AutoencoderKL(
        block_out_channels=channels, layers_per_block=1 if toy else 2, latent_channels=4, sample_size=512,
        norm_num_groups=4 if toy else 32, down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    ))  # fmt: skip
    encoders = [filled(lambda: CLIPTextModel(text(768, 12)))]
    if kind == "SDXL":
        encoders.append(filled(lambda: CLIPTextModelWithProjection(text(1280, 32))))
    vision = filled(lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=80 if toy else 1280, intermediate_size=160 if toy else 5120, num_hidden_layers=2 if toy else 32,
        num_attention_heads=2 if toy else 16, patch_size=56 if toy else 14, projection_dim=1024, hidden_act="gelu",
    )))  # fmt: skip
    return FrozenBase(unet, tuple(encoders), (), SCHEDULER, vae, ""), TransformersImageEncoder(vision)


def speed(kind: str, precision: str, toy: bool) -> None:
    """Samples per second with a cache and encoding every step as the original does, and peak memory beside what is predicted."""
    side, batch = (64, 2) if toy else (512 if kind == "SD1.5" else 1024, 4 if kind == "SD1.5" else 2)
    name = f"trainer, {kind} {'shrunk' if toy else f'{side} px'}, {precision}, batch {batch}"
    base, encoder = real_models(kind, toy)
    sizes = EncoderSizes(1024, 80 if toy else 1280, 17 if toy else 257)
    settings: dict[str, Any] = {
        "output": {"folder": "x"}, "data": {"cache": "x", "resolution": side},
        "train": {"batch": batch, "precision": precision, "device": DEVICE.type, "ema": 0.0},
    }  # fmt: skip
    config = parse_config(settings, "check.py")
    trainee = AdapterTrainee(config, base, fresh_adapter(base.unet, sizes, AdapterConfig()), sizes)
    predicted = predict(trainee, 8, DEVICE).total
    vae, dtype = base.vae, {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
    assert vae is not None
    base.vae = None
    base.to(DEVICE, dtype)
    trainee.learned.to(DEVICE)
    trainee.attach(trainee.learned, trainee.parts)
    accelerator = build_accelerator(config)
    objective = objective_for(base.scheduler, "auto", LossConfig())
    ids = tuple(torch.randint(1000, (batch, 77), device=DEVICE) for _ in base.text_encoders)
    nothing = Nothing(
        torch.zeros(1, 1024, device=DEVICE), tuple(torch.zeros(1, 77, dtype=torch.long, device=DEVICE) for _ in ids)
    )
    step, optimizer = accelerator.prepare(
        AdapterStep(trainee.adapter, base, objective, nothing), build_optimizer(config.train, [{"params": list(trainee.adapter.parameters()), "lr": 1e-4}])
    )  # fmt: skip
    latents = torch.randn(batch, 1, 4, side // 8, side // 8, device=DEVICE)
    features = torch.randn(batch, 1024, device=DEVICE)
    places = [(0, i) for i in range(batch)]
    shown = torch.tensor([[side, side, 0, 0, side, side]] * batch, dtype=torch.float32, device=DEVICE)

    def learn(latents: Tensor = latents, features: Tensor = features) -> None:
        made = Batch(latents, features, ids, shown, places)
        drawn = draw(0, places, latents.shape[2:], objective, LossConfig())
        accelerator.backward(step(made, drawn.to(DEVICE)))
        optimizer.step()
        optimizer.zero_grad()

    if cuda():
        torch.cuda.empty_cache()
        learn()
        torch.cuda.synchronize()
        outside = sum(p.numel() * p.element_size() for m in (vae, encoder.model) for p in m.parameters())
        torch.cuda.reset_peak_memory_stats()
        learn()
        torch.cuda.synchronize()
        measured = torch.cuda.max_memory_allocated() - outside
        show(f"{name}: peak memory, measured / predicted", measured / predicted, "", 1.0)
        show(f"{name}: peak memory measured", measured / 1e9, "GB")
    else:
        show(f"{name}: peak memory predicted", predicted / 1e9, "GB")
        without(f"{name}: peak memory, measured / predicted", "needs CUDA")
    pixels, seen = (
        torch.rand(batch, 3, side, side, device=DEVICE) * 2 - 1,
        torch.randn(batch, 3, 224, 224, device=DEVICE),
    )
    encode_in = torch.float32 if not cuda() else torch.float16
    vision = encoder.model.to(encode_in)
    vae.to(torch.float32)

    def learn_encoding() -> None:
        with torch.no_grad():
            found = vae.encode(pixels).latent_dist.mode() * 0.18215
            embeds = vision(seen.to(encode_in)).image_embeds.float()
        learn(found[:, None], embeds)

    found = seconds({"with a cache": learn, "encoding every step": learn_encoding}, 3)
    for what, value in found.items():
        show(f"{name}: {what}", batch / value, "samples a second")
    show(
        f"{name}: cache / encoding every step", found["with a cache"] / found["encoding every step"], "of the time", 1.0
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    toy = parser.parse_args().toy
    set_toy(toy)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(Path(folder))
        for part in (precisions, resumed, under_torchrun, eight_bit):
            attempt(f"trainer: {part.__name__}", lambda part=part: part(runs))
    torch.use_deterministic_algorithms(False)
    for kind in ("SD1.5", "SDXL"):
        for precision in ("bf16", "fp16") if cuda() else ("fp32",):
            attempt(f"trainer, {kind} {precision}", lambda k=kind, p=precision: speed(k, p, toy))


if __name__ == "__main__":
    main()
