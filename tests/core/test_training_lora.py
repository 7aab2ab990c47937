"""LoRA trainings on a tiny model: one step against a plain rewriting, files that others read, resumption, what stays frozen."""

# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false, reportOptionalMemberAccess=false

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from dying import dies, kill_at, two_processes
from ipadapter_core.backends.diffusers import lora as backend
from ipadapter_core.commands.cli import main
from ipadapter_core.errors import IncompatibleAdapterError, InvalidInputError
from ipadapter_core.lora import LoRAWeights, load_lora
from ipadapter_core.model_folders import load_pipeline
from ipadapter_core.training import RunConfig, dry_run, parse_config, train
from ipadapter_core.training.batches import Batch, Nothing
from ipadapter_core.training.config import LoRAConfig
from ipadapter_core.training.frozen import FrozenBase, load_base
from ipadapter_core.training.lora_adapter import TrainedLoRA, fresh_lora
from ipadapter_core.training.lora_trainee import LoRAStep, LoRATrainee
from ipadapter_core.training.objectives import LossConfig, objective_for
from ipadapter_core.training.order import NoiseDraws
from tiny_models import noise, tiny_unet
from tiny_training import fingerprint, save_model, save_pictures, tiny_config


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pictures(tmp_path_factory.mktemp("pictures"), 9)


def lora_config(model: Path, pictures: Path, out: Path, **changes: Any) -> RunConfig:
    values: dict[str, Any] = {"lora__rank": 2, "output__name": "style", "loss__drop_text": 0.2}
    return tiny_config(model, pictures, out, **(values | changes))


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "progress.jsonl").read_text().splitlines()]
    return [row for row in rows if row["event"] == kind]


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in events(out, "step")]


def tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


# --- one step, plainly ---------------------------------------------------------------------------------------------------


