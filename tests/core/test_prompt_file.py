"""Encoded references on disk: the same prompt again, for every adapter that reads them, and clear words where it does not."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.checkpoints import AdapterWeights, load_adapter
from ipadapter_core.errors import AdapterError, CorruptFileError, IncompatibleEncoderError, InvalidInputError
from ipadapter_core.features import ImageFeatures, pack_face
from ipadapter_core.prompt.combine import combine_prompts
from ipadapter_core.prompt.encode import encode_image_prompt, prompt_from_features
from ipadapter_core.prompt.file import load_prompt, save_prompt
from ipadapter_core.prompt.image_prompt import ImagePrompt
from tiny import tiny_state

HIDDEN, EMBED, TOKENS, FACE = 32, 24, 17, 16
exact = {"rtol": 0.0, "atol": 0.0}


class Encoder:
    """Means of an image's colours, spread: cheap, and different for different images."""

    name, hidden_size, projection_dim, image_size = "tiny clip", HIDDEN, EMBED, 28
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        means = pixel_values.mean((2, 3))
        wide = torch.linspace(-1, 1, TOKENS * HIDDEN).outer(torch.ones(3)) @ means.T + 0.1
        return ImageFeatures(wide.T[:, :EMBED], wide.T.unflatten(1, (TOKENS, HIDDEN)))


def adapter(family: str = "plus", *, seed: int = 0, **sizes: int) -> AdapterWeights:
    width = {"base": EMBED, "faceid": FACE, "unnorm": 512}.get(family, HIDDEN)
    if family.startswith("face"):
        sizes = {"face_dim": FACE, **sizes}
    state = tiny_state("plus" if family == "unnorm" else family, seed=seed, **{"feature_dim": width, **sizes})
    return load_adapter(state, name=f"{family} {seed}")


def photos(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 1, 3, generator=torch.Generator().manual_seed(seed)).expand(-1, 30, 30, -1)


def encode(family: str, count: int = 2, **options: Any) -> ImagePrompt:
    return encode_image_prompt(adapter(family), Encoder(), photos(count), **options)


def same(a: ImagePrompt, b: ImagePrompt) -> None:
    for name in ("cond", "uncond", "features", "uncond_features", "neutral_features"):
        assert_close(getattr(a, name), getattr(b, name), **exact)
    assert (a.encoder, a.adapter, a.token_dim, a.face_scale) == (b.encoder, b.adapter, b.token_dim, b.face_scale)
    assert a.negative_branch == b.negative_branch


RULES = [{"unconditional": "same"}, {"unconditional": "off"}, {"unconditional": "same", "negative": photos(1, 9)}]


@pytest.mark.parametrize(
    "options", [{}, {"per_latent": True}, {"negative": photos(1, 9)}, {"strengths": [0.5, 2.0]}, *RULES]
)
@pytest.mark.parametrize("family", ["base", "plus", "full-face"])
def test_a_saved_prompt_is_the_same_again(tmp_path: Path, family: str, options: dict[str, Any]) -> None:
    prompt = encode(family, **options)
    path = save_prompt(tmp_path / "deep" / "a.ipadpt.safetensors", prompt)
    same(load_prompt(path, adapter(family)), prompt)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("rule", ["same", "off"])
def test_embeds_of_other_tools_follow_the_adapters_rule(tmp_path: Path, rule: Any) -> None:
    trained = replace(adapter(), spec=replace(adapter().spec, unconditional=rule))
    made = encode_image_prompt(trained, Encoder(), photos(2))
    save_file({"embeds": made.features[0]}, tmp_path / "a.safetensors")
    loaded = load_prompt(tmp_path / "a.safetensors", trained)
    for name in ("cond", "uncond", "negative_branch"):
        assert_equal(getattr(loaded, name), getattr(made, name))
    save_file({"embeds": made.features[0]}, tmp_path / "a.safetensors", metadata={"negative_branch": "none"})
    with pytest.raises(CorruptFileError, match="tokens, same or off"):
        load_prompt(tmp_path / "a.safetensors", trained)


