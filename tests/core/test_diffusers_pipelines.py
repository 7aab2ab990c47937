"""What pipelines of transformers call their model with: which prompt runs in which call, and how far sampling is."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaImg2ImgPipeline,
    ChromaPipeline,
    FluxFillPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3InpaintPipeline,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from torch.testing import assert_close

import ipadapter_core.backends.diffusers.doors as backend
from ipadapter_core import bake
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.attention.schedule import WeightSchedule, Window
from ipadapter_core.backends.diffusers import lora as loras
from ipadapter_core.backends.diffusers import notes
from ipadapter_core.backends.diffusers.notes import Beginning, Flow
from ipadapter_core.backends.diffusers.pipelines import Asked, shift_of
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.models import layout_of
from tiny_loras import tiny_lora
from tiny_models import AtEverySite, noise, tiny_adapter, tiny_prompt
from tiny_pipelines import chroma_pipeline, flux_pipeline, sd3_pipeline
from tiny_sd3 import call_sd3

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
HEIGHT, WIDTH = 12, 20  # pixels; 3 x 5 tokens
PICTURE = torch.rand(1, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))
SIZE: dict[str, Any] = {"height": HEIGHT, "width": WIDTH, "max_sequence_length": 16, "output_type": "latent"}
BETWEEN: dict[str, Any] = {"image": PICTURE, "strength": 0.7}
PIPELINES: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "Flux": (flux_pipeline, FluxPipeline, {}),
    "Flux img2img": (flux_pipeline, FluxImg2ImgPipeline, BETWEEN),
    "Flux inpaint": (flux_pipeline, FluxInpaintPipeline, {**BETWEEN, "mask_image": torch.ones(1, 1, HEIGHT, WIDTH)}),
    "Flux Kontext": (flux_pipeline, FluxKontextPipeline, {"image": PICTURE, "_auto_resize": False, "max_area": HEIGHT * WIDTH}),
    "Chroma": (chroma_pipeline, ChromaPipeline, {}),
    "Chroma img2img": (chroma_pipeline, ChromaImg2ImgPipeline, BETWEEN),
}  # fmt: skip
BATCHED: dict[str, tuple[Callable[..., Any], Any, dict[str, Any]]] = {
    "SD3": (sd3_pipeline, StableDiffusion3Pipeline, {}),
    "SD3 img2img": (sd3_pipeline, StableDiffusion3Img2ImgPipeline, BETWEEN),
    "SD3 inpaint": (partial(sd3_pipeline, channels=16), StableDiffusion3InpaintPipeline, {**BETWEEN, "mask_image": torch.ones(1, 1, HEIGHT, WIDTH)}),
}  # fmt: skip
"""Pipelines that run both prompts in one batch, and those before in two calls."""


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def patch_for(pipeline: Any, *, mask: Tensor | None = None, **schedule: Any) -> AdapterPatch:
    layout, form = layout_of(pipeline.transformer), AtEverySite()
    adapter = tiny_adapter(layout, channels=tuple(site.channels for site in layout.sites))
    adapter = replace(adapter, spec=replace(adapter.spec, format=form))
    return bake(adapter, tiny_prompt(adapter), layout, WeightSchedule(**schedule), mask)


def sample(pipeline: Any, prompt: str = "a red circle", negative: str | None = "ugly", steps: int = 3, **more: Any) -> Tensor:  # fmt: skip
    scale = "true_cfg_scale" if "Flux" in type(pipeline).__name__ else "guidance_scale"
    given = {"prompt": prompt, "negative_prompt": negative, "num_inference_steps": steps, scale: 3.0, **SIZE, **more}
    return pipeline(generator=torch.Generator().manual_seed(1), **given).images


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Beginning, tuple[str, ...], Flow, Any]]:
    """Every call of a model, what was said of it, and its description."""
    made: list[Any] = []
    real = Beginning._describe

    def spy(self: Beginning, names: Any, flow: Flow) -> Any:
        made.append((self, names, flow, real(self, names, flow)))
        return made[-1][-1]

    monkeypatch.setattr(Beginning, "_describe", spy)
    return made


def prompts_of(calls: list[Any]) -> list[tuple[str, Tensor]]:
    return [(names[0], call.text) for call, names, _, _ in calls]


# --- which prompt runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_the_negative_prompt_is_the_second_call_of_a_step(name: str, calls: list[Any]) -> None:
    build, kind, more = PIPELINES[name]
    pipeline = build(kind)
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        sample(pipeline, **more)
        told = prompts_of(calls)
        positive, negative = told[0][1], told[1][1]
        assert (positive - negative).abs().max() > 0.1
        assert [(branch, text is positive) for branch, text in told] == 3 * [("cond", True), ("uncond", False)]
        calls.clear()
        more = {**more, "guidance_scale": 1.0} if "Chroma" in name else more
        sample(pipeline, negative=None, **more)
    assert [branch for branch, _ in prompts_of(calls)] == 3 * ["cond"]


@pytest.mark.parametrize("name", BATCHED)
def test_both_prompts_are_one_batch(name: str, calls: list[Any]) -> None:
    build, kind, more = BATCHED[name]
    pipeline = build(kind)
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        sample(pipeline, **more)
        assert {(names, len(call.sample)) for call, names, _, _ in calls} == {(("uncond", "cond"), 2)}
        calls.clear()
        sample(pipeline, guidance_scale=1.0, **more)
    assert {(names, len(call.sample)) for call, names, _, _ in calls} == {(("cond",), 1)}


def test_a_pass_without_some_blocks_is_the_positive_prompts(calls: list[Any]) -> None:
    """SD3's skip layer guidance: a third pass beside the batch of both prompts, in some steps."""
    pipeline = sd3_pipeline()
    more = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.6}
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        sample(pipeline, steps=4, **more)
    both = ("uncond", "cond")
    assert [names for _, names, _, _ in calls] == [both, both, ("cond",), both, ("cond",), both]


