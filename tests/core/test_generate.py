"""The command as strong as the core: several adapters, LoRAs, pictures to begin with, and pictures that can be made again."""

# pyright: basic, reportPrivateImportUsage=false, reportAttributeAccessIssue=false

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ipadapter_core import Recorder, WeightSchedule, image_prompt
from ipadapter_core.attention.masks import RegionMask
from ipadapter_core.backends.diffusers import lora as diffusers_lora
from ipadapter_core.commands import cli
from ipadapter_core.commands.cli import main
from ipadapter_core.commands.generate import Lora, settled
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.generate import Beginning, generate, save_maps, size_for, to_pillow
from ipadapter_core.images.pictures import as_picture
from ipadapter_core.lora import load_lora, parse_where
from ipadapter_core.model_folders import layout_in, load_pipeline, published_as
from ipadapter_core.models import layout_of
from ipadapter_core.steering import prompt_patch
from tiny import tiny_state
from tiny_folder import sd15_folder
from tiny_models import checkpoint_channels
from tiny_onnx import write_face_models
from tiny_pipelines import chroma_pipeline, flux_pipeline, sd3_pipeline

LAYER = "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with two adapters and two LoRAs."""
    made = sd15_folder(tmp_path_factory)
    unet = load_pipeline(made).unet
    state = tiny_state(
        "plus", token_dim=32, channels=tuple(checkpoint_channels(layout_of(unet))), feature_dim=32, seed=3
    )
    save_file({key: value.contiguous() for key, value in state.items()}, made / "plus.safetensors")
    generator = torch.Generator().manual_seed(0)
    for name in ("ink", "oil"):
        down, up = (torch.randn(shape, generator=generator) for shape in ((2, 32), (8, 2)))
        save_file(
            {f"lora_unet_{LAYER}.lora_down.weight": down, f"lora_unet_{LAYER}.lora_up.weight": up},
            made / f"{name}.safetensors",
        )
    return made


def run(folder: Path, out: Path, *more: str, batch: int = 1) -> list[Any]:
    """The command's pictures, which must succeed."""
    begin = ["generate", "--model", str(folder), "--out", str(out), "--steps", "2", "--prompt", "a cat"]
    assert main([*begin, *([] if batch == 0 else ["--batch", str(batch)]), *more]) == 0
    return [pixels(path) for path in sorted(out.glob("seed-*.png"))]


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def drawn(pipeline: Any, patches: Any = (), seeds: Any = (0,), **more: Any) -> list[Any]:
    made = generate(pipeline, patches, ["a cat"] * len(seeds), steps=2, seeds=seeds, **more)
    return [np.asarray(to_pillow(one)) for one in made]


def settings_of(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text["ipadapter"])


# --- adapters ---------------------------------------------------------------------------------------------------------


def parsed(*arguments: str) -> dict[str, Any]:
    return settled(cli._parse(["generate", *arguments]))


def test_options_belong_to_the_adapter_before_them() -> None:
    found = parsed(
        *("--image", "cat.png", "--strength", "0.3", "--adapter", "a.safetensors", "--adapter", "b.safetensors"),
        *("--image", "x.png", "--image", "y.png", "z.png", "--strength", "0.5", "--preset", "composition"),
    )["adapters"]
    assert [str(one["adapter"]) for one in found] == ["a.safetensors", "b.safetensors"]
    assert [[str(image) for image in one["image"]] for one in found] == [["cat.png"], ["x.png", "y.png", "z.png"]]
    assert [one["strength"] for one in found] == [0.3, 0.5]
    assert [one["preset"] for one in found] == ["linear", "composition"]
    assert [one["scaling"] for one in found] == ["V only", "V only"]


