"""Pictures on their way into a training: sources, lint, buckets, pairs, order, cache."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dying import dies
from ipadapter_core.errors import AdapterError, CorruptFileError, InvalidInputError
from ipadapter_core.features import CLIP_MEAN, CLIP_STD, PixelSpec
from ipadapter_core.images.files import decode_picture
from ipadapter_core.training import build_cache, parse_config
from ipadapter_core.training import cache as cache_module
from ipadapter_core.training.cache import Cache
from ipadapter_core.training.collection import Sample, collect, hold_out, look
from ipadapter_core.training.config import DataConfig
from ipadapter_core.training.encode import Encoders
from ipadapter_core.training.order import Order
from ipadapter_core.training.pictures import bucket_for, bucket_sizes, cut_target, reference_pixels
from ipadapter_core.training.sources import open_source
from tiny_training import NAMES, picture, save_list, save_model, save_pictures, tiny_config

PIXELS = PixelSpec(28, CLIP_MEAN, CLIP_STD)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def data(path: Path | str, **more: Any) -> DataConfig:
    return parse_config({"data": {"path": str(path), "min_side": 16, "resolution": 32, **more}}, "the test").data


def read_all(config: DataConfig) -> list[tuple[str, str | None, bytes]]:
    source = open_source(config)
    return [(r.name, r.caption, r.content or source.read(r.name)) for r in source]


def png(number: int) -> bytes:
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


def save_shard(path: Path, numbers: range) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in numbers:
            caption = json.dumps({"text": NAMES[number], "subject": "s"}) if number % 2 else NAMES[number]
            for name, content in (
                (f"{number:04d}.png", png(number)),
                (f"{number:04d}.{'json' if number % 2 else 'txt'}", caption.encode()),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


# --- sources ---------------------------------------------------------------------------------------------------------


def test_every_kind_of_source_gives_the_same_pictures_and_captions(tmp_path: Path) -> None:
    expected = {(NAMES[number], png(number)) for number in range(4)}
    listed = save_list(tmp_path / "list")
    (tmp_path / "shards").mkdir()
    save_shard(tmp_path / "shards/0.tar", range(2))
    save_shard(tmp_path / "shards/1.tar", range(2, 4))
    hugging = tmp_path / "hf"
    shutil.copytree(tmp_path / "list", hugging)
    (hugging / "list.json").unlink()
    rows = [json.dumps({"file_name": f"{n}.png", "text": NAMES[n]}) for n in range(4)]
    (hugging / "metadata.jsonl").write_text("\n".join(rows))
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(4):
        picture(number).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(NAMES[number] + "\n")
    brace = f"{tmp_path}/shards/{{0..1}}.tar"
    for path in (folder, listed, tmp_path / "shards", brace, hugging):
        records = read_all(data(path))
        assert {(caption, content) for _, caption, content in records} == expected, path
        assert len({name for name, _, _ in records}) == 4


def test_remote_shards_are_streamed_once(tmp_path: Path) -> None:
    shard = save_shard(tmp_path / "0.tar", range(3))
    config = data(f"pipe:cat {shard}")
    source = open_source(config)
    assert not source.random_access
    assert [(r.caption, r.content) for r in source] == [(NAMES[n], png(n)) for n in range(3)]
    broken = open_source(data(f"pipe:cat {tmp_path}/missing.tar"))
    with pytest.raises(CorruptFileError, match="shards could not be read"):
        list(broken)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "nowhere", r"data.path: .*nowhere.* does not exist"),
        (lambda p: p / "x*.tar", "matches no .tar"),
        (lambda p: p / "{0..3}.tar", "4 shards do not exist"),
        (lambda p: "https://host/list.json", "only webdataset shards"),
        (lambda p: _write(p / "a.json", "[1"), "not valid JSON"),
        (lambda p: _write(p / "a.json", "{}"), "should hold a list"),
        (lambda p: _write(p / "a.json", '[{"text": "a"}]'), "entry 0 of a.json' has no image_file"),
        (lambda p: _write(p / "a.json", '[{"text": "api-key-SECRET"}]'), "^(?!.*SECRET)"),
        (lambda p: _write(p / "a.json", '["api-key-SECRET"]'), r"^'entry 0 of a\.json' is no table(?!.*SECRET)"),
        (
            lambda p: _write(p / "a.json", '[{"image_file": "a.png", "reference_file": 3}]'),
            "reference_file that is no text",
        ),
        (lambda p: _write(p / "a.json", "[" * 200_000), "nested more than"),
        (lambda p: _write(p / "a.jsonl", '{"image_file": "a.png"}\n{'), "line 2 of a.jsonl' is not valid JSON"),
        (lambda p: p / "a\0b", "NUL"),
        (lambda p: p / "{0..99999999999}.tar", "more than 1,000,000 shards"),
        (lambda p: _write(p / "a.tar", "no tar"), "not a readable webdataset shard"),
        (lambda p: "", "data.path is empty"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        open_source(data(make(tmp_path)))


def _write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


# --- lint ------------------------------------------------------------------------------------------------------------


def test_lint_names_counts_and_skips(tmp_path: Path) -> None:
    folder = save_pictures(tmp_path, 4)
    (folder / "broken.png").write_bytes(png(1)[:60])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "again.png").write_bytes((folder / "subject0/0.png").read_bytes())
    picture(9, (300, 12)).save(folder / "strip.png")
    config = data(folder)
    collection = collect(look(open_source(config), config), config, "here")
    found = collection.findings
    assert len(collection.samples) == found.usable == 5
    assert [name.split()[0] for name in found.unreadable] == ["'broken.png'", "'empty.jpg'"]
    assert found.tiny == ["'strip.png' (300x12; data.min_side is 16)"]
    assert found.duplicates == ["'subject0/0.png' (as 'again.png')"]
    assert found.uncaptioned == ["'again.png'"]
    text = found.describe()
    assert "2 unreadable, skipped: 'broken.png' cannot be read" in text
    assert "1 without a caption" in text


def test_a_folder_without_a_usable_picture_is_refused(tmp_path: Path) -> None:
    for name, content in (("", b""), ("a.png", b"nothing")):
        if name:
            (tmp_path / name).write_bytes(content)
        config = data(tmp_path)
        with pytest.raises(InvalidInputError, match=r"holds no usable picture.*check data.path"):
            collect(look(open_source(config), config), config, str(tmp_path))


def test_a_reference_of_its_own(tmp_path: Path) -> None:
    listed = save_list(tmp_path, 2)
    entries = json.loads(listed.read_text())
    picture(7).save(tmp_path / "ref.png")
    entries[0]["reference_file"] = "ref.png"
    entries[1]["reference_file"] = "gone.png"
    listed.write_text(json.dumps(entries))
    config = data(listed)
    collection = collect(look(open_source(config), config), config, "here")
    (sample,) = collection.samples
    assert sample.reference_key not in ("", sample.key)
    assert "gone.png" in collection.findings.unreadable[0]


# --- pixels ----------------------------------------------------------------------------------------------------------


def test_buckets_keep_the_aspect_ratio_and_the_area() -> None:
    sizes = bucket_sizes(data("x", resolution=512, buckets=True))
    assert (512, 512) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert 0.75 * 512**2 <= height * width <= 512**2
        assert (width, height) in sizes
    assert bucket_for((1000, 1000), sizes) == (512, 512)
    tall = bucket_for((1667, 1000), sizes)
    assert tall[0] / tall[1] == pytest.approx(1.667, rel=0.01)
    assert bucket_sizes(data("x", resolution=512)) == [(512, 512)]


def test_targets_are_covered_cropped_and_described() -> None:
    image = Image.new("RGB", (60, 40), "red")
    image.paste("blue", (0, 0, 15, 40))
    pixels, cut = cut_target(image, (32, 32))
    assert pixels.shape == (3, 32, 32)
    assert cut.time_ids() == [40, 60, 0, 8, 32, 32]
    assert pixels[:, 16, 30].tolist() == pytest.approx([1, -1, -1])
    assert pixels[:, 16, 0].tolist() == pytest.approx([-1, -1, 1], abs=0.05), (
        "the crop's left edge lies 8 of 48 pixels in"
    )
    clear = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    assert cut_target(clear, (32, 32))[0].min() == 1, "what is transparent becomes white"


def test_references_are_seen_as_inference_sees_them() -> None:
    from ipadapter_core import preprocess
    from ipadapter_core.generate import to_pillow

    image = picture(3)
    pixels = torch.tensor(list(image.getdata()), dtype=torch.float32).reshape(1, image.height, image.width, 3) / 255
    assert torch.equal(reference_pixels(image, PIXELS, 0.0, "x"), preprocess(pixels, PIXELS)[0])
    views = {reference_pixels(image, PIXELS, 1.0, f"x {v}").sum().item() for v in range(4)}
    assert len(views) == 4
    assert reference_pixels(image, PIXELS, 1.0, "x 1").equal(reference_pixels(image, PIXELS, 1.0, "x 1"))
    assert to_pillow(pixels[0]).size == image.size


def test_upright_and_named() -> None:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(1, (40, 20)).save(out, "JPEG", exif=exif)
    assert decode_picture(out.getvalue(), "a.jpg").size == (20, 40)
    with pytest.raises(CorruptFileError, match=r"b\.jpg' cannot be read as a picture"):
        decode_picture(out.getvalue()[:100], "b.jpg")


# --- order and pairs --------------------------------------------------------------------------------------------------


def _order(tmp_path: Path, batch: int, count: int = 7, **more: Any) -> Order:
    config = data(save_pictures(tmp_path, count), **more)
    return Order(collect(look(open_source(config), config), config, "here"), batch, 3, config)


def test_an_epoch_shows_every_picture_and_the_next_another_order(tmp_path: Path) -> None:
    order = _order(tmp_path, 1)
    epochs = [[order.indices(e * 7 + m)[0].target for m in range(7)] for e in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]
    assert _order(tmp_path, 4).epoch_length == 2


def test_processes_share_a_batch(tmp_path: Path) -> None:
    order = _order(tmp_path, 4)
    for micro in range(5):
        assert order.indices(micro) == order.indices(micro, 0, 2) + order.indices(micro, 1, 2)


def test_batches_hold_one_size(tmp_path: Path) -> None:
    for number in range(9):
        picture(number, ((40, 40), (64, 32), (32, 64))[number % 3]).save(tmp_path / f"{number}.png")
    config = data(tmp_path, resolution=64, buckets=True, bucket_step=16)
    collection = collect(look(open_source(config), config), config, "here")
    sizes = bucket_sizes(config)
    order = Order(collection, 2, 0, config)
    assert len(collection.buckets) == 3
    seen: Counter[int] = Counter()
    for micro in range(order.epoch_length):
        targets = [pick.target for pick in order.indices(micro)]
        seen.update(targets)
        assert len({bucket_for(collection.samples[t].size, sizes) for t in targets}) == 1
    assert set(seen) == set(range(9))


def test_pairs_are_other_pictures_of_the_subject(tmp_path: Path) -> None:
    order = _order(tmp_path, 2, pairs=0.5)
    picks = [pick for micro in range(200) for pick in order.indices(micro)]
    samples = order.collection.samples
    paired = [p for p in picks if p.reference != p.target]
    assert all(samples[p.reference].subject == samples[p.target].subject for p in paired)
    able = [p for p in picks if len(order.collection.subjects[samples[p.target].subject]) > 1]
    assert 0.4 < len(paired) / len(able) < 0.6
    assert all(p.reference == p.target for m in range(50) for p in _order(tmp_path, 2).indices(m))


def test_held_out_pictures_are_not_trained_on(tmp_path: Path) -> None:
    order = _order(tmp_path, 2, 12)
    training, chosen, unseen = hold_out(order.collection, 3, order.data)
    assert unseen
    assert len(chosen) == 3
    assert not {s.key for s in chosen} & {s.key for s in training.samples}
    assert len(training.samples) == 9
    _, chosen, unseen = hold_out(order.collection, 4, order.data)
    assert (len(chosen), unseen) == (4, False)


# --- cache -----------------------------------------------------------------------------------------------------------


def test_the_cache_is_filled_once_and_resumed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = save_pictures(tmp_path / "pictures", 6)
    config = tiny_config(model, pictures, tmp_path / "out", data__cache=str(tmp_path / "cache"), data__encode_batch=2)
    monkeypatch.setattr(cache_module, "SHARD", 2)
    encoded: list[int] = []

    original = Encoders.latents

    def counted(self: Encoders, pixels: Any) -> Any:
        if len(encoded) == fails_at:
            raise KeyboardInterrupt
        encoded.append(len(pixels))
        return original(self, pixels)

    fails_at = 2
    monkeypatch.setattr(Encoders, "latents", counted)
    with pytest.raises(KeyboardInterrupt):
        build_cache(config)
    (folder,) = (tmp_path / "cache").iterdir()
    assert len(list(folder.glob("shard-*.json"))) == 3, "the neutral features and two finished shards"
    (folder / "shard-0-000009.tmp").write_bytes(b"left by a killed run")
    encoded.clear()
    fails_at = -1
    build_cache(config)
    assert sum(encoded) == 2, "only the unfinished pictures are encoded again"
    assert not list(folder.glob("*.tmp"))
    encoded.clear()
    (pictures / "new.txt").write_text("owl")
    picture(20).save(pictures / "new.png")
    capsys.readouterr()
    assert len(build_cache(config).samples) == 7
    assert sum(encoded) == 1
    assert "7 usable pictures" in capsys.readouterr().err
    encoded.clear()
    changed = tiny_config(model, pictures, tmp_path / "out", data__cache=str(tmp_path / "cache"), data__resolution=48)
    build_cache(changed)
    assert sum(encoded) == 7
    assert "was made with other settings, a new one begins (resolution: 32 → 48)" in capsys.readouterr().err


def test_the_cache_keeps_no_facts_that_have_changed(model: Path, tmp_path: Path) -> None:
    """Another subject, another reference, another picture in the reference's file, another smallest side."""
    listed = save_list(tmp_path, 4)
    for number in (7, 8):
        picture(number).save(tmp_path / f"ref{number}.png")

    def samples(min_side: int = 16, **changes: str) -> list[Sample]:
        entries = json.loads(listed.read_text())
        entries[0].update(changes)
        listed.write_text(json.dumps(entries))
        more: dict[str, Any] = {"data__cache": str(tmp_path / "cache"), "data__min_side": min_side}
        return list(build_cache(tiny_config(model, listed, tmp_path / "out", **more)).samples)

    first = samples(subject="a", reference_file="ref7.png")[0]
    assert samples(subject="b")[0].subject == "b"
    second = samples(reference_file="ref8.png")[0]
    assert (second.reference, second.reference_key != first.reference_key) == ("ref8.png", True)
    shutil.copyfile(tmp_path / "ref7.png", tmp_path / "ref8.png")
    assert samples()[0].reference_key == first.reference_key
    Image.new("RGB", (20, 20)).save(tmp_path / json.loads(listed.read_text())[1]["image_file"])
    assert len(samples()) == 4
    assert len(samples(min_side=24)) == 3


