"""What a denoiser is asked to predict, which timesteps are drawn, and what is dropped."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ipadapter_core.errors import InvalidInputError
from ipadapter_core.generate import generate
from ipadapter_core.training import objectives, parse_config, train
from ipadapter_core.training.frozen import load_base
from ipadapter_core.training.objectives import Diffusion, FlowMatching, LossConfig, Objective, objective_for
from ipadapter_core.training.order import draw, drops
from ipadapter_core.training.watch import pipeline_around
from tiny_models import noise
from tiny_training import save_model, save_pictures, tiny_config

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def objective_of(prediction: str, **loss: Any) -> Objective:
    return objective_for(SimpleNamespace(config=SD), prediction, LossConfig(**loss))


@pytest.mark.parametrize("prediction", objectives.predictions())
def test_the_picture_follows_from_what_is_predicted(prediction: str) -> None:
    objective = objective_of(prediction)
    x, e = noise(2, 4, 8, 8).double(), noise(2, 4, 8, 8, seed=1).double()
    t = torch.tensor([100, 700], dtype=objective.dtype)
    noisy, target = objective.noisy(x, e, t), objective.target(x, e, t)
    assert not torch.allclose(noisy, x)
    torch.testing.assert_close(objective.picture(noisy, target, t), x, rtol=1e-9, atol=1e-9)


def test_flow_goes_straight_from_the_picture_to_noise() -> None:
    x, e = noise(2, 4, 8, 8), noise(2, 4, 8, 8, seed=1)
    noisy = objective_of("flow").noisy(x, e, torch.tensor([0.0, 250.0]))
    assert torch.equal(noisy[0], x[0])
    torch.testing.assert_close(noisy[1], 0.75 * x[1] + 0.25 * e[1])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_objectives_agree_with_diffusers(prediction: str) -> None:
    from diffusers.training_utils import compute_snr

    scheduler = DDPMScheduler(**SD)
    objective = objective_of(prediction, min_snr=5.0)
    x, e, t = noise(3, 4, 8, 8), noise(3, 4, 8, 8, seed=1), torch.tensor([3, 400, 990])
    torch.testing.assert_close(objective.noisy(x, e, t), scheduler.add_noise(x, e, t))
    expected = e if prediction == "epsilon" else scheduler.get_velocity(x, e, t)
    torch.testing.assert_close(objective.target(x, e, t), expected)
    snr = compute_snr(scheduler, t)
    base = snr if prediction == "epsilon" else snr + 1
    torch.testing.assert_close(objective.weights(t).float(), snr.clamp(max=5) / base, rtol=1e-4, atol=1e-6)


def test_min_snr_survives_zero_terminal_snr() -> None:
    scheduler = SimpleNamespace(config={**SD, "rescale_betas_zero_snr": True})
    for prediction in ("epsilon", "v_prediction"):
        objective = objective_for(scheduler, prediction, LossConfig(min_snr=5.0))
        assert torch.isfinite(objective.weights(torch.arange(1000))).all()
    with pytest.raises(InvalidInputError, match="not defined for flow"):
        objective_for(scheduler, "flow", LossConfig(min_snr=5.0))


def test_a_scheduler_says_what_it_was_trained_for() -> None:
    assert objective_for(SimpleNamespace(config=SD), "auto", LossConfig()).prediction == "epsilon"
    told = DDPMScheduler(prediction_type="v_prediction")
    assert objective_for(told, "auto", LossConfig()).prediction == "v_prediction"
    flow = type("FlowMatchEulerDiscreteScheduler", (), {"config": {}})()
    assert isinstance(objective_for(flow, "auto", LossConfig()), FlowMatching)
    with pytest.raises(
        InvalidInputError, match=r"predicts 'no such thing', which is not supported; set model\.prediction to eps"
    ):
        objective_for(DDPMScheduler(prediction_type="no such thing"), "auto", LossConfig())


def test_a_name_and_a_schedulers_word_mean_one_objective() -> None:
    for names in (objectives.predictions(), [one.prediction_type for one in objectives.OBJECTIVES]):
        assert len({*names, "auto"}) == len(objectives.OBJECTIVES) + 1
    for one in objectives.OBJECTIVES:
        told = SimpleNamespace(config=SD | {"prediction_type": one.prediction_type})
        assert type(objective_for(told, "auto", LossConfig())) is one


def test_a_models_own_sampler_stays_where_it_draws_what_was_learned() -> None:
    told = DDPMScheduler(prediction_type="epsilon")
    assert objective_of("epsilon").sampler(told, (8, 8)) is told
    assert objective_of("v_prediction").sampler(told, (8, 8)).config["prediction_type"] == "v_prediction"


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("prediction", objectives.predictions())
def test_sheets_draw_what_a_perfect_denoiser_predicts(prediction: str, kind: str, tmp_path: Path) -> None:
    """A denoiser that knows the picture is led to it, by the pipeline and sampler that sheets are drawn with."""
    base = load_base(str(save_model(tmp_path, kind)))  # whose scheduler is DDIM for epsilon
    objective, picture = objective_for(base.scheduler, prediction, LossConfig()), noise(1, 4, 16, 16)
    asked: list[float] = []

    def perfect(noisy: Tensor, t: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
        asked.append(float(t))
        x, t = picture.expand_as(noisy), t.to(objective.dtype).expand(len(noisy))
        sigma = objective.noisy(torch.zeros_like(x), torch.ones_like(x), t)
        return (objective.target(x, (noisy - objective.noisy(x, torch.zeros_like(x), t)) / sigma, t),)

    base.unet.forward = perfect
    pipeline = pipeline_around(base, objective, 32)
    drawn: list[Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **named: drawn.append(latents) or decode(latents, **named)
    generate(pipeline, [], ["cat"], steps=5, guidance=3.0, seeds=[0], height=32, width=32)
    assert 0 <= min(asked) < max(asked) <= 1000
    assert len({*asked}) == 5
    found = drawn[0] * pipeline.vae.config.scaling_factor
    torch.testing.assert_close(found, picture, rtol=0, atol=0.15 if prediction != "flow" else 1e-5)


@pytest.mark.parametrize("shift", ["none", "resolution"])
def test_flow_is_sampled_at_the_noise_levels_it_was_learned_at(shift: str) -> None:
    objective, latent = objective_of("flow", shift=shift), (64, 32)
    sampler: Any = objective.sampler(DDPMScheduler(), latent)
    sampler.set_timesteps(4)
    expected = [objective.loss.quantile(u, 512) for u in (1.0, 0.667, 0.334, 0.001)]
    assert sampler.sigmas[:4].tolist() == pytest.approx(expected, abs=3e-3)
    torch.testing.assert_close(sampler.timesteps, 1000 * sampler.sigmas[:-1])


def test_a_flow_models_own_shift_stays() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    sampler = objective_of("flow").sampler(FlowMatchEulerDiscreteScheduler(shift=3.0), (8, 8))
    assert sampler.config["shift"] == 3.0
    assert isinstance(sampler, FlowMatchEulerDiscreteScheduler)


# --- timesteps ---------------------------------------------------------------------------------------------------------------


def drawn(objective: Objective, count: int = 4000, side: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.tensor([objective.draw_timestep(generator, (side, side)) for _ in range(count)], dtype=torch.float64)


def test_what_is_drawn_by_default_is_what_was_always_drawn() -> None:
    """Runs of former versions go on with the same bits: one call of randint, or of rand, for each timestep."""
    generator = torch.Generator().manual_seed(0)
    discrete = [int(torch.randint(1000, (), generator=generator)) for _ in range(5)]
    assert drawn(objective_of("epsilon"), 5).tolist() == drawn(objective_of("v_prediction"), 5).tolist() == discrete
    generator = torch.Generator().manual_seed(0)
    flow = [float(torch.rand((), generator=generator) * 1000) for _ in range(5)]
    assert drawn(objective_of("flow"), 5).tolist() == flow


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.6), (-1.0, 1.4)])
def test_logit_normal_quantiles_are_exact(mean: float, std: float) -> None:
    """SD3, equation 19: the logit of a noise level is normal. The quantile of u is sigmoid(mean + std · z(u))."""
    loss = LossConfig(timesteps="logit_normal", logit_mean=mean, logit_std=std)
    for u, z in ((0.5, 0.0), (0.8413447460685429, 1.0), (0.02275013194817921, -2.0)):
        assert loss.quantile(u, 256) == pytest.approx(1 / (1 + math.exp(-(mean + std * z))), rel=1e-9)
    assert [loss.quantile(u, 256) for u in (0.0, 1.0)] == [0.0, 1.0]


@pytest.mark.parametrize("prediction", objectives.predictions())
def test_logit_normal_draws_have_the_distributions_moments(prediction: str) -> None:
    """Against diffusers' draws of the same distribution, and against its density by quadrature."""
    from diffusers.training_utils import compute_density_for_timestep_sampling

    mean, std, count = 0.4, 0.8, 4000
    levels = drawn(objective_of(prediction, timesteps="logit_normal", logit_mean=mean, logit_std=std), count) / 1000
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    density = torch.exp(-((torch.logit(t) - mean) ** 2) / (2 * std**2)) / (std * math.sqrt(2 * math.pi) * t * (1 - t))
    first, second = float((density * t).mean()), float((density * t * t).mean())
    assert float(density.mean()) == pytest.approx(1, abs=1e-6)
    deviation = math.sqrt(second - first**2)
    assert float(levels.mean()) == pytest.approx(first, abs=4 * deviation / math.sqrt(count))  # four standard errors
    assert float(levels.std()) == pytest.approx(deviation, rel=0.05)
    generator = torch.Generator().manual_seed(1)
    theirs = compute_density_for_timestep_sampling("logit_normal", 200_000, mean, std, generator=generator)
    assert float(theirs.mean()) == pytest.approx(first, abs=2e-3)
    assert 0 <= float(levels.min()) < float(levels.max()) < 1