def test_several_adapters_have_their_own_images_strengths_and_masks(folder: Path, tmp_path: Path) -> None:
    (made,) = run(
        folder, tmp_path / "both",
        "--adapter", str(folder / "adapter.safetensors"), "--image", str(folder / "a.png"), "--strength", "0.6",
        "--adapter", str(folder / "plus.safetensors"), "--image", str(folder / "grey.png"), "--strength", "0.4", "--preset",
        "composition", "--mask", str(folder / "mask.png"), "--curve", "0: 1, 1: 0.5", "--negative-image", str(folder / "a.png"),
    )  # fmt: skip
    pipeline = load_pipeline(folder)
    first = prompt_patch(pipeline, folder / "adapter.safetensors", folder / "a.png", WeightSchedule(0.6))
    second = prompt_patch(
        pipeline, folder / "plus.safetensors", folder / "grey.png",
        WeightSchedule(0.4, "composition", curve=((0.0, 1.0), (1.0, 0.5))), mask=RegionMask.of(folder / "mask.png"),
        negative=folder / "a.png",
    )  # fmt: skip
    np.testing.assert_array_equal(made, drawn(pipeline, [first, second])[0])
    assert (made != drawn(pipeline, [first])[0]).any()
    told = settings_of(tmp_path / "both" / "seed-000000.png")
    assert [one["strength"] for one in told["adapters"]] == [0.6, 0.4]


def test_maps_show_where_each_reference_acted(folder: Path, tmp_path: Path) -> None:
    """One sheet of heat maps and one of bars for each picture, those of a recorder in Python; the picture stays the same to the bit."""
    settings = [
        *("--width", "64", "--adapter", str(folder / "adapter.safetensors"), "--image", str(folder / "a.png"), str(folder / "grey.png")),
        *("--adapter", str(folder / "plus.safetensors"), "--image", str(folder / "a.png"), "--mask", str(folder / "mask.png")),
    ]  # fmt: skip
    plain = run(folder, tmp_path / "plain", *settings, "--at-once", "2", batch=3)
    assert not list((tmp_path / "plain").glob("*maps*"))
    run(folder, tmp_path / "out", *settings, "--at-once", "2", "--maps", batch=3)
    for seed, picture in enumerate(plain):
        np.testing.assert_array_equal(pixels(tmp_path / "out" / f"seed-{seed:06d}.png"), picture)
    names = [f"seed-{seed:06d}-{kind}.png" for seed in range(3) for kind in ("maps", "layers")]
    assert sorted(path.name for path in (tmp_path / "out").glob("seed-*-*.png")) == sorted(names)
    told = json.loads((tmp_path / "out" / "facts.json").read_text())
    assert [Path(file).name for file in told["maps"]] == names

    recorder = Recorder()
    pipeline = load_pipeline(folder)
    pictures = [folder / "a.png", folder / "grey.png"]
    with (
        image_prompt(pipeline, folder / "adapter.safetensors", pictures, record=recorder),
        image_prompt(
            pipeline, folder / "plus.safetensors", folder / "a.png", mask=folder / "mask.png", record=recorder
        ),
    ):
        drawn(pipeline, seeds=(2,), width=64)
    maps = recorder.maps()
    assert [str(one) for one in maps.references] == [
        "adapter.safetensors, reference 1",
        "adapter.safetensors, reference 2",
        "plus.safetensors",
    ]
    assert sum(stage.calls for stage in maps.stages) == 2
    sources = [to_pillow(as_picture(file)[..., :3]) for file in (*pictures, folder / "a.png")]
    last = Image.open(tmp_path / "out" / "seed-000002.png")
    files = save_maps(maps, [last], tmp_path / "python" / "it.png", sources)
    assert [file.name for file in files] == ["it.png", "it-layers.png"]
    for file, kind in zip(files, ("maps", "layers"), strict=True):
        np.testing.assert_array_equal(pixels(file), pixels(tmp_path / "out" / f"seed-000002-{kind}.png"))
    assert "ipadapter" not in Image.open(files[0]).text, "maps are no pictures to make again"


@pytest.mark.parametrize(("place", "batch"), [("there", 2), ("there/it.png", 1), ("there/it.png", 2)])
def test_maps_go_where_they_shall(folder: Path, tmp_path: Path, place: str, batch: int) -> None:
    settings = ["--adapter", str(folder / "adapter.safetensors"), "--image", str(folder / "a.png")]
    run(folder, tmp_path / "out", *settings, "--maps", str(tmp_path / place), batch=batch)
    found = sorted(path.name for path in (tmp_path / "there").iterdir())
    stems = {"there": ["seed-000000", "seed-000001"]}.get(
        place, ["it"] if batch == 1 else ["it-seed-000000", "it-seed-000001"]
    )
    ending = "-maps.png" if place == "there" else ".png"
    assert found == sorted(f"{stem}{end}" for stem in stems for end in (ending, "-layers.png"))