def test_a_transformer_that_is_called_before_its_pipeline_says_so() -> None:
    pipeline = sd3_pipeline()
    with (
        backend.apply_to_pipeline(pipeline, patch_for(pipeline)),
        pytest.raises(InvalidInputError, match="called before its pipeline was"),
    ):
        call_sd3(pipeline.transformer, noise(1, 4, 6, 10), torch.tensor(500.0), noise(1, 7, 32))


@pytest.mark.parametrize("steps", [1, 3])
def test_runs_that_start_from_the_same_latents_are_told_apart(steps: int, calls: list[Any]) -> None:
    """The very tensor that was sampled last, of one step, comes first again with another prompt."""
    pipeline = flux_pipeline()
    latents = noise(1, 15, 16, seed=2)
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        for prompt, negative in (("a red circle", None), ("a blue square", None), ("a red circle", "ugly"), ("a blue square", "ugly")):  # fmt: skip
            calls.clear()
            sample(pipeline, prompt, negative, steps, latents=latents)
            expected = ["cond"] if negative is None else ["cond", "uncond"]
            assert [branch for branch, _ in prompts_of(calls)] == steps * expected


def test_what_is_no_second_call() -> None:
    """A third pass of a step, the same prompt again, and a scheduler that changes the latents in place."""
    pipeline = flux_pipeline()
    latents, positive, negative = noise(1, 15, 16), noise(1, 7, 32), noise(1, 7, 32, seed=1)
    pipeline.scheduler.set_timesteps(sigmas=[1.0, 0.5], mu=1.0)
    asked, family = Asked(pipeline), layout_of(pipeline.transformer).model

    def told(*texts: Tensor) -> list[str]:
        return [asked.branches(Beginning(family, (), {"hidden_states": latents, "encoder_hidden_states": t}))[0] for t in texts]  # fmt: skip

    assert told(positive, negative, positive) == ["cond", "uncond", "cond"]
    assert told(positive, positive) == ["cond", "cond"]
    pipeline.scheduler._step_index = 1
    assert told(negative) == ["cond"]