@pytest.mark.parametrize("place", ["write_tensors", "written_whole"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_killed_caching_goes_on_to_the_same_cache(model: Path, tmp_path: Path, place: str, count: int) -> None:
    """SIGKILL before a shard, and between a shard and the list that makes it count."""
    pictures = save_pictures(tmp_path / "pictures", 6)

    def fill(name: str) -> dict[str, torch.Tensor]:
        build_cache(
            tiny_config(model, pictures, tmp_path / "out", data__cache=str(tmp_path / name), data__encode_batch=1)
        )
        (settings,) = (tmp_path / name).glob("*/settings.json")
        cache = Cache(tmp_path / name, json.loads(settings.read_text()))
        cache.refresh()
        return {key: cache.read(key) for key in cache._places}

    def killed() -> None:
        original, calls = getattr(cache_module, place), [0]

        def last(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        setattr(cache_module, place, last)
        fill("killed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_module, "SHARD", 2)
        assert dies(killed) == signal.SIGKILL
        whole, resumed = fill("whole"), fill("killed")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_two_runs_do_not_fill_one_cache(model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second waits, and encodes nothing again."""
    pictures = save_pictures(tmp_path / "pictures", 3)
    config = tiny_config(model, pictures, tmp_path / "out", data__cache=str(tmp_path / "cache"))
    original, reading, writing = Encoders.latents, *os.pipe()

    def slow(self: Encoders, pixels: Any) -> Any:
        os.write(writing, b"!")
        time.sleep(2)
        return original(self, pixels)

    first = os.fork()
    if first == 0:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Encoders, "latents", slow)
            build_cache(config)
        os._exit(0)
    os.read(reading, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Encoders, "latents", None)
        build_cache(config)
    assert os.waitpid(first, 0)[1] == 0
    assert "another run fills" in capfd.readouterr().err


def test_shards_of_one_name_are_not_mixed_up(tmp_path: Path) -> None:
    for folder, numbers in (("a", range(2)), ("b", range(2, 4))):
        (tmp_path / folder).mkdir()
        with tarfile.open(tmp_path / folder / "0.tar", "w") as tar:
            for place, number in enumerate(numbers):
                for name, content in ((f"{place}.png", png(number)), (f"{place}.txt", NAMES[number].encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    found = read_all(data(tmp_path / "{a,b}/0.tar"))
    assert [(caption, content) for _, caption, content in found] == [(NAMES[i], png(i)) for i in range(4)]
    assert len({name for name, _, _ in found}) == 4


def test_damaged_and_unwritable_caches_are_named(model: Path, tmp_path: Path) -> None:
    pictures = save_pictures(tmp_path / "pictures", 2)
    config = tiny_config(model, pictures, tmp_path / "out", data__cache=str(tmp_path / "cache"))
    build_cache(config)
    (folder,) = (tmp_path / "cache").iterdir()
    shard = max(folder.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:40])
    cache = Cache(tmp_path / "cache", json.loads((folder / "settings.json").read_text()))
    cache.refresh()
    key = next(iter(json.loads(shard.with_suffix(".json").read_text())))
    with pytest.raises(CorruptFileError, match=r"is damaged .*delete it and its \.json"):
        cache.read(key)
    (tmp_path / "file").write_text("")
    blocked = tiny_config(model, pictures, tmp_path / "out", data__cache=str(tmp_path / "file/cache"))
    with pytest.raises(InvalidInputError, match="cannot be written"):
        build_cache(blocked)
    with pytest.raises(InvalidInputError, match=r"data\.cache is empty"):
        build_cache(tiny_config(model, pictures, tmp_path / "out"))