# --- LoRAs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "lora"),
    [
        ("ink.safetensors", Lora(Path("ink.safetensors"))),
        ("ink.safetensors:0.8", Lora(Path("ink.safetensors"), 0.8)),
        ("ink.safetensors:-1:all: 0, out3-5: 0.8", Lora(Path("ink.safetensors"), -1.0, "all: 0, out3-5: 0.8")),
        ("ink.safetensors::SD-OUTALL", Lora(Path("ink.safetensors"), 1.0, "SD-OUTALL")),
        ("C:\\l\\ink.safetensors:0.5", Lora(Path("C:\\l\\ink.safetensors"), 0.5)),
        ("me/loras:sub/ink.safetensors:0.5", Lora(Path("me/loras:sub/ink.safetensors"), 0.5)),
        ("a.safetensors.bin:2", Lora(Path("a.safetensors.bin"), 2.0)),
    ],
)
def test_a_lora_is_read_with_strength_and_places(text: str, lora: Lora) -> None:
    assert Lora.read(text) == lora


def test_loras_act_as_in_python(folder: Path, tmp_path: Path) -> None:
    (plain,) = run(folder, tmp_path / "plain")
    (made,) = run(folder, tmp_path / "made", "--lora", f"{folder / 'ink.safetensors'}:0.8", "--lora", f"{folder / 'oil.safetensors'}:0.5:attn2 k: 0.5")  # fmt: skip
    pipeline = load_pipeline(folder)
    from dataclasses import replace

    ink, oil = (diffusers_lora.place(pipeline, load_lora(folder / f"{name}.safetensors")) for name in ("ink", "oil"))
    where = parse_where("attn2 k: 0.5")
    with diffusers_lora.apply(pipeline, replace(ink, strength=0.8), replace(oil, strength=0.5, selector=where)):
        (expected,) = drawn(pipeline)
    assert abs(made.astype(int) - expected).max() <= 1, "merged or beside the layers"
    assert abs(made.astype(int) - plain).max() > 1
    (zero,) = run(folder, tmp_path / "zero", "--lora", f"{folder / 'ink.safetensors'}:0")
    np.testing.assert_array_equal(zero, plain)


# --- what a picture tells ---------------------------------------------------------------------------------------------


def web_ui(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and facts as the web UI's reader finds them (written from its description)."""
    *lines, last = text.strip().split("\n")
    found = re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last)
    assert len(found) >= 3, "with fewer the reader takes the line for a part of the prompt"
    facts = {key: json.loads(value) if value.startswith('"') else value for key, value in found}
    prompt = "\n".join(lines)
    positive, _, negative = prompt.partition("Negative prompt: ")
    return positive.strip(), negative.strip(), facts


def test_web_uis_and_civitai_read_the_pictures(folder: Path, tmp_path: Path) -> None:
    import hashlib

    lora = folder / "ink.safetensors"
    run(
        folder, tmp_path, "--lora", f"{lora}:0.8", "--negative", "ugly, blurry\nworse", "--seed", "7", "--guidance", "3",
        "--adapter", str(folder / "adapter.safetensors"), "--image", str(folder / "a.png"), "--strength", "0.6", "--prompt", "a cat, «oil»",
    )  # fmt: skip
    positive, negative, facts = web_ui(Image.open(tmp_path / "seed-000007.png").text["parameters"])
    assert positive == "a cat, «oil» <lora:ink:0.8>"
    assert negative == "ugly, blurry\nworse"
    assert facts | {"Steps": "2", "Sampler": "DDIM", "CFG scale": "3", "Seed": "7", "Size": "32x32"} == facts
    assert facts["Model"] == folder.name
    assert facts["IP-Adapter 1"] == "adapter, strength 0.6, linear"
    content = lora.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert facts["Lora hashes"] == f"ink: {hashlib.sha256(body).hexdigest()[:12]}"