class Table(nn.Module):
    """Token ids to embeddings, through one linear layer that a LoRA can change."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(noise(10, 32, seed=4).double())
        self.q_proj = nn.Linear(32, 32).double()

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.q_proj(self.table(ids)),)


def plain_delta(algorithm: str, p: dict[str, Tensor], weight: Tensor, scale: float) -> Tensor:
    """What the papers say of ΔW, with kernels flattened."""
    flat = weight.flatten(1)
    if algorithm in ("lora", "locon"):
        return scale * p["up"].flatten(1) @ p["down"].flatten(1)
    if algorithm == "loha":
        return scale * (p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"])
    if algorithm == "lokr":
        w2 = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"].flatten(1)
        scale = 1.0 if "w2" in p else scale
        w2 = w2.reshape(w2.shape[0], -1, *weight.shape[2:])
        rows = []
        for i in range(p["w1"].shape[0]):
            rows.append(torch.cat([p["w1"][i, j] * w2 for j in range(p["w1"].shape[1])], 1))
        return scale * torch.cat(rows).flatten(1)
    changed = flat + scale * p["up"].flatten(1) @ p["down"].flatten(1)
    if p["magnitude"].shape[0] == flat.shape[0] and algorithm == "dora out":
        return p["magnitude"][:, None] * changed / changed.norm(dim=1, keepdim=True) - flat
    kernel = changed.reshape(weight.shape)
    norm = kernel.square().sum([d for d in range(weight.ndim) if d != 1], keepdim=True).sqrt()
    return (p["magnitude"].reshape(norm.shape) * kernel / norm).flatten(1) - flat


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("algorithm", ["lora", "locon", "loha", "lokr", "dora out", "dora in"])
def test_one_step_is_the_papers(algorithm: str, text: bool) -> None:
    """Loss and gradients in float64 against weights that are changed by hand, to 1e-9."""
    unet, encoder = tiny_unet("small").double(), Table()
    encoder.requires_grad_(False)
    unet.requires_grad_(False)
    torch.manual_seed(0)
    kind, _, axis = algorithm.partition(" ")
    config = LoRAConfig(
        rank=2, alpha=3.0, rslora=True, algorithm=kind, dora_axis=axis or "out", factor=4, text_encoders=text,
        targets="all: 0, attn2: 1, resnet conv: 1" + (", te re:q_proj: 1" if text else ""),
    )  # fmt: skip
    parts: Any = {"denoiser": unet, "te1": encoder} if text else {"denoiser": unet}
    lora = fresh_lora(parts, config).double()
    with torch.no_grad():
        for i, p in enumerate(lora.parameters()):
            if not p.any():
                p.copy_(noise(*p.shape, seed=i).double() / 4)
    latents, gauss = noise(3, 4, 16, 16, seed=1).double(), noise(3, 4, 16, 16, seed=2).double()
    t, ids, no_text = (
        torch.tensor([10, 500, 900]),
        torch.arange(21).reshape(3, 7) % 10,
        torch.tensor([False, True, False]),
    )

    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    objective = objective_for(SimpleNamespace(config=scheduler), "auto", LossConfig())
    base = FrozenBase(unet, (encoder,), (), None, None, "")
    empty: tuple[Tensor, ...] = (torch.zeros(1, 7, dtype=torch.long),)
    context = () if text else (encoder(ids)[0],)
    nothing = Nothing(torch.empty(1, 0), empty, () if text else (encoder(empty[0])[0],))
    step = LoRAStep(lora, base, objective, nothing, 0)
    attached = lora.attach(parts)
    batch = Batch(latents[:, None], torch.empty(3, 0), (ids,), torch.zeros(3, 6), [(0, 0)] * 3, context)
    draws = NoiseDraws(gauss, gauss, t, torch.zeros(3, dtype=torch.bool), no_text)
    # the float32 table of the noise schedule and the dtype of the loss are the step's own business
    loss = step(batch, draws)
    loss.backward()
    found = {name: p.grad.clone() for name, p in lora.named_parameters()}
    attached.remove()

    leaves = {name: p.detach().clone().requires_grad_(True) for name, p in lora.named_parameters()}
    changed: dict[str, dict[str, Tensor]] = {"denoiser": {}, "te1": {}}
    for target, key in zip(lora.targets, lora.layers, strict=True):
        weight = parts[target.component].get_submodule(target.path).weight
        p = {name.rsplit(".", 1)[1]: leaf for name, leaf in leaves.items() if name.startswith(f"layers.{key}.")}
        rank = min(2, weight.shape[0], weight[0].numel())
        new = weight.flatten(1) + plain_delta(algorithm, p, weight, 3.0 / math.sqrt(rank))
        changed[target.component][f"{target.path}.weight"] = new.reshape(weight.shape)
    words = torch.where(no_text[:, None], empty[0], ids)
    read = torch.func.functional_call(encoder, changed["te1"], (words,))[0]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0).double()[t].reshape(3, 1, 1, 1)
    noisy = alphas**0.5 * latents + (1 - alphas) ** 0.5 * gauss
    predicted = torch.func.functional_call(unet, changed["denoiser"], (noisy, t, read)).sample
    expected = F.mse_loss(predicted, gauss)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    assert found.keys() == leaves.keys()
    assert any("te1_" in name for name in found) == text
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("algorithm", ["lora", "locon", "loha", "lokr", "dora"])
def test_it_starts_as_no_change(algorithm: Any) -> None:
    unet = tiny_unet("small")
    lora = fresh_lora({"denoiser": unet}, LoRAConfig(rank=3, algorithm=algorithm))
    x, t, text = noise(2, 4, 16, 16), torch.tensor(500), noise(2, 7, 32)
    with torch.no_grad():
        plain = unet(x, t, text).sample
        attached = lora.attach({"denoiser": unet})
        # dora's m / ‖W‖ is 1 up to rounding
        torch.testing.assert_close(unet(x, t, text).sample, plain, rtol=0, atol=1e-5)
        with attached.off():
            assert torch.equal(unet(x, t, text).sample, plain)
        attached.remove()
        assert not any(module._forward_hooks for module in unet.modules())
    kernels = {len(target.shape) for target in lora.targets}
    assert kernels == ({2, 4} if algorithm == "locon" else {2})


# --- whole runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "text"), [("sd15", False), ("sd15", True), ("sdxl", False), ("sdxl", True)])
def test_a_cache_changes_no_loss(
    kind: str, text: bool, model: Path, sdxl: Path, pictures: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {
        "lora__text_encoders": text, "data__latents": "sample", "train__steps": 3, "output__state_every": 0,
        "watch__validate_every": 3,
    }  # fmt: skip
    base = model if kind == "sd15" else sdxl
    train(lora_config(base, pictures, tmp_path / "live", **more))
    train(lora_config(base, pictures, tmp_path / "cached", data__cache=str(tmp_path / "cache"), **more))
    live, cached = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(set(live)) == 3
    assert cached == pytest.approx(live, rel=1e-5)
    seen = [events(tmp_path / name, "validation") for name in ("live", "cached")]
    assert [row["step"] for row in seen[0]] == [0, 3]
    assert seen[0][0]["lora_gain"] == 0, "it starts as nothing"
    assert seen[0][1]["lora_gain"] != 0
    for a, b in zip(*seen, strict=True):
        assert a["validation"] == pytest.approx(b["validation"], rel=1e-5)
    components = load_lora(tmp_path / "live/style.safetensors").components
    assert components == (("denoiser", "te1", "te2")[: 3 if kind == "sdxl" else 2] if text else ("denoiser",))


def test_what_is_frozen_stays_and_text_encoders_leave(model: Path, pictures: Path, tmp_path: Path) -> None:
    before = load_base(str(model))
    kept: list[LoRAStep] = []
    original = LoRAStep.forward

    def watched(self: LoRAStep, *args: Any) -> Tensor:
        kept.append(self)
        return original(self, *args)

    for text in (False, True):
        config = lora_config(
            model, pictures, tmp_path / str(text), lora__text_encoders=text, data__cache=str(tmp_path / "cache"),
            lora__algorithm="dora",
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LoRAStep, "forward", watched)
            train(config)
        used = kept[-1]._frozen[0]
        assert used.vae is None
        assert fingerprint(used.unet) == fingerprint(before.unet)
        assert not any(p.requires_grad for p in used.unet.parameters())
        assert len(used.text_encoders) == text, "only where they learn do they stay in memory"
        for encoder in used.text_encoders:
            assert fingerprint(encoder) == fingerprint(before.text_encoders[0])
        names = {name.split(".")[0] for name, _ in kept[-1].named_parameters()}
        assert names == {"adapter"}


def test_two_pictures_are_learned(model: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures", 2)
    config = lora_config(
        model, pictures, tmp_path / "run", lora__rank=8, lora__algorithm="locon", train__steps=60, train__lr=0.02,
        train__warmup=0, watch__validate_every=30, watch__sample_every=60, watch__validation=2, output__state_every=0,
        loss__drop_text=0.0, watch__sample_prompts=["", "owl"],
    )  # fmt: skip
    train(config)
    first, *_, last = events(tmp_path / "run", "validation")
    assert last["validation"] < 0.7 * first["validation"]
    assert last["lora_gain"] == pytest.approx(first["validation"] - last["validation"], rel=1e-3)
    from PIL import Image

    with Image.open(tmp_path / "run/sheet.png") as sheet:  # pictures, then without and with it for two prompts
        assert sheet.size == (2 * 36 - 4, 5 * 36 - 4)
        cells = [sheet.crop((0, 36 * row, 32, 36 * row + 32)).tobytes() for row in range(5)]
    assert cells[1] != cells[2]
    assert cells[3] != cells[4]
    assert cells[1] != cells[3], "an empty prompt is the picture's caption"


@pytest.fixture(scope="module")
def uninterrupted(model: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    out = tmp_path_factory.mktemp("uninterrupted")
    train(resumable(model, pictures, out / "run", out / "cache"))
    return out / "run", out / "cache"


def resumable(model: Path, pictures: Path, out: Path, cache: Path) -> RunConfig:
    return lora_config(
        model, pictures, out, data__cache=str(cache), output__save_every=2, train__accumulate=2, lora__dropout=0.3,
        lora__text_encoders=True, train__checkpointing=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("place", "count"),
    [("forward", 1), ("forward", 6), ("adapter file", 3), ("amid the state's files", 6), ("before the rename", 2)],
)
def test_killed_and_resumed_is_bit_identical(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path], place: str, count: int
) -> None:
    whole, cache = uninterrupted
    config = resumable(model, pictures, tmp_path, cache)
    arm = kill_at(LoRAStep, place, count)

    def work() -> None:
        arm()
        train(config)

    status = dies(work)
    assert os.WIFSIGNALED(status), f"it was to be killed at {place} {count}, and ended with {status}"
    assert os.WTERMSIG(status) == signal.SIGKILL
    train(config)
    for name in ("style", "style-00000006", "style-00000006-ema", "style-00000004"):
        assert_same(tensors(tmp_path / f"{name}.safetensors"), tensors(whole / f"{name}.safetensors"))
    assert losses(tmp_path) == losses(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in whole.iterdir())


def test_dropout_acts_and_is_the_same_for_the_same_step(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    whole, cache = uninterrupted
    config = resumable(model, pictures, tmp_path, cache).as_dict()
    config["lora"]["dropout"] = 0.0
    train(parse_config(config, "here"))
    mine, theirs = losses(tmp_path), losses(whole)
    assert mine[0] == theirs[0], "it starts as nothing, so there is nothing to drop"
    assert mine[2:] != theirs[2:]


# --- files ---------------------------------------------------------------------------------------------------------------------


def test_two_processes_train_what_one_with_twice_the_batch_does(sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    """With text encoders too, of which SDXL leaves a layer unread."""
    more: dict[str, Any] = {
        "lora__text_encoders": True, "lora__targets": "all: 0, attn: 1, te1: 1, te2: 1", "train__steps": 3,
        "train__accumulate": 2, "output__dtype": "float32",
    }  # fmt: skip
    train(lora_config(sdxl, pictures, tmp_path / "one", train__batch=4, **more))
    assert two_processes(lambda rank: train(lora_config(sdxl, pictures, tmp_path / "two", **more))) == [0, 0]
    one, two = (tensors(tmp_path / name / "style.safetensors") for name in ("one", "two"))
    assert any(key.startswith("lora_te1") for key in one)
    for key, value in one.items():
        # sums in another order: float32's last bits, grown by Adam's division in the first steps
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_text_encoders_learn_at_their_own_rate_and_resume(
    model: Path, pictures: Path, tmp_path: Path, optimizer: str
) -> None:
    def config(name: str, **changes: Any) -> RunConfig:
        more: dict[str, Any] = {
            "lora__text_encoders": True, "lora__targets": "all: 0, attn: 1, te attn: 1", "train__schedule": "cosine",
            "lora__text_learning_rate": 1e-4, "train__optimizer": optimizer, "output__dtype": "float32", "train__ema": 0.0,
            "data__cache": str(tmp_path / "cache"), "train__weight_decay": 0.0, "train__warmup": 0,
        }  # fmt: skip
        return lora_config(model, pictures, tmp_path / name, **(more | changes))

    def moved(name: str, **changes: Any) -> dict[str, float]:
        """By how much the tensors that start at zero are away from it: the rate, in Adam's first step."""
        found = tensors(train(config(name, train__steps=1, **changes)).file)
        ups = {key: float(value.abs().max()) for key, value in found.items() if "lora_up" in key}
        return {part: max(v for k, v in ups.items() if k.startswith(f"lora_{part}")) for part in ("unet", "te")}

    assert moved("slow") == pytest.approx({"unet": 1e-3, "te": 1e-4}, rel=1e-2)
    assert moved("same", lora__text_learning_rate=0.0) == pytest.approx({"unet": 1e-3, "te": 1e-3}, rel=1e-2)
    assert "at rate 0.001\n  te1" in (told := dry_run(config("slow")))
    assert "layers (LoRA × 8; ranks 2 × 8) at rate 0.0001" in told
    assert metadata(tmp_path / "slow/style.safetensors")["ss_text_encoder_lr"] == "0.0001"
    whole = train(config("whole"))
    status = dies(lambda: (kill_at(LoRAStep, "forward", 4)(), train(config("halves"))))
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert_same(tensors(train(config("halves")).file), tensors(whole.file))
    with pytest.raises(InvalidInputError, match=r"lora\.text_learning_rate: 0\.0001 → 0\.0002"):
        train(config("halves", lora__text_learning_rate=2e-4))
    with pytest.raises(InvalidInputError, match="chooses no layer of a text encoder"):
        train(config("none", lora__targets="all: 0, unet attn: 1"))


