"""What is trained, by name and number, on real shapes; and one step against a plain rewriting of the original's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ipadapter_core import build_processors, load_adapter
from ipadapter_core.checkpoints import claimants, describe_adapter
from ipadapter_core.files.state_dict import TensorFile
from ipadapter_core.training.adapter import TrainedAdapter, continued_adapter, fresh_adapter, trainable
from ipadapter_core.training.adapter_trainee import AdapterStep
from ipadapter_core.training.batches import Batch, Nothing
from ipadapter_core.training.config import AdapterConfig, OutputConfig
from ipadapter_core.training.frozen import EncoderSizes, FrozenBase
from ipadapter_core.training.objectives import LossConfig, Objective, objective_for
from ipadapter_core.training.order import NoiseDraws
from tiny_models import noise, tiny_unet

VIT_H = EncoderSizes(1024, 1280, 257)
SD15_UNET = {"cross_attention_dim": 768}
SDXL_UNET: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def real_unets() -> dict[str, UNet2DConditionModel]:
    with torch.device("meta"):
        return {"SD1.5": UNet2DConditionModel(**SD15_UNET), "SDXL": UNet2DConditionModel(**SDXL_UNET)}


@pytest.mark.parametrize(
    ("base", "family", "count", "layers"),
    [
        ("SD1.5", "base", 22_319_616, 16),
        ("SD1.5", "plus", 49_087_488, 16),
        ("SD1.5", "full-face", 21_794_304, 16),
        ("SDXL", "base", 349_188_096, 70),
        ("SDXL", "plus", 423_748_864, 70),
    ],
)
def test_exactly_the_released_parameters_are_trained(
    real_unets: dict[str, UNet2DConditionModel], base: str, family: Any, count: int, layers: int
) -> None:
    with torch.device("meta"):
        adapter = fresh_adapter(real_unets[base], VIT_H, AdapterConfig(family=family))
    counts = trainable(adapter)
    assert sum(counts.values()) == count
    assert {name.split(".")[0] for name in counts} == {"image_proj", "ip_adapter"}
    numbers = sorted(int(name.split(".")[1]) for name in counts if name.endswith("to_k_ip.weight"))
    assert numbers == list(range(1, 2 * layers, 2)), "only cross-attentions have parameters, numbered as released files"
    assert sorted(int(n.split(".")[1]) for n in counts if n.endswith("to_v_ip.weight")) == numbers
    spec = adapter.spec()
    assert (spec.family, spec.base_model, spec.encoder) == (family, base, "ViT-H/14")
    assert [format.name for format in claimants(TensorFile(adapter.state_dict()))] == [family]


def test_copies_start_from_the_text_layers_and_zero_v_from_nothing() -> None:
    unet = tiny_unet("small")
    for init in ("copy", "zero_v"):
        adapter = fresh_adapter(unet, EncoderSizes(24, 24, 5), AdapterConfig(init=init))
        for name, layer in zip(adapter.names, adapter.ip_adapter, strict=True):
            if not name.endswith("attn2.processor"):
                assert not list(layer.parameters())
                continue
            attention = unet.get_submodule(name.removesuffix(".processor"))
            assert torch.equal(layer.to_k_ip.weight, attention.to_k.weight)
            expected = attention.to_v.weight if init == "copy" else torch.zeros_like(attention.to_v.weight)
            assert torch.equal(layer.to_v_ip.weight, expected)


@pytest.mark.parametrize("family", ["base", "plus", "full-face"])
def test_a_file_can_be_trained_on(family: Any) -> None:
    unet = tiny_unet("small")
    sizes = EncoderSizes(24, 24, 5)
    torch.manual_seed(3)
    first = fresh_adapter(unet, sizes, AdapterConfig(family=family, depth=2, hidden_dim=64))
    half = load_adapter({key: value.half() for key, value in first.state_dict().items()})
    second = continued_adapter(unet, half, sizes)
    assert second.num_tokens == first.num_tokens
    assert trainable(second) == trainable(first)
    for key, value in second.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, first.state_dict()[key].half().float())


def test_a_file_says_how_many_tokens_an_unknown_encoder_gives(tmp_path: Path) -> None:
    """An MLP's shapes do not tell it; the trainer knows."""
    adapter = fresh_adapter(tiny_unet("small"), EncoderSizes(24, 24, 5), AdapterConfig(family="full-face"))
    assert adapter.spec().num_tokens == 5
    for name, told in (("a.safetensors", 5), ("a.bin", 0)):  # a .bin has no room for it
        file = adapter.save(tmp_path / name, adapter.state_dict(), {}, OutputConfig(dtype="float32"))
        assert describe_adapter(file).num_tokens == told


# --- one step of the original, rewritten from the paper and its published recipe -------------------------------------------