def test_no_absolute_path_is_in_a_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(folder / "ink.safetensors", tmp_path)
    run(
        folder, tmp_path / "out", "--lora", str(tmp_path / "ink.safetensors"), "--adapter", str(folder / "adapter.safetensors"),
        "--image", str(folder / "a.png"), "/" + str(folder / "grey.png"), "--mask", "mask.png", "--init", str(folder / "a.png"),
    )  # fmt: skip
    for name in ("seed-000000.png", "grid.png"):
        with Image.open(tmp_path / "out" / name) as picture:
            whole = json.dumps(picture.text)
        assert str(tmp_path) not in whole
        assert str(folder) not in whole
    told = settings_of(tmp_path / "out" / "seed-000000.png")
    assert told["lora"] == ["~/ink.safetensors:1"]
    assert told["adapters"][0]["image"] == ["a.png", "grey.png"]


# --- making one again -------------------------------------------------------------------------------------------------


@pytest.fixture
def made(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures with everything that the command knows, made where the model lies."""
    monkeypatch.chdir(folder)
    run(
        Path("."), tmp_path / "made", "--seed", "4", "--negative", "ugly", "--guidance", "3.5", "--at-once", "2", "--lora", "ink.safetensors:0.7",
        "--adapter", "adapter.safetensors", "--image", "a.png", "grey.png", "--image-strengths", "1,0.5", "--strength", "0.6", "--combine", "add",
        "--crop", "pad", "--unconditional", "zero_pixels", "--adapter", "plus.safetensors", "--image", "grey.png", "--mask", "mask.png", "--curve",
        "0: 1, 1: 0.2", "--start", "0.1", "--end", "0.9", "--sites", "all: 0.5", "--scaling", "K+V", "--preset", "ease in",
        "--init", "a.png", "--denoise", "0.9", batch=3,
    )  # fmt: skip
    return tmp_path / "made"


@pytest.mark.parametrize("seed", [5, 6])
def test_a_picture_is_made_again_bit_for_bit(made: Path, tmp_path: Path, seed: int) -> None:
    """Alone, though it was sampled beside another: the same numbers come of the same batch."""
    name = f"seed-{seed:06d}.png"
    assert main(["generate", "--from", str(made / name), "--out", str(tmp_path / "again")]) == 0
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == ["facts.json", name]
    np.testing.assert_array_equal(pixels(tmp_path / "again" / name), pixels(made / name))
    assert settings_of(tmp_path / "again" / name) == settings_of(made / name)


def test_a_picture_of_a_face_is_made_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "insightface", None)
    pack = write_face_models(tmp_path)
    face = np.full((320, 320, 3), 51, np.uint8)
    face[96:144, 160:208] = 255, 0, 0
    Image.fromarray(face).save(tmp_path / "face.png")
    channels = tuple(checkpoint_channels(layout_in(folder)))
    state = tiny_state("faceid", token_dim=32, channels=channels, face_dim=512)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "faces.safetensors")
    monkeypatch.chdir(tmp_path)
    (picture,) = run(
        folder, tmp_path / "out", "--adapter", "faces.safetensors", "--image", "face.png", "--face-models", "models/buffalo_l",
    )  # fmt: skip
    told = settings_of(tmp_path / "out/seed-000000.png")["adapters"]
    assert told[0]["face_models"] == pack.relative_to(tmp_path).as_posix()
    assert np.abs(picture.astype(int) - run(folder, tmp_path / "plain")[0]).max() > 0
    assert main(["generate", "--from", "out/seed-000000.png", "--model", str(folder), "--out", "again"]) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "again/seed-000000.png"), picture)


def test_a_whole_sheet_is_made_again(made: Path, tmp_path: Path) -> None:
    assert main(["generate", "--from", str(made / "grid.png"), "--out", str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "again" / "grid.png"), pixels(made / "grid.png"))


def test_what_is_given_replaces_what_a_picture_says(made: Path, tmp_path: Path) -> None:
    again = ["generate", "--from", str(made / "seed-000005.png"), "--out", str(tmp_path / "again")]
    assert main([*again, "--seed", "9", "--strength", "0"]) == 0
    told = settings_of(tmp_path / "again" / "seed-000009.png")
    assert [one["strength"] for one in told["adapters"]] == [0.0, 0.0]
    assert told["lora"] == ["ink.safetensors:0.7"]
    assert main([*again, "--adapter", "plus.safetensors", "--image", "a.png", "--lora", "oil.safetensors"]) == 0
    told = settings_of(tmp_path / "again" / "seed-000005.png")
    assert [(one["adapter"], one["image"]) for one in told["adapters"]] == [("plus.safetensors", ["a.png"])]
    assert told["lora"] == ["oil.safetensors:1"]


def test_files_in_whose_place_others_are_given_need_not_be_there(
    made: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    again = ["generate", "--from", str(made / "seed-000005.png"), "--out", "again", "--init", str(folder / "a.png")]
    given = {
        "adapter.safetensors": ["--adapter", str(folder / "plus.safetensors"), "--image", str(folder / "a.png")],
        "ink.safetensors": ["--lora", str(folder / "oil.safetensors")],
    }
    for missing in given:
        others = [word for name, words in given.items() if name != missing for word in words]
        assert main([*again, "--model", str(folder), *others]) == 2
        assert f"'{missing}', which is not there" in capsys.readouterr().err
    assert main([*again, "--model", str(folder), *given["adapter.safetensors"], *given["ink.safetensors"]]) == 0


def test_files_that_moved_are_looked_for_and_changed_ones_told(
    made: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    again = ["generate", "--from", str(made / "seed-000005.png"), "--out", "again", "--model", str(folder)]
    capsys.readouterr()
    assert main(again) == 2
    assert "name its folder with --look-in" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    for name in ("adapter.safetensors", "plus.safetensors", "ink.safetensors", "a.png", "grey.png", "mask.png"):
        shutil.copy(folder / name, other)
    assert main([*again, "--look-in", str(other)]) == 0
    np.testing.assert_array_equal(pixels(Path("again/seed-000005.png")), pixels(made / "seed-000005.png"))
    assert "is not what it was" not in capsys.readouterr().err
    Image.new("RGB", (30, 40), "red").save(other / "a.png")
    assert main([*again, "--look-in", str(other)]) == 0
    assert "a.png' is not what it was when seed-000005.png was made" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chunk", "said"),
    [
        ("{", "is not valid JSON"),
        ("[]", "settings of another version"),
        ('{"settings": 9}', "settings of another version"),
        ('{"settings": 2, "steps": "1e9"}', "does not know"),
        ('{"settings": 2, "width": 1000000}', "does not know"),
        ('{"settings": 2, "out": "/etc", "seed": [1]}', ""),
        ('{"settings": 2, "model": "/etc/passwd"}', "which run no code"),
        ('{"settings": 2, "model": "me/model"}', "not fetched unasked"),
        (
            '{"settings": 2, "adapters": [{"image": ["me/x:y.png"], "adapter": "x:y"}], "model": "."}',
            "name its folder with --look-in",
        ),
    ],
)
def test_settings_of_strangers_cost_a_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chunk: str, said: str
) -> None:
    from PIL.PngImagePlugin import PngInfo

    told = PngInfo()
    told.add_text("ipadapter", chunk)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png", pnginfo=told)
    model = [] if "model" in chunk else ["--model", str(folder), "--batch", "1"]
    done = main(["generate", "--from", str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--steps", "1", *model])
    assert done == (0 if said == "" else 2)
    assert (tmp_path / "out").exists() == (said == "")
    told_of = capsys.readouterr().err
    assert said in told_of
    assert said == "" or told_of.count("\n") == 1


# --- pictures to begin with -------------------------------------------------------------------------------------------


def test_a_picture_to_begin_with_stays_more_where_less_is_drawn_anew(folder: Path, tmp_path: Path) -> None:
    init = ["--init", str(folder / "a.png"), "--height", "32", "--width", "32"]
    few, many = (run(folder, tmp_path / x, *init, "--denoise", x, "--steps", "20")[0] for x in ("0.1", "0.9"))
    other = run(folder, tmp_path / "mask", "--init", str(folder / "mask.png"), *init[2:], "--denoise", "0.1", "--steps", "20")[0]  # fmt: skip
    assert few.shape == many.shape == (32, 32, 3)
    assert (few != many).any()
    assert (few != other).any()


def test_inpainting_leaves_the_rest_as_it_was(folder: Path, tmp_path: Path) -> None:
    picture = np.asarray(Image.open(folder / "a.png").resize((32, 32)))
    Image.fromarray(picture).save(tmp_path / "init.png")
    image = ["--adapter", str(folder / "adapter.safetensors"), "--image", str(folder / "grey.png")]
    (made,) = run(folder, tmp_path / "made", "--init", str(tmp_path / "init.png"), "--inpaint-mask", str(folder / "mask.png"), "--denoise", "1", *image)  # fmt: skip
    np.testing.assert_array_equal(made[:, :16], picture[:, :16])
    assert (made[:, 16:] != picture[:, 16:]).mean() > 0.9
    text = Image.open(tmp_path / "made" / "seed-000000.png").text["parameters"]
    assert web_ui(text)[2]["Denoising strength"] == "1"


def sd35_pipeline() -> Any:
    return sd3_pipeline(channels=16)  # others diffusers does not paint into


@pytest.mark.parametrize("build", [flux_pipeline, sd35_pipeline, chroma_pipeline])
def test_transformers_begin_with_pictures_too(build: Any) -> None:
    made, picture, inside = (
        build(),
        torch.rand(16, 32, 3, generator=torch.Generator().manual_seed(0)),
        torch.zeros(16, 32),
    )
    inside[:, 16:] = 1
    call: dict[str, Any] = {"steps": 4, "guidance": 1.0, "seeds": [0], "height": 16, "width": 32}
    drawn = generate(made, [], ["a red circle"], beginning=Beginning(picture, 0.5), **call)
    assert drawn.shape == (1, 16, 32, 3)
    if build is chroma_pipeline and not hasattr(made.transformer.config, "guidance_embeds"):
        with pytest.raises(
            InvalidInputError, match=r"ChromaInpaintPipeline.* cannot"
        ):  # which older diffusers lack, and newer ones cannot call
            generate(made, [], ["a red circle"], beginning=Beginning(picture, 0.5, inside), **call)
        return
    filled = generate(made, [], ["a red circle"], beginning=Beginning(picture, 0.5, inside), **call)
    torch.testing.assert_close(filled[0][:, :16], picture[:, :16], rtol=0, atol=0)
    assert (filled[0][:, 16:] != picture[:, 16:]).any()


def test_what_lies_outside_is_kept_at_every_step(folder: Path) -> None:
    """The first latents outside are the picture's with noise, the last ones the picture's: no seam is left to the pixels alone."""
    pipeline = load_pipeline(folder)
    picture = as_picture(folder / "a.png")[:32, :30]
    inside = torch.zeros(32, 30)
    inside[:, 15:] = 1
    seen: list[torch.Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda latents, **more: (seen.append(latents), decode(latents, **more))[1]
    generate(
        pipeline, [], ["a cat"], steps=3, seeds=[0], height=32, width=32, beginning=Beginning(picture, 1.0, inside)
    )
    from ipadapter_core.generate import _cover, _encoded

    expected = _encoded(pipeline.vae, _cover(picture.permute(2, 0, 1)[None], 32, 32) * 2 - 1)
    (last,) = seen
    torch.testing.assert_close(last[..., :7], expected[..., :7] / 1.0, rtol=0, atol=1e-5)
    assert (last[..., 9:] - expected[..., 9:]).abs().max() > 0.1


def test_large_pictures_are_drawn_at_the_models_own_size(folder: Path) -> None:
    pipeline = load_pipeline(folder)  # 32 pixels
    assert size_for(pipeline, torch.zeros(4000, 1000, 3), None, None) == (64, 16)
    assert size_for(pipeline, torch.zeros(20, 30, 3), None, None) == (20, 30)
    assert size_for(pipeline, torch.zeros(20, 30, 3), 48, None) == (48, 30)
    with pytest.raises(InvalidInputError, match="denoise is 0"):
        Beginning(torch.zeros(8, 8, 3), 0.0)


# --- models and devices -----------------------------------------------------------------------------------------------


def test_seeds_may_be_listed(folder: Path, tmp_path: Path) -> None:
    made = run(folder, tmp_path / "listed", "--seed", "9", "3", batch=0)
    assert sorted(path.name for path in (tmp_path / "listed").glob("seed*")) == ["seed-000003.png", "seed-000009.png"]
    one, other = run(folder, tmp_path / "alone", "--seed", "3", "9", "--at-once", "1", batch=0)
    for again, beside in ((one, made[0]), (other, made[1])):
        assert abs(again.astype(int) - beside).max() <= 1


def test_half_precision_beside_an_accelerator(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, tmp_path / "cpu")
    told = settings_of(tmp_path / "cpu" / "seed-000000.png")
    assert (told["dtype"], told["device"]) == ("float32", "cpu")
    asked: list[torch.dtype] = []

    def load(*_: Any, dtype: torch.dtype, **__: Any) -> Any:
        asked.append(dtype)
        raise InvalidInputError("enough")

    monkeypatch.setattr("ipadapter_core.model_folders.load_pipeline", load)
    monkeypatch.setattr("ipadapter_core.devices.usable_device", lambda name: "cuda" if name == "auto" else name)
    flux_pipeline().save_pretrained(tmp_path / "flux")
    for model, more in (
        (folder, []),
        (tmp_path / "flux", []),
        (folder, ["--dtype", "float32"]),
        (folder, ["--device", "cpu"]),
    ):
        assert main(["generate", "--model", str(model), *more]) == 1
    assert asked == [torch.float16, torch.bfloat16, torch.float32, torch.float32]


def test_a_file_without_configs_is_told_by_its_shapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And described by the published model of its kind, from the Hub's cache or from there."""
    key = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    asked: list[str] = []

    def described(name: str) -> Path:
        asked.append(str(name))
        raise InvalidInputError("the Hub is out of reach")

    monkeypatch.setattr("ipadapter_core.hub.described", described)
    for width in (768, 1024, 2048, 99):
        save_file({key: torch.zeros(4, width)}, tmp_path / f"{width}.safetensors")
        assert main(["generate", "--model", str(tmp_path / f"{width}.safetensors")]) == 2
        said = capsys.readouterr().err
        assert ("holds no configs" if width == 99 else "out of reach") in said
    assert asked == [
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "stabilityai/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-xl-base-1.0",
    ]
    assert published_as(tmp_path / "99.safetensors") is None


def test_the_demo_world_draws_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an image, a text, a LoRA and a region to paint: the whole command on models that come along."""
    from ipadapter_core.demo.world import FOLDER, REFERENCES

    monkeypatch.chdir(tmp_path)
    shutil.copy(REFERENCES / "owl.png", "owl.png")
    shutil.copy(REFERENCES / "leopard.png", "leopard.png")
    lora = FOLDER / "loras" / "demo-world-style.safetensors"
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save("right.png")
    arguments = [
        "--image",
        "owl.png",
        "--prompt",
        "an owl",
        "--lora",
        str(lora),
        "--init",
        "leopard.png",
        "--inpaint-mask",
        "right.png",
    ]
    assert main(["generate", *arguments, "--steps", "2", "--batch", "1", "--denoise", "1", "--out", "out"]) == 0
    made, before = pixels(Path("out/seed-000000.png")), np.asarray(Image.open("leopard.png").convert("RGB"))
    np.testing.assert_array_equal(made[:, :32], before[:, :32])
    assert (made[:, 32:] != before[:, 32:]).any()
    assert main(["generate", "--from", "out/seed-000000.png", "--look-in", str(lora.parent), "--out", "again"]) == 0
    np.testing.assert_array_equal(pixels(Path("again/seed-000000.png")), made)