def test_true_guidance_is_that_of_a_loop_by_hand() -> None:
    pipeline = flux_pipeline()
    patch, latents = patch_for(pipeline), noise(1, 15, 16, seed=2)
    with backend.apply_to_pipeline(pipeline, patch):
        got = sample(pipeline, latents=latents)
    assert (got - sample(pipeline, latents=latents)).abs().max() > 1e-2
    texts: list[Any] = [pipeline.encode_prompt(p, None, max_sequence_length=16) for p in ("a red circle", "ugly")]
    scheduler, x = pipeline.scheduler, latents
    scheduler.set_begin_index(0)
    scheduler.set_timesteps(sigmas=[1.0, 2 / 3, 1 / 3], mu=0.5 + (15 - 16) * 0.65 / 48)
    for t in scheduler.timesteps:
        outs: list[Tensor] = []
        for branch, (text, pooled, ids) in zip(("cond", "uncond"), texts, strict=True):
            with backend.apply(pipeline.transformer, patch, branches=(branch,)), torch.no_grad():
                outs.append(pipeline.transformer(
                    hidden_states=x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t.expand(1) / 1000,
                    img_ids=pipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32), txt_ids=ids,
                    guidance=torch.tensor([3.5]), return_dict=False,
                )[0])  # fmt: skip
        x = scheduler.step(outs[1] + 3.0 * (outs[0] - outs[1]), t, x).prev_sample
    assert_close(got, x, **TOLERANCE)


def test_a_copied_pipeline_is_asked_itself(calls: list[Any]) -> None:
    pipeline = flux_pipeline()
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        other = copy.deepcopy(pipeline)
        sample(pipeline)
        calls.clear()
        sample(other)
    assert [branch for branch, _ in prompts_of(calls)] == 3 * ["cond", "uncond"]


def test_a_pipeline_without_a_model_is_refused() -> None:
    pipeline = flux_pipeline()
    patch = patch_for(pipeline)
    pipeline.transformer = None
    with pytest.raises(InvalidInputError, match="FluxPipeline has no unet and no transformer"):
        backend.apply_to_pipeline(pipeline, patch)


# --- masks and references --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PIPELINES, *BATCHED])
def test_the_latents_size_is_that_of_the_sampled_picture(name: str, calls: list[Any]) -> None:
    """Also where a reference picture follows: then the picture's tokens are counted."""
    build, kind, more = (PIPELINES | BATCHED)[name]
    pipeline = build(kind)
    ones, halves = patch_for(pipeline, mask=torch.ones(9, 9)), torch.zeros(HEIGHT, WIDTH)
    halves[: HEIGHT // 2] = 1
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        unmasked = sample(pipeline, **more)
    text = 0 if "SD3" in name else 16  # SD3's attentions have the picture's tokens apart
    assert {(call.latent, call.text, call.picture) for _, _, _, call in calls} == {
        ((6, 10), text, 15 if "Kontext" in name else None)
    }
    with backend.apply_to_pipeline(pipeline, ones):
        assert_close(sample(pipeline, **more), unmasked, rtol=0, atol=1e-4)
    with backend.apply_to_pipeline(pipeline, ones) as applied:
        applied.set_mask(halves)
        assert (sample(pipeline, **more) - unmasked).abs().max() > 1e-3


# --- how far sampling is ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_progress_is_the_share_of_the_plain_schedule(name: str, dtype: torch.dtype, calls: list[Any]) -> None:
    """Whatever the shift and however the model's dtype rounds: step i of n is i / n, as in ComfyUI."""
    build, kind, more = PIPELINES[name]
    pipeline = build(kind)
    pipeline.to(dtype)
    more = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in more.items()}
    if "strength" in more:
        more["strength"] = 1.0
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        sample(pipeline, negative=None, steps=7, **more)
    found = [call.percent() for *_, call in calls if call.branches == (1,)]
    assert found == pytest.approx([i / 7 for i in range(7)], abs=1e-5)
    timesteps = [call.timestep() for *_, call in calls if call.branches == (1,)]
    told = [flow.now() for _, names, flow, _ in calls if names == ("cond",)]
    assert (told[0], told[1:]) == (None, pytest.approx(timesteps[1:], abs=1e-3)), (
        "the scheduler tells it from its first step on"
    )
    assert timesteps == pytest.approx(pipeline.scheduler.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("name", BATCHED)
def test_a_fixed_shift_is_undone(name: str, calls: list[Any]) -> None:
    """SD3's scheduler shifts by 3, and spaces its times from 1 down to that of its last sigma."""
    build, kind, more = BATCHED[name]
    pipeline = build(kind)
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline)):
        sample(pipeline, steps=5, **{**more, **({"strength": 1.0} if more else {})})
    last = float(pipeline.scheduler.sigma_min)
    assert [call.percent() for *_, call in calls] == pytest.approx([i / 4 * (1 - last) for i in range(5)], abs=1e-4)
    assert [call.timestep() for *_, call in calls] == pytest.approx(pipeline.scheduler.timesteps.tolist(), abs=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0, math.exp(1.15)])