def assert_equal(a: Any, b: Any) -> None:
    assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_prompts_of_many_images_and_latents_come_back(tmp_path: Path) -> None:
    """Two images side by side for each of three latents, with a negative for one of them."""
    one = encode("plus", 3, per_latent=True)
    two = encode("plus", 1, negative=photos(1, 5))
    both = combine_prompts(adapter(), [one, two], combine="concat")
    assert both.features.shape[:2] == (3, 2)
    same(load_prompt(save_prompt(tmp_path / "a.safetensors", both), adapter()), both)
    apart = load_prompt(tmp_path / "a.safetensors", adapter(), per_latent=True)
    assert apart.features.shape[:2] == (6, 1)
    assert_close(apart.features[:, 0], both.features.flatten(0, 1), **exact)


def test_the_file_serves_another_adapter_and_says_what_it_is(tmp_path: Path) -> None:
    path = save_prompt(tmp_path / "a.safetensors", encode("plus"))
    other = adapter("full-face", seed=3)
    same(load_prompt(path, other), encode_image_prompt(other, Encoder(), photos(2)))
    with safe_open(str(path), "pt") as file:
        texts = file.metadata()
    assert (texts["feature"], texts["family"], texts["encoder"]) == ("penultimate", "plus", "tiny clip")
    assert len(load_file(path)["negative"]) == 1, "equal rows are kept once"


def test_a_loaded_prompt_combines_with_a_fresh_one(tmp_path: Path) -> None:
    loaded = load_prompt(save_prompt(tmp_path / "a.safetensors", encode("plus", 1)), adapter())
    same(combine_prompts(adapter(), [loaded, loaded], combine="add"),
         combine_prompts(adapter(), [encode("plus", 1), loaded], combine="add"))  # fmt: skip


def test_faces_keep_what_is_read_in_their_pictures(tmp_path: Path) -> None:
    plus = load_adapter(tiny_state("faceid-plus", face_dim=FACE, feature_dim=HIDDEN), name="f-plusv2.bin")
    features, away = (pack_face(torch.rand(1, FACE), torch.rand(1, TOKENS, HIDDEN)) for _ in range(2))
    prompt = prompt_from_features(plus, features, away, face_scale=0.25)
    path = save_prompt(tmp_path / "a.safetensors", prompt)
    same(load_prompt(path, plus), prompt)
    assert_close(combine_prompts(plus, [prompt], combine="add").cond, prompt.cond, **exact)
    whole = prompt_from_features(plus, features, away)
    assert not torch.equal(whole.cond, prompt.cond)
    with pytest.raises(InvalidInputError, match=r"strengths 0\.25, 1"):
        combine_prompts(plus, [prompt, whole], combine="add")


def test_what_an_adapter_does_not_read_is_refused(tmp_path: Path) -> None:
    plus = save_prompt(tmp_path / "plus.safetensors", encode("plus"))
    with pytest.raises(
        IncompatibleEncoderError, match=r"hidden states of an encoder.*made with tiny clip.*image embeds"
    ):
        load_prompt(plus, adapter("base"))
    with pytest.raises(IncompatibleEncoderError, match=r"shape .*, 32.*64 wide"):
        load_prompt(plus, adapter("plus", feature_dim=64))
    face = prompt_from_features(adapter("faceid"), torch.rand(1, FACE), torch.zeros(1, FACE))
    with pytest.raises(IncompatibleEncoderError, match="directions of face embeddings"):
        load_prompt(save_prompt(tmp_path / "face.safetensors", face), adapter("base", feature_dim=FACE))


def test_directions_of_faces_are_not_taken_for_faces_of_full_length(tmp_path: Path) -> None:
    unit = adapter("faceid", face_dim=512, feature_dim=512)
    sizes = {"num_tokens": 16, "feature_dim": 512, "hidden_dim": 64, "inner_dim": 64, "depth": 1}
    raw = adapter("unnorm", token_dim=2048, **sizes)
    assert raw.spec.format.feature.name == "raw face"
    path = save_prompt(tmp_path / "a.safetensors", prompt_from_features(unit, torch.rand(1, 512), torch.zeros(1, 512)))
    with pytest.raises(IncompatibleEncoderError, match="reads face embeddings of full length"):
        load_prompt(path, raw)


