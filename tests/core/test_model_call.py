"""A model call is described once, for image prompts and LoRAs together, and says how far sampling is as ComfyUI does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.attention_cost import cost_of
from ipadapter_core import ModelCall, ModelLayout, WeightSchedule, bake, layout_of, models
from ipadapter_core.attention.call import COND, UNCOND
from ipadapter_core.backends.comfy import doors as comfy
from ipadapter_core.backends.comfy import lora as comfy_lora
from ipadapter_core.backends.comfy import notes as comfy_notes
from ipadapter_core.backends.diffusers import doors as diffusers
from ipadapter_core.backends.diffusers import lora as diffusers_lora
from ipadapter_core.backends.diffusers import notes as diffusers_notes
from ipadapter_core.lora.patch import LoRAPatch
from ipadapter_core.models import family_of
from tiny_loras import tiny_lora
from tiny_models import (
    TOKEN_DIM,
    Guider,
    call_unet,
    conditioning,
    noise,
    tiny_adapter,
    tiny_host,
    tiny_prompt,
    tiny_unet,
)

EARLY = WeightSchedule(end_percent=0.6)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


# --- once -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def described(monkeypatch: pytest.MonkeyPatch) -> list[ModelCall]:
    """Every call that is described."""
    found: list[ModelCall] = []
    for module, name in ((comfy_notes, "_model_call"), (diffusers_notes.Beginning, "_describe")):
        real: Any = getattr(module, name)

        def noted(*args: Any, real: Any = real) -> ModelCall:
            found.append(real(*args))
            return found[-1]

        monkeypatch.setattr(module, name, noted)
    return found


def both_on_comfy(first: str) -> Any:
    host = tiny_host()
    layout = comfy.comfy_layout(host)
    adapter = tiny_adapter(layout)
    image = bake(adapter, tiny_prompt(adapter), layout, EARLY)
    lora = LoRAPatch(
        comfy_lora.place(tiny_lora(host.get_model_object("diffusion_model"), "attn1"), host), window=EARLY.window
    )
    if first == "image":
        return comfy_lora.apply_unfused(comfy.apply(host, image), lora)
    return comfy.apply(comfy_lora.apply_unfused(host, lora), image)


@pytest.mark.parametrize("first", ["image", "lora"])
def test_comfyui_describes_each_model_call_once(first: str, described: list[ModelCall]) -> None:
    model = both_on_comfy(first)
    conds: Any = {name: [conditioning(noise(1, 7, TOKEN_DIM))] for name in ("positive", "negative")}
    for chunks, expected in ((8, [(UNCOND, COND)]), (1, [(UNCOND,), (COND,)])):
        described.clear()
        Guider(model, conds, chunks=chunks)(noise(2, 4, 12, 16))
        assert [call.branches for call in described] == expected
        assert {(call.latent, call.size) for call in described} == {((12, 16), (12, 16))}


def test_outside_of_the_wrappers_a_call_is_described_once_too(described: list[ModelCall]) -> None:
    host = tiny_host()
    layout = comfy.comfy_layout(host)
    adapter = tiny_adapter(layout)
    model = comfy.apply(host, bake(adapter, tiny_prompt(adapter), layout))
    conds: Any = {name: [conditioning(noise(1, 7, TOKEN_DIM))] for name in ("positive", "negative")}
    for size in (8, 16):
        described.clear()
        Guider(model, conds, chunks=1, wrapped=False)(noise(1, 4, size, size))
        assert [(call.branches, call.size) for call in described] == [
            ((UNCOND,), (size, size)),
            ((COND,), (size, size)),
        ]


def test_diffusers_describes_each_model_call_once(described: list[ModelCall]) -> None:
    unet: Any = tiny_unet("small")
    layout = layout_of(unet)
    adapter = tiny_adapter(layout)
    image = bake(adapter, tiny_prompt(adapter), layout, EARLY)
    lora = diffusers_lora.place(unet, tiny_lora(unet, "attn1"))
    lora = LoRAPatch(lora.matched, window=EARLY.window)
    x, text = noise(2, 4, 8, 8), noise(2, 7, TOKEN_DIM)
    branches = ("uncond", "cond")
    plain = cost_of(lambda: call_unet(unet, x, text)).synchronisations
    with diffusers.apply(unet, image), diffusers_lora.apply(unet, lora, branches=branches):
        call_unet(unet, x, text)
        assert [call.branches for call in described] == [(UNCOND, COND)]
        assert cost_of(lambda: call_unet(unet, x, text)).synchronisations == plain + 1
    described.clear()
    with diffusers.apply(unet, image), diffusers_lora.apply(unet, lora, branches=("cond",)):
        call_unet(unet, x, text)
    assert [call.branches for call in described] == [(UNCOND, COND), (COND,)], "each says what its batch is"
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_hooks_around_calls_go_with_the_last_owner() -> None:
    unet: Any = tiny_unet("small")
    layout = layout_of(unet)
    adapter = tiny_adapter(layout)
    patch = bake(adapter, tiny_prompt(adapter), layout)
    first, second = (diffusers.apply(unet, patch) for _ in range(2))
    assert len(unet._forward_hooks) == len(unet._forward_pre_hooks) == 1
    first.remove()
    assert len(unet._forward_hooks) == len(unet._forward_pre_hooks) == 1
    second.remove()
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


# --- how far sampling is ------------------------------------------------------------------------------------------------


def percent(module: nn.Module, timestep: Tensor | float) -> float:
    return (
        diffusers_notes.Beginning(family_of(module), (torch.zeros(1, 4, 8, 8), timestep), {})
        .described(("cond",))
        .percent()
    )


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [(999, 0.0), (999.0, 0.0), (499.5, 0.5), (1.0, 1 - 1 / 999), (0.5, 1 - 0.5 / 999), (0, 1.0), (0.0, 1.0)],
)
def test_the_progress_of_a_unet(timestep: float, expected: float) -> None:
    """Its timesteps are 0..999, and fractions of one where sigmas lie between timesteps."""
    unet = tiny_unet("one site")
    for given in (timestep, torch.tensor(timestep), torch.tensor([timestep])):
        assert percent(unet, given) == pytest.approx(expected, abs=1e-7)


def test_karras_sigmas_end_on_fractions_of_a_timestep() -> None:
    """Why 0.5 is nearly done: read as a share it would open a window of the first half for the last step."""
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", use_karras_sigmas=True
    )
    scheduler.set_timesteps(30)
    last = scheduler.timesteps[-1]
    assert 0 <= float(last) < 1
    unet = tiny_unet("one site")
    found = [percent(unet, t) for t in scheduler.timesteps]
    assert found == sorted(found)
    assert found[0] < 1e-3
    assert found[-1] > 0.999


@pytest.mark.parametrize("scheduler", ["DDIM", "Euler", "DPM++ Karras"])
def test_the_progress_of_a_unet_is_that_of_comfyui(scheduler: str) -> None:
    """At the sigma that belongs to a timestep, ComfyUI's percent is ours, whatever spaced the timesteps."""
    from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler

    from tiny_models import Sampling

    betas: Any = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    made: Any = {
        "DDIM": lambda: DDIMScheduler(**betas, steps_offset=1),
        "Euler": lambda: EulerDiscreteScheduler(**betas, timestep_spacing="linspace"),
        "DPM++ Karras": lambda: DPMSolverMultistepScheduler(**betas, use_karras_sigmas=True),
    }[scheduler]()
    made.set_timesteps(12)
    unet, sampling = tiny_unet("one site"), Sampling()
    for t in made.timesteps:
        sigma = float(sampling.sigma(t.float()))
        assert percent(unet, t) == pytest.approx(comfy_notes.percent_of(sigma, sampling), abs=1e-4)


class Transformer(nn.Module):
    """What has no blocks of a UNet."""


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (torch.tensor(1.0), 0.0), (torch.tensor(0.5), 0.5), (torch.tensor(0.0), 1.0), (0.25, 0.75),  # sigma: Flux
        (torch.tensor(1000.0), 0.0), (torch.tensor(500.0), 0.5), (torch.tensor([250]), 0.75), (torch.tensor(1), 0.999),
    ],
)  # fmt: skip
def test_the_progress_of_a_transformer(timestep: Tensor | float, expected: float) -> None:
    """Pipelines of flow models pass sigma, or sigma times 1000."""
    assert percent(Transformer(), timestep) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("clock", "expected"), [("steps", 1 - 0.5 / 999), ("sigma", 0.5)])
def test_the_clock_is_a_fact_of_the_base_model(clock: Any, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two transformers with the same blocks one may be trained on steps, the other on sigma."""
    base = models.BaseModel(name="Told", walk=lambda module: ModelLayout(base, 8, ()), clock=clock)
    monkeypatch.setattr(models, "BASE_MODELS", (base,))
    assert percent(Transformer(), 0.5) == pytest.approx(expected, abs=1e-7)