def test_progress_is_that_of_comfyui(shift: float) -> None:
    """``ModelSamplingFlux`` and ``ModelSamplingDiscreteFlow`` have the sigma of a percent as shift · t / (1 + (shift - 1) · t)."""
    for percent in (0.0, 0.2, 0.5, 0.93, 1.0):
        t = 1 - percent
        sigma = shift * t / (1 + (shift - 1) * t)
        for given in (torch.tensor([sigma]), torch.tensor([1000 * sigma])):
            step = notes.Step(given, "sigma", Flow(shift))
            assert step.percent() == pytest.approx(percent, abs=1e-3 if given > 1 else 1e-5)


def test_half_precision_is_mended_only_by_a_timestep_of_the_run() -> None:
    flow = Flow(1.0, torch.tensor([1000.0, 931.7, 502.3]))
    rounded = torch.tensor([931.7]).bfloat16() / 1000
    assert float(rounded) * 1000 != pytest.approx(931.7, abs=0.1)
    assert notes.Step(rounded, "sigma", flow).timestep() == pytest.approx(931.7)
    assert notes.Step(rounded.float(), "sigma", flow).timestep() == pytest.approx(float(rounded) * 1000)
    assert notes.Step(torch.tensor([0.25]).bfloat16(), "sigma", flow).timestep() == 250.0


def test_a_step_of_the_scheduler_is_no_look_at_the_device() -> None:
    """A tensor on another device is not read where the scheduler tells; here it could not be."""
    timesteps, elsewhere = torch.tensor([1000.0, 600.0, 200.0]), torch.empty(2, device="meta")
    assert notes.Step(elsewhere, "sigma", Flow(3.0, timesteps, 1)).timestep() == 600.0
    assert notes.Step(elsewhere, "sigma", Flow(3.0, timesteps, 1)).percent() == pytest.approx(1 - 0.6 / (3 - 2 * 0.6))
    for untold in (Flow(3.0, timesteps), Flow(3.0, timesteps, 3), Flow(3.0)):
        with pytest.raises((RuntimeError, NotImplementedError)):
            notes.Step(elsewhere, "sigma", untold).timestep()
    assert notes.Step(torch.tensor([500.0]), "sigma", Flow(3.0, timesteps, 1)).timestep() == 500.0