def test_embeds_of_other_tools(tmp_path: Path) -> None:
    path = tmp_path / "old.ipadpt"
    embeds = encode("plus").features[0]
    torch.save(embeds, path)
    same_as = encode("plus")
    loaded = load_prompt(path, adapter(), Encoder())
    assert_close((loaded.cond, loaded.uncond), (same_as.cond, same_as.uncond))
    assert loaded.encoder == "tiny clip"
    with pytest.raises(InvalidInputError, match="connect the image encoder"):
        load_prompt(path, adapter())
    torch.save(torch.rand(3, EMBED).half(), path)
    loaded = load_prompt(path, adapter("base"))  # no image is zeros there
    assert (loaded.features.shape, loaded.features.dtype) == ((1, 3, EMBED), torch.float32)
    with pytest.raises(
        IncompatibleEncoderError, match=r"old\.ipadpt holds embeds of shape \(3, 24\); plus 0 is a plus"
    ):
        load_prompt(path, adapter())


@pytest.mark.parametrize(
    ("tensors", "texts", "words"),
    [
        ({"embeds": torch.full((1, EMBED), torch.nan)}, {}, "no usable numbers"),
        ({"embeds": torch.zeros(0, EMBED)}, {}, "no usable numbers"),
        ({"embeds": torch.ones(3, EMBED)}, {"latents": "2"}, "not the same number for 2"),
        ({"embeds": torch.ones(1, EMBED)}, {"latents": "many"}, "latents is 'many'"),
        ({"embeds": torch.ones(1, EMBED)}, {"latents": "0"}, "latents is '0'"),
        ({"embeds": torch.ones(1, EMBED), "negative": torch.ones(1, 3)}, {}, "must agree"),
        ({"embeds": torch.ones(3, EMBED), "neutral": torch.ones(2, EMBED)}, {}, "must agree"),
        ({"other": torch.ones(1, EMBED)}, {}, "holds no tensor 'embeds'"),
    ],
)  # fmt: skip
def test_files_that_contradict_themselves(
    tmp_path: Path, tensors: dict[str, Tensor], texts: dict[str, str], words: str
) -> None:
    save_file(tensors, tmp_path / "a.safetensors", texts)
    with pytest.raises(CorruptFileError, match=words):
        load_prompt(tmp_path / "a.safetensors", adapter("base"))


ODD = {
    "float8": torch.ones(1, EMBED).to(torch.float8_e4m3fn),
    "complex": torch.ones(1, EMBED, dtype=torch.complex64),
    "integers": torch.ones(1, EMBED, dtype=torch.int64),
    "bools": torch.ones(1, EMBED, dtype=torch.bool),
    "one number": torch.tensor(1.0),
    "a row": torch.ones(EMBED),
    "five axes": torch.ones(1, 1, 1, 1, EMBED),
    "no images": torch.ones(0, EMBED),
    "no width": torch.ones(1, 0),
    "NaN": torch.full((1, EMBED), torch.nan),
    "infinite": torch.full((1, EMBED), torch.inf),
    "a million images": torch.ones(1_000_000, 1).half(),
}
ODD_PICKLES = {
    **ODD,
    "a list of one number": [torch.tensor(1.0)],
    "an empty list": [],
    "a list of texts": ["x"],
    "two adapters": [torch.ones(1, EMBED), torch.ones(1, EMBED)],
    "a triple": torch.ones(3, 1, 1, EMBED),
    "no numbers": torch.ones(1, EMBED, device="meta"),
    "sparse": torch.ones(1, EMBED).to_sparse(),
    "billions of images": torch.ones(1, EMBED).expand(10**9, EMBED),
    "a table": {"embeds": torch.ones(1, EMBED)},
}