def filled(model: Path, out: Path, config: LoRAConfig) -> tuple[Any, TrainedLoRA]:
    """A pipeline and a LoRA on it that changes something."""
    pipeline = load_pipeline(model)
    parts = {c: m for c, m in backend.parts_of(pipeline).items() if c == "denoiser" or config.text_encoders}
    torch.manual_seed(1)
    lora = fresh_lora(parts, config)
    with torch.no_grad():
        for i, (name, p) in enumerate(lora.named_parameters()):
            if not name.endswith("magnitude"):
                p.copy_(noise(*p.shape, seed=i) / max(p.shape) ** 0.5)
    return pipeline, lora


def deltas(pipeline: Any, weights: LoRAWeights) -> dict[str, Tensor]:
    placed = backend.place(pipeline, weights).matched
    assert not placed.unmatched
    parts = backend.parts_of(pipeline)
    return {
        f"{p.target.component}.{p.key}": p.update.delta(
            parts[p.target.component].get_submodule(p.target.path).weight.detach()
        )
        for p in placed.matches
    }


@pytest.mark.parametrize("key_format", ["kohya", "diffusers"])
@pytest.mark.parametrize("algorithm", ["lora", "locon", "loha", "lokr", "dora"])
def test_files_come_back_the_same(algorithm: Any, key_format: Any, sdxl: Path, tmp_path: Path) -> None:
    """Alpha and rank-stabilised scale included, in the UNet and both text encoders."""
    config = LoRAConfig(rank=2, alpha=3.0, rslora=True, algorithm=algorithm, text_encoders=True, factor=4)
    pipeline, lora = filled(sdxl, tmp_path, config)
    out = parse_config({"output": {"key_format": key_format, "dtype": "float32"}}, "here").output
    told = {"steps": "7", "modelspec.title": "x"}
    file = tmp_path / "a.safetensors"
    if key_format == "diffusers" and algorithm in ("loha", "lokr"):
        with pytest.raises(InvalidInputError, match="write 'kohya' or 'generic'"):
            lora.save(file, lora.state_dict(), told, out)
        return
    lora.save(file, lora.state_dict(), told, out)
    back, mine = deltas(pipeline, load_lora(file)), deltas(pipeline, lora.weights(torch.float32))
    assert back.keys() == mine.keys()
    assert {key.split(".")[0] for key in back} == {"denoiser", "te1", "te2"}
    for key in mine:
        torch.testing.assert_close(back[key], mine[key], rtol=1e-5, atol=1e-6, msg=key)
        assert mine[key].abs().max() > 1e-3
    assert metadata(file)["ss_steps"] == "7"