def test_the_shift_is_that_of_flux() -> None:
    """Its line through (256, 0.5) and (4096, 1.15) as diffusers computes it, and diffusers' way to apply it."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    loss, scheduler = LossConfig(shift="resolution"), FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (64, 256, 1024, 4096, 16384):
        mu = calculate_shift(tokens)
        for u in (0.01, 0.3, 0.5, 0.97):
            shifted = float(scheduler.time_shift(mu, 1.0, torch.tensor(u, dtype=torch.float64)))
            assert loss.quantile(u, tokens) == pytest.approx(shifted, rel=1e-9)
    assert loss.quantile(0.5, 256) == pytest.approx(1 / (1 + math.exp(-0.5)), rel=1e-12)


def test_a_fixed_shift_is_that_of_sd3() -> None:
    """SD3, equation 23, with its factor 3: 3 t / (1 + 2 t), whatever the size."""
    loss = LossConfig(shift="resolution", base_shift=math.log(3), max_shift=math.log(3))
    for u in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert loss.quantile(u, 1) == pytest.approx(3 * u / (1 + 2 * u), abs=1e-12)


def test_larger_pictures_are_drawn_noisier() -> None:
    objective = objective_of("flow", timesteps="logit_normal", shift="resolution")
    small, large = drawn(objective, 200, side=32), drawn(objective, 200, side=128)
    assert bool((large > small).all()), "from the same uniform numbers"
    huge = objective_of("flow", shift="resolution", base_shift=-10.0, max_shift=10.0)
    assert bool(torch.isfinite(drawn(huge, 50, side=2048)).all())


@pytest.mark.parametrize("changes", [{"timesteps": "logit_normal"}, {"shift": "resolution"}])
def test_draws_of_tables_stay_inside_them(changes: dict[str, Any]) -> None:
    objective = objective_of("epsilon", **changes, base_shift=9.0, max_shift=9.0)
    t = drawn(objective, 500)
    assert torch.equal(t, t.floor())
    assert float(t.min()) >= 0
    assert float(t.max()) <= 999


def test_settings_of_draws_are_checked() -> None:
    with pytest.raises(InvalidInputError, match=r"loss.logit_std is 0.0; it must be at least"):
        parse_config({"loss": {"timesteps": "logit_normal", "logit_std": 0}}, "the test")
    with pytest.raises(
        InvalidInputError, match=r"loss.timesteps is 'logit_norma'; choose one of uniform, logit_normal"
    ):
        parse_config({"loss": {"timesteps": "logit_norma"}}, "the test")


def test_drops_exclude_one_another_at_their_rates() -> None:
    chances = torch.arange(10_000) / 10_000
    no_image, no_text = drops(chances.double(), LossConfig(0.05, 0.10, 0.15))
    assert int((no_image & ~no_text).sum()) == 500
    assert int((no_text & ~no_image).sum()) == 1000
    assert int((no_text & no_image).sum()) == 1500


def test_draws_depend_on_the_place_alone() -> None:
    objective = objective_of("epsilon")
    places = [(5, 0), (5, 1), (6, 0)]
    together = draw(1, places, (4, 8, 8), objective, LossConfig(noise_offset=0.1))
    for i, place in enumerate(places):
        alone = draw(1, [place], (4, 8, 8), objective, LossConfig(noise_offset=0.1))
        assert torch.equal(alone.noise[0], together.noise[i])
        assert torch.equal(alone.timesteps[0], together.timesteps[i])
    assert not torch.equal(together.noise[0], together.noise[1])
    assert not torch.equal(draw(2, places, (4, 8, 8), objective, LossConfig()).noise, together.noise)


# --- another objective -------------------------------------------------------------------------------------------------------


class Picture(Diffusion):
    """A toy: the picture itself is predicted."""

    prediction = "x0"
    prediction_type = "sample"
    modelspec = "x0"
    asked = 0

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        type(self).asked += 1
        return latents

    def picture(self, noisy: Tensor, predicted: Tensor, t: Tensor) -> Tensor:
        return predicted

    def min_snr(self, snr: Tensor, gamma: float) -> Tensor:
        return snr.clamp(max=gamma)


def test_an_objective_is_one_class_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The config knows it, it trains, sheets are drawn with it, and files say it."""
    with pytest.raises(InvalidInputError, match="choose one of auto, epsilon, v_prediction, flow"):
        parse_config({"model": {"prediction": "x0"}}, "the test")
    monkeypatch.setattr(objectives, "OBJECTIVES", (*objectives.OBJECTIVES, Picture))
    model, pictures = save_model(tmp_path / "model"), save_pictures(tmp_path / "pictures")
    config = tiny_config(
        model, pictures, tmp_path / "out", model__prediction="x0", train__steps=2, watch__validate_every=1, watch__sample_every=2,
        watch__sample_steps=2, loss__min_snr=5.0,
        loss__timesteps="logit_normal", loss__shift="resolution", output__name="made",
    )  # fmt: skip
    outcome = train(config)
    assert outcome.step == 2
    assert Picture.asked > 2
    assert [*(tmp_path / "out").rglob("sheet.png")]
    from safetensors import safe_open

    with safe_open(outcome.file, framework="pt") as file:
        assert file.metadata()["prediction"] == "x0"


def test_the_readme_names_every_objective() -> None:
    text = (Path(objectives.__file__).parent / "README.md").read_text()
    assert all(f"`{name}`" in text for name in objectives.predictions())