@pytest.mark.parametrize("kind", ODD_PICKLES)
def test_pickles_of_odd_embeds(tmp_path: Path, kind: str) -> None:
    torch.save(ODD_PICKLES[kind], tmp_path / "a.ipadpt")
    with pytest.raises(CorruptFileError, match=r"^a\.ipadpt"):
        load_prompt(tmp_path / "a.ipadpt", adapter("base"))


@pytest.mark.parametrize("place", ["embeds", "negative", "neutral"])
@pytest.mark.parametrize("kind", ODD)
def test_odd_numbers_anywhere_in_a_prompt(tmp_path: Path, kind: str, place: str) -> None:
    save_file(
        {"embeds": torch.ones(1, EMBED), "negative": torch.ones(1, EMBED), place: ODD[kind]}, tmp_path / "a.safetensors"
    )
    with pytest.raises(CorruptFileError, match=r"^a\.safetensors"):
        load_prompt(tmp_path / "a.safetensors", adapter("base"))


@pytest.mark.parametrize("place", ["embeds", "negative"])
def test_numbers_that_overflow_in_the_adapter(tmp_path: Path, place: str) -> None:
    tensors = {"embeds": torch.ones(2, EMBED), "negative": torch.ones(1, EMBED)}
    save_file({**tensors, place: torch.full_like(tensors[place], 3e38)}, tmp_path / "a.safetensors")
    with pytest.raises(CorruptFileError, match="NaN or infinite tokens"):
        load_prompt(tmp_path / "a.safetensors", adapter("base"))


@pytest.mark.parametrize("text", ["1" * 5000, "nan", "inf", "1e400", "-1", "20000", "a\nb"])
def test_numbers_in_texts(tmp_path: Path, text: str) -> None:
    save_file({"embeds": torch.ones(1, EMBED)}, tmp_path / "a.safetensors", {"latents": text})
    with pytest.raises(CorruptFileError, match="no number that it can have") as caught:
        load_prompt(tmp_path / "a.safetensors", adapter("base"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300


def test_texts_of_a_file_stay_on_one_line(tmp_path: Path) -> None:
    texts = {"encoder": "x\n" * 1000, "family": "y\x1b" * 1000, "feature": "penultimate"}
    save_file({"embeds": torch.ones(1, EMBED)}, tmp_path / "a.safetensors", texts)
    with pytest.raises(IncompatibleEncoderError) as caught:
        load_prompt(tmp_path / "a.safetensors", adapter("base"))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    save_file({"embeds": torch.ones(1, EMBED)}, tmp_path / "a.safetensors", {"encoder": "x\n" * 1000})
    assert load_prompt(tmp_path / "a.safetensors", adapter("base")).encoder.isprintable()


def test_a_prompt_file_cut_off_while_in_use(tmp_path: Path) -> None:
    path = save_prompt(tmp_path / "a.safetensors", encode("plus"))
    prompt = load_prompt(path, adapter())
    os.truncate(path, 0)
    same(prompt, encode("plus"))


def test_pipes_and_the_like_are_no_prompts(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.ipadpt")
    (tmp_path / "loop.ipadpt").symlink_to(tmp_path / "loop.ipadpt")
    for name in ("a.ipadpt", "loop.ipadpt", "/dev/zero", "nul\0", "x" * 5000, "", "nothing.ipadpt"):
        with pytest.raises((AdapterError, FileNotFoundError)) as caught:
            load_prompt(tmp_path / name, adapter("base"))
        assert str(caught.value).isprintable()


def test_an_interrupted_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_prompt(tmp_path / "a.safetensors", encode("base", 1))
    before = path.read_bytes()

    def full(tensors: object, file: Path, metadata: object) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("ipadapter_core.prompt.embeds.save_file", full)
    with pytest.raises(OSError, match="no space"):
        save_prompt(path, encode("base", 2))
    assert (path.read_bytes(), [file.name for file in tmp_path.iterdir()]) == (before, ["a.safetensors"])