@pytest.mark.parametrize("key_format", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_diffusers_loads_the_file(kind: str, key_format: Any, model: Path, sdxl: Path, tmp_path: Path) -> None:
    """Its UNet and its text encoders then give what ours give."""
    pytest.importorskip("peft", reason="diffusers reads LoRA files through peft")
    folder = model if kind == "sd15" else sdxl
    pipeline, lora = filled(folder, tmp_path, LoRAConfig(rank=2, alpha=1.0, text_encoders=True))
    out = parse_config({"output": {"key_format": key_format, "dtype": "float32"}}, "here").output
    lora.save(tmp_path / "a.safetensors", lora.state_dict(), {}, out)
    theirs = load_pipeline(folder)
    theirs.load_lora_weights(str(tmp_path), weight_name="a.safetensors")
    texts = ["owl on red background", ""]

    def encode(pipe: Any) -> Tensor:
        return pipe.encode_prompt(texts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]

    plain = encode(pipeline)
    with backend.apply(pipeline, backend.place(pipeline, lora.weights(torch.float32))), torch.no_grad():
        ours = encode(pipeline)
        torch.testing.assert_close(encode(theirs), ours, rtol=1e-4, atol=1e-5)
        assert (ours - plain).abs().mean() > 1e-3
        x, t = noise(2, 4, 16, 16), torch.tensor(500)
        added = {"text_embeds": noise(2, 8), "time_ids": torch.ones(2, 6)} if kind == "sdxl" else {}
        results = [pipe.unet(x, t, ours, added_cond_kwargs=added).sample for pipe in (pipeline, theirs)]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def test_a_file_says_how_it_was_made_and_is_trained_on(
    model: Path, pictures: Path, tmp_path: Path, uninterrupted: tuple[Path, Path]
) -> None:
    whole, _ = uninterrupted
    first = train(
        lora_config(
            model, pictures, tmp_path / "a", lora__algorithm="lokr", lora__factor=2, output__trigger="in tiny style",
            output__dtype="float16", train__steps=2,
        )
    )  # fmt: skip
    told = metadata(first.file)
    assert (told["ss_network_dim"], told["ss_steps"], told["ss_num_train_images"]) == ("2", "2", "7")
    assert told["modelspec.trigger_phrase"] == "in tiny style"
    assert json.loads(told["ss_tag_frequency"])["style"]["cat on red background"] >= 1
    assert json.loads(told["settings"])["lora"]["algorithm"] == "lokr"
    assert str(tmp_path.parent) not in json.dumps(told), "a file that is shared tells nobody where it was made"
    assert first.file.stat().st_size < 60_000, "only the LoRA is in it"
    on = lora_config(
        model, pictures, tmp_path / "b", lora__rank=0, lora__start_from=str(first.file), train__steps=1, train__lr=1e-9,
        output__dtype="float16",
    )  # fmt: skip
    second = train(on)
    for key, value in tensors(first.file).items():
        torch.testing.assert_close(tensors(second.file)[key], value, rtol=1e-3, atol=1e-6)
    text = whole / "style.safetensors"
    with pytest.raises(IncompatibleAdapterError, match=r"also changes text encoders .* lora.text_encoders = true"):
        train(lora_config(model, pictures, tmp_path / "c", lora__start_from=str(text)))
    with pytest.raises(IncompatibleAdapterError, match="does not fit"):
        train(
            lora_config(
                save_model(tmp_path / "other", "sdxl"), pictures, tmp_path / "d", lora__start_from=str(first.file)
            )
        )


def test_export_in_another_key_format(
    tmp_path: Path, uninterrupted: tuple[Path, Path], capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    source = uninterrupted[0] / "style.safetensors"
    target = tmp_path / "peft.safetensors"
    assert main(["export", str(source), str(target), "--key-format", "diffusers", "--dtype", "bfloat16", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == target.stat().st_size
    assert any(key.endswith("lora_A.weight") for key in tensors(target))
    pipeline = load_pipeline(model)
    mine, theirs = deltas(pipeline, load_lora(source)), deltas(pipeline, load_lora(target))
    for key in mine:
        torch.testing.assert_close(theirs[key], mine[key], rtol=0.03, atol=1e-4)


# --- before the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_dry_run_lists_what_learns(kind: str, model: Path, sdxl: Path, pictures: Path, tmp_path: Path) -> None:
    config = lora_config(
        model if kind == "sd15" else sdxl, pictures, tmp_path, lora__targets="all: 0, mid attn2 q: 1, te v: 1",
        lora__text_encoders=True, train__ignore_memory=False, lora__algorithm="dora",
    )  # fmt: skip
    text = dry_run(config)
    encoders = 2 if kind == "sdxl" else 1
    assert "adapter.layers.denoiser_mid_block_attentions_0_transformer_blocks_0_attn2_to_q.down 32" in text.replace(
        "  layers.", "  adapter.layers."
    )
    assert "denoiser 80 in 1 layers (DoRA × 1; ranks 2 × 1)" in text
    assert ("te2 " in text) == (encoders == 2)
    assert "memory: about" in text
    assert not list(tmp_path.glob("*.safetensors"))


def test_memory_counts_what_autograd_keeps(model: Path, pictures: Path, tmp_path: Path) -> None:
    from ipadapter_core.training.memory import activation_bytes

    base = load_base(str(model))
    parts: Any = {"denoiser": base.unet, "te1": base.text_encoders[0]}
    for algorithm in ("lora", "dora"):
        config = lora_config(model, pictures, tmp_path, lora__algorithm=algorithm, lora__text_encoders=True)
        trainee = LoRATrainee.build(config, base)
        lora = trainee.lora
        plain, thrifty = (activation_bytes(trainee, (16, 16), 4, checkpointing=on) for on in (False, True))
        assert 0 < thrifty < plain
        kept: dict[int, int] = {}
        weights = {
            p.untyped_storage().data_ptr() for m in (*parts.values(), lora) for p in (*m.parameters(), *m.buffers())
        }
        held: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:  # noqa: B023
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()  # noqa: B023
                held.append(tensor)  # noqa: B023
            return tensor

        attached = lora.attach(parts)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            base.encode_text(base.tokenize([""]))
            base.unet(
                torch.randn(1, 4, 16, 16), torch.zeros(1, dtype=torch.long), torch.randn(1, 77, 16).requires_grad_()
            )
        attached.remove()
        assert plain == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora__rnak": 3}, "did you mean 'rank'"),
        ({"lora__algorithm": "lora2"}, "choose one of lora, locon, loha, lokr, dora"),
        ({"lora__rank": 0, "lora__targets": "attn: 1"}, "given without lora.rank"),
        ({"adapter__num_tokens": 3}, "an adapter or a LoRA"),
        ({"data__pairs": 0.5}, "data.pairs is about reference pictures"),
        ({"loss__drop_image": 0.1}, "loss.drop_image is about reference pictures"),
        ({"lora__dropout": 1.0}, "leaves nothing to learn from"),
        ({"lora__dropout": 0.1, "lora__algorithm": "dora"}, "not defined for dora"),
        ({"lora__targets": "all: 0, atn: 1"}, "unknown word 'atn'"),
        ({"lora__text_learning_rate": 1e-5}, "set lora.text_encoders = true"),
        (
            {"lora__text_learning_rate": 1e-5, "lora__text_encoders": True, "train__optimizer": "prodigy"},
            "prodigy finds one learning rate",
        ),
        ({"train__beta2": 1.0}, "train.beta2 is 1"),
        ({"output__key_format": "koya"}, "did you mean 'kohya'"),
    ],
)
def test_mistakes_name_what_was_meant(model: Path, pictures: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        lora_config(model, pictures, tmp_path, **changes)


def test_targets_that_match_nothing_are_named(model: Path) -> None:
    unet = load_base(str(model)).unet
    with pytest.raises(InvalidInputError, match=r"'te attn' matches no layer of denoiser.*lora.text_encoders"):
        fresh_lora({"denoiser": unet}, LoRAConfig(rank=2, targets="all: 0, attn1: 1, te attn: 1"))
    with pytest.raises(InvalidInputError, match="chooses no linear layer"):
        fresh_lora({"denoiser": unet}, LoRAConfig(rank=2, targets="all: 0"))


def test_full_sizes_are_counted() -> None:
    """SD1.5's attentions at rank 4 are the 797,184 parameters of kohya's and diffusers' files."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)
        lora = fresh_lora({"denoiser": unet}, LoRAConfig(rank=4))
    assert sum(p.numel() for p in lora.parameters()) == 797_184
    assert len(lora.targets) == 32 * 4