class PlainCrossAttention(nn.Module):
    """Softmax by hand: text attention plus attention over the last n tokens with the image layers."""

    def __init__(self, n: int, k: Tensor, v: Tensor) -> None:
        super().__init__()
        self.n, self.k, self.v = n, nn.Parameter(k.clone()), nn.Parameter(v.clone())

    def __call__(self, attn: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
        assert encoder_hidden_states is not None
        text, image = encoder_hidden_states[:, : -self.n], encoder_hidden_states[:, -self.n :]
        q = attn.to_q(x)

        def attend(k: Tensor, v: Tensor) -> Tensor:
            heads = [t.reshape(t.shape[0], t.shape[1], attn.heads, -1).permute(0, 2, 1, 3) for t in (q, k, v)]
            scores = heads[0] @ heads[1].transpose(2, 3) / heads[0].shape[-1] ** 0.5
            return (torch.softmax(scores, 3) @ heads[2]).permute(0, 2, 1, 3).reshape(q.shape)

        out = attend(attn.to_k(text), attn.to_v(text)) + attend(image @ self.k.T, image @ self.v.T)
        return attn.to_out[1](attn.to_out[0](out))


class StubText(nn.Module):
    """A table as text encoder; `double` for the comparison."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(noise(10, dim, seed=4).double())

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.table(ids),)


def _double_setup(family: Any, prediction: str) -> tuple[FrozenBase, TrainedAdapter, Objective]:
    unet = tiny_unet("small").double()
    torch.manual_seed(0)
    adapter = fresh_adapter(
        unet, EncoderSizes(24, 24, 5), AdapterConfig(family=family, depth=2, hidden_dim=64)
    ).double()
    config = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": prediction}
    objective = objective_for(SimpleNamespace(config=config), "auto", LossConfig())
    base = FrozenBase(unet, (StubText(32),), (), None, None, "")
    return base, adapter, objective


@pytest.mark.parametrize("family", ["base", "plus", "full-face"])
def test_one_step_is_the_originals(family: Any) -> None:
    base, adapter, objective = _double_setup(family, "epsilon")
    b = 3
    features = noise(b, 24).double() if family == "base" else noise(b, 5, 24).double()
    neutral = torch.zeros_like(features[:1]) if family == "base" else noise(1, 5, 24, seed=9).double()
    latents, gauss = noise(b, 4, 16, 16, seed=1).double(), noise(b, 4, 16, 16, seed=2).double()
    t = torch.tensor([10, 500, 900])
    ids = torch.arange(b * 7).reshape(b, 7) % 10
    no_image, no_text = torch.tensor([False, True, False]), torch.tensor([False, False, True])

    # the original, plainly: dropped images are the family's neutral features, dropped texts the empty caption's tokens
    unet = base.unet
    plain: dict[str, PlainCrossAttention] = {}
    processors = dict(unet.attn_processors)
    reference = {key: value.detach().clone() for key, value in adapter.state_dict().items()}
    for number, name in enumerate(processors):
        if name.endswith("attn2.processor"):
            weights = (reference[f"ip_adapter.{number}.to_{kind}_ip.weight"] for kind in "kv")
            plain[name] = PlainCrossAttention(adapter.num_tokens, *weights)
            processors[name] = plain[name]
    unet.set_attn_processor(dict(processors))
    projector = fresh_adapter(
        tiny_unet("small"), EncoderSizes(24, 24, 5), AdapterConfig(family=family, depth=2, hidden_dim=64)
    ).image_proj
    projector.double().load_state_dict(
        {k.removeprefix("image_proj."): v for k, v in reference.items() if k.startswith("image_proj.")}
    )
    seen = torch.stack([neutral[0] if gone else one for one, gone in zip(features, no_image, strict=True)])
    text = base.text_encoders[0].table(torch.stack([ids[0], ids[1], torch.zeros(7, dtype=torch.long)]))
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0).double()[t].reshape(b, 1, 1, 1)
    noisy = alphas**0.5 * latents + (1 - alphas) ** 0.5 * gauss
    predicted = unet(noisy, t, torch.cat([text, projector(seen)], 1)).sample
    expected = F.mse_loss(predicted, gauss)
    expected.backward()

    empty = (torch.zeros(1, 7, dtype=torch.long),)
    adapter.install(unet)
    step = AdapterStep(adapter, base, objective, Nothing(neutral, empty))
    batch = Batch(latents[:, None], features, (ids,), torch.zeros(b, 6), [(0, 0)] * b)
    loss = step(batch, NoiseDraws(gauss, gauss, t, no_image, no_text))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for number, name in enumerate(processors):
        if name in plain:
            layer = adapter.ip_adapter[number]
            torch.testing.assert_close(layer.to_k_ip.weight.grad, plain[name].k.grad, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(layer.to_v_ip.weight.grad, plain[name].v.grad, rtol=1e-9, atol=1e-9)
            assert layer.to_v_ip.weight.grad.abs().max() > 1e-6
    for own, other in zip(adapter.image_proj.parameters(), projector.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-9)
    assert all(p.grad is None for name, p in unet.named_parameters() if ".processor." not in name)


@pytest.mark.parametrize("family", ["base"])
def test_a_processor_computes_what_the_adapter_trained(family: Any) -> None:
    """`install` puts the same layers to work that are saved."""
    base, adapter, _ = _double_setup(family, "epsilon")
    adapter.install(base.unet)
    installed = [p for p in base.unet.attn_processors.values() if hasattr(p, "to_k_ip")]
    assert [id(p.to_k_ip.weight) for p in installed] == [
        id(layer.to_k_ip.weight) for layer in adapter.ip_adapter if hasattr(layer, "to_k_ip")
    ]
    assert list(build_processors(base.unet)) == list(adapter.names)
