"""What training costs on the real shapes of SD1.5: with a cache, and re-encoding at every step as the original does.

    python tests/benchmarks/training_cost.py [--side 256] [--steps 3] [--batch 1]

Random weights, one CPU, a side that a CPU can bear: the shares shift with the side (at 512 pixels the encoders are about
48 % of the compute by count). Both ways run in one process, in turns; bytes and parameters are counted, not estimated.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from ipadapter_core.images.encoder import TransformersImageEncoder
from ipadapter_core.training.adapter import describe_trainable, fresh_adapter
from ipadapter_core.training.adapter_trainee import AdapterStep, AdapterTrainee
from ipadapter_core.training.batches import Batch, Nothing
from ipadapter_core.training.config import AdapterConfig, parse_config
from ipadapter_core.training.frozen import EncoderSizes, FrozenBase, freeze
from ipadapter_core.training.memory import activation_bytes, predict
from ipadapter_core.training.objectives import LossConfig, objective_for
from ipadapter_core.training.order import draw

SCHEDULER = SimpleNamespace(
    config={"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "epsilon"}
)


def random_models() -> tuple[FrozenBase, TransformersImageEncoder]:
    """SD1.5's UNet, VAE and text encoder and OpenCLIP ViT-H/14, with random weights."""
    torch.manual_seed(0)
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        )
        vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=32,
                num_attention_heads=16,
                patch_size=14,
                projection_dim=1024,
                hidden_act="gelu",
            )
        )
    for model in (unet, vae, text, vision):
        model.to_empty(device="cpu")
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                torch.nn.init.normal_(tensor, std=0.02)
            else:
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
        freeze(model)
    return FrozenBase(unet, (text,), (), SCHEDULER, vae, ""), TransformersImageEncoder(vision)


def measure(side: int, steps: int, batch: int) -> list[str]:
    base, encoder = random_models()
    sizes = EncoderSizes(1024, 1280, 257)
    config = parse_config({"output": {"folder": "x"}, "data": {"cache": "x", "resolution": side}}, "the benchmark")
    trainee = AdapterTrainee(config, base, fresh_adapter(base.unet, sizes, AdapterConfig()), sizes)
    adapter = trainee.adapter
    activations = [activation_bytes(trainee, (side // 8, side // 8), 4, checkpointing=on) / 1e6 for on in (False, True)]
    memory = predict(trainee, 8, torch.device("cpu")).describe()
    trainee.attach(adapter, trainee.parts)
    objective = objective_for(base.scheduler, "auto", LossConfig())
    step = AdapterStep(adapter, base, objective, Nothing(torch.zeros(1, 1024), (torch.zeros(1, 77, dtype=torch.long),)))
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-4)
    pixels, seen = torch.rand(batch, 3, side, side) * 2 - 1, torch.randn(batch, 3, 224, 224)
    ids = torch.randint(1000, (batch, 77))
    places = [(0, i) for i in range(batch)]

    def encode() -> tuple[Any, Any]:
        with torch.no_grad():
            return base.encode_latents(pixels)[0][:, None], encoder.encode(seen).image_embeds

    def train_step(latents: Any, features: Any) -> None:
        made = Batch(latents, features, (ids,), torch.zeros(batch, 6), places)
        step(made, draw(0, places, latents.shape[2:], objective, LossConfig())).backward()
        optimizer.step()
        optimizer.zero_grad()

    kept = encode()
    train_step(*kept)
    times: dict[str, list[float]] = {"cached": [], "encoding every step": []}
    for _ in range(steps):
        for name, spent in times.items():
            start = time.perf_counter()
            train_step(*(kept if name == "cached" else encode()))
            spent.append((time.perf_counter() - start) / batch)
    cached, live = (min(spent) for spent in times.values())
    lines = [
        f"SD1.5 shapes, random weights, float32, {side} px, batch {batch}, {torch.get_num_threads()} thread(s), best of {steps}",
        describe_trainable(adapter),
        f"seconds per sample: {cached:.2f} with a cache, {live:.2f} encoding every step: the cache saves {1 - cached / live:.0%}",
        f"activations counted beforehand: {activations[0]:.0f} MB per sample, {activations[1]:.0f} MB with checkpointing",
    ]
    with tempfile.TemporaryDirectory() as folder:
        file = trainee.save(Path(folder) / "adapter.safetensors", adapter.state_dict(), {})
        lines.append(f"adapter checkpoint: {file.stat().st_size:,} bytes in float16")
        torch.save([adapter.state_dict(), optimizer.state_dict()], Path(folder) / "state")
        lines.append(
            f"full state: {(Path(folder) / 'state').stat().st_size:,} bytes; the original wrote the UNet too, 3.4 GB in all"
        )
        lines.append(memory + " (fp32, batch 8, cached)")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines.append(f"peak memory of this process, all models in float32: {peak / 1e9:.1f} GB")
    latent = 4 * (512 // 8) ** 2 * 2
    lines.append(
        f"cache at 512 px: {latent + 2 * 1024 + 4 * 77:,} bytes per picture for base, {latent + 2 * 257 * 1280 + 4 * 77:,} for plus"
    )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    print("\n".join(measure(args.side, args.steps, args.batch)))


if __name__ == "__main__":
    main()