class Scheduler:
    def __init__(self, **config: Any) -> None:
        self.config = config


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, 1.0), ({"shift": 3.0}, 3.0), ({"flow_shift": 2.0}, 2.0), ({"shift": None}, 1.0),
        ({"use_dynamic_shifting": True, "shift": 3.0}, math.exp(0.5 + (4096 - 256) * 0.65 / 3840)),
        ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.15),
    ],
)  # fmt: skip
def test_the_shift_is_read_from_the_scheduler(config: dict[str, Any], expected: float) -> None:
    call = Beginning(layout_of(flux_pipeline().transformer).model, (torch.zeros(1, 16, 128, 128), 1.0), {})
    assert shift_of(Scheduler(**config), call) == pytest.approx(expected)


def test_a_lora_on_a_pipeline_has_the_same_progress(calls: list[Any]) -> None:
    """Its window is told the shift too, so a LoRA and an image prompt with one window act in the same steps."""
    pipeline = flux_pipeline()
    lora = replace(
        loras.place(pipeline, tiny_lora(pipeline.transformer, "*")), window=Window(start_percent=0.3, end_percent=0.6)
    )
    with loras.apply(pipeline, lora):
        sample(pipeline, negative=None, steps=4)
    assert [call.percent() for *_, call in calls] == pytest.approx([0, 0.25, 0.5, 0.75], abs=1e-5)


def test_flux_fill_has_other_channels_and_one_pass(calls: list[Any]) -> None:
    """The masked picture and the mask are channels of the picture's tokens; nothing changes for an image prompt."""
    pipeline = flux_pipeline(FluxFillPipeline, in_channels=16 + 16 + 16, out_channels=16)
    with backend.apply_to_pipeline(pipeline, patch_for(pipeline, mask=torch.ones(6, 10))):
        pictures = {"image": PICTURE, "mask_image": torch.ones(1, 1, HEIGHT, WIDTH)}
        pipeline("a red circle", num_inference_steps=2, generator=torch.Generator().manual_seed(1), **pictures, **SIZE)
    assert [(names, call.latent, call.picture) for _, names, _, call in calls] == 2 * [(("cond",), (6, 10), None)]


def test_a_window_acts_at_its_steps() -> None:
    """Two steps of four: the third and the fourth are as without the adapter, if it ended before them."""
    pipeline = flux_pipeline()
    latents = noise(1, 15, 16, seed=2)
    first, whole = patch_for(pipeline, end_percent=0.25), patch_for(pipeline)

    def steps(patch: AdapterPatch | None) -> list[Tensor]:
        seen: list[Tensor] = []

        def keep(_: Any, i: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
            seen.append(values["latents"])
            return values

        if patch is None:
            sample(pipeline, steps=4, latents=latents, callback_on_step_end=keep)
        else:
            with backend.apply_to_pipeline(pipeline, patch):
                sample(pipeline, steps=4, latents=latents, callback_on_step_end=keep)
        return seen

    windowed, always, never = steps(first), steps(whole), steps(None)
    assert torch.equal(windowed[1], always[1])
    assert not torch.equal(windowed[2], always[2])
    late = patch_for(pipeline, start_percent=0.5)
    assert torch.equal(steps(late)[1], never[1])
    assert not torch.equal(steps(late)[2], never[2])


def test_who_asks_once_per_call_gets_one_answer_each() -> None:
    """Several image prompts on one pipeline each ask for themselves."""
    pipeline = flux_pipeline()
    patches = patch_for(pipeline, strength=0.3), patch_for(pipeline, strength=0.4)
    latents = noise(1, 15, 16, seed=2)
    with backend.apply_to_pipeline(pipeline, *patches):
        expected = sample(pipeline, latents=latents)
    with backend.apply_to_pipeline(pipeline, patches[0]), backend.apply_to_pipeline(pipeline, patches[1]):
        assert_close(sample(pipeline, latents=latents), expected, **TOLERANCE)
    assert isinstance(copy.deepcopy(Asked(pipeline)), Asked)
