"""What the old nodes are translated into: settings, files, frames and pictures. Numbers of the old pack itself are in tests/host."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from ipadapter_core.attention.presets import PRESETS
from ipadapter_core.checkpoints import AdapterSpec, format_named
from ipadapter_core.errors import CorruptFileError, InvalidInputError, UnsafeFileError
from ipadapter_core.images.noise import noise_picture
from ipadapter_core.images.tiles import Interpolation, masked_tiles, placed_tiles, prepare_square, region_tiles, sharpen
from ipadapter_core.known_files import KNOWN_FILES, choose_encoder, choose_file, known_file
from ipadapter_core.legacy.frame_weights import Timing, WeightsStrategy
from ipadapter_core.legacy.settings import (
    FIRST_WEIGHT_TYPES,
    SIMPLE_WEIGHT_TYPES,
    WEIGHT_TYPES,
    LegacySettings,
    todays_option,
)
from ipadapter_core.prompt.embeds import SavedEmbeds, combine_embeds, load_embeds, save_embeds

# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_weight_type_is_a_preset() -> None:
    assert set(WEIGHT_TYPES) <= set(PRESETS)
    assert len(WEIGHT_TYPES) == 15


def test_settings_become_a_schedule() -> None:
    plain = LegacySettings(0.7, "style and composition", start_at=0.1, end_at=0.9, weight_composition=0.3).schedule()
    assert (plain.strength, plain.preset, plain.composition_strength) == (0.7, "style and composition", 0.3)
    assert (plain.start_percent, plain.end_percent, plain.latent_strengths) == (0.1, 0.9, ())
    assert LegacySettings([0.2, 0.4]).schedule().strength == 0.2, (
        "a list counts frame by frame only where a batch is unfolded"
    )
    assert LegacySettings([0.2, 0.4], unfold_batch=True).schedule().latent_strengths == (0.2, 0.4)
    assert LegacySettings(style_boost=0.5).schedule().preset == "style transfer precise"
    boosted = LegacySettings(composition_boost=0.5).schedule()
    assert (boosted.preset, boosted.boost) == ("composition precise", 0.5)
    layers = LegacySettings(weight_type="ease in", layer_weights="3:1").schedule()
    assert (layers.preset, layers.layers) == ("linear", ((3, 1.0),))
    assert (
        LegacySettings(weight_type="composition precise", layer_weights="3:1").schedule().preset
        == "composition precise"
    )


@pytest.mark.parametrize("former", ["style transfer (SDXL)", "composition (SDXL)", "style transfer and composition"])
def test_former_names_of_weight_types_mean_todays(former: str) -> None:
    today = {"style transfer (SDXL)": "style transfer", "composition (SDXL)": "composition"}
    expected = LegacySettings(0.7, today.get(former, "style and composition")).schedule()
    assert LegacySettings(0.7, former).schedule() == expected


def test_every_option_that_ever_was_has_a_name_of_today() -> None:
    """Of the widgets whose options we own; tests/host asks the nodes themselves."""
    today = {"weight_type": {*WEIGHT_TYPES, *SIMPLE_WEIGHT_TYPES, *FIRST_WEIGHT_TYPES}}
    today |= {"interpolation": set(get_args(Interpolation)), "timing": set(get_args(Timing))}
    seen = 0
    for kind, facts in OLD_PACK.items():
        for name, entry in facts["inputs"].items():
            if name in today:
                unknown = [o for o in entry["options"] if todays_option(name, o) not in today[name]]
                assert not unknown, (kind, name)
                seen += len(entry["options"])
    assert seen > 200
    assert todays_option("weight_type", ["a list"]) == ["a list"]


# --- calls by other packs ---------------------------------------------------------------------------------------------

OLD_PACK: dict[str, Any] = json.loads((Path(__file__).parent / "old_pack.json").read_text())
"""Of every class type that the old pack ever had: method, parameters with defaults, number of values returned (of those
it has today), every input and option that there was, and the inputs that all its versions have."""
ROOT = Path(__file__).parents[2]


class Source:
    """Classes and functions of some files, read and not run."""

    def __init__(self, *files: Path) -> None:
        trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
        self.classes = {n.name: n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.ClassDef)}
        self.functions = {n.name: n for tree in trees for n in tree.body if isinstance(n, ast.FunctionDef)}

    def member(self, kind: str, name: str) -> Any:
        """A method, or the value of a class attribute, of a class or what it inherits from."""
        node = self.classes[kind]
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == name:
                return part
            if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == name:
                return ast.literal_eval(part.value)
        found = [self.member(b.id, name) for b in node.bases if isinstance(b, ast.Name) and b.id in self.classes]
        return next((part for part in found if part is not None), None)

    def parameters(self, kind: str) -> list[list[Any]]:
        """Names of the node's method in order, with defaults where there are any."""
        args = self.member(kind, self.member(kind, "FUNCTION")).args
        names = [arg.arg for arg in args.args[1:]]
        plain = len(names) - len(args.defaults)
        defaults = [ast.literal_eval(d) for d in args.defaults]
        return [[name] if i < plain else [name, defaults[i - plain]] for i, name in enumerate(names)]

    def returned(self, kind: str, function: str = "") -> set[int]:
        """How many values its method returns, in all places that do."""
        method = self.member(kind, function or self.member(kind, "FUNCTION"))
        return self._counts(kind, method)

    def _counts(self, kind: str, method: ast.FunctionDef) -> set[int]:
        found: set[int] = set()
        for node in ast.walk(method):
            if not isinstance(node, ast.Return) or _inside_another(method, node):
                continue
            match node.value:
                case ast.Tuple(elts=values):
                    found.add(len(values))
                case ast.Call(func=ast.Name(id=name)):
                    found |= self._counts(kind, self.functions[name])
                case ast.Call(func=ast.Attribute(attr=name)):
                    found |= self.returned(kind, name)
                case _:
                    raise AssertionError(ast.unparse(node))
        return found


def _inside_another(method: ast.FunctionDef, node: ast.AST) -> bool:
    inner = [n for n in ast.walk(method) if isinstance(n, ast.FunctionDef) and n is not method]
    return any(part is node for function in inner for part in ast.walk(function))


def registered(file: Path, table: str) -> dict[str, str]:
    """Class types of a pack and the classes that they are."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        value = node.value if isinstance(node, (ast.Assign, ast.AnnAssign)) else None
        if isinstance(value, ast.Dict) and table in ast.unparse(node).split("=")[0]:
            classes = [v.elts[0] if isinstance(v, ast.Tuple) else v for v in value.values]
            return {
                ast.literal_eval(k): ast.unparse(c).split(".")[-1]
                for k, c in zip(value.keys, classes, strict=True)
                if k
            }
    raise AssertionError(table)


LEGACY = ROOT / "nodes" / "legacy"
OURS = Source(*sorted(LEGACY.glob("*.py")))
CLASSES = registered(LEGACY / "__init__.py", "LEGACY_NODES")


@pytest.mark.parametrize("kind", OLD_PACK)
def test_old_nodes_are_called_as_ever(kind: str) -> None:
    """Other packs call them with positions and names, and unpack what they return."""
    facts, ours = OLD_PACK[kind], CLASSES[kind]
    assert OURS.member(ours, "FUNCTION") == facts["function"] or "parameters" not in facts
    assert list(OURS.member(ours, "RETURN_TYPES"))[: len(facts["outputs"])] == facts["outputs"]
    if "parameters" not in facts:  # of before the old pack's rewrite: no pack calls these
        return
    parameters = OURS.parameters(ours)
    assert [p[0] for p in parameters[: len(facts["parameters"])]] == [p[0] for p in facts["parameters"]]
    for mine, theirs in zip(parameters, facts["parameters"], strict=False):
        assert len(theirs) == 1 or mine == theirs
    assert all(len(p) == 2 for p in parameters[len(facts["parameters"]) :]), "what only we have must have a default"
    assert OURS.returned(ours) == {facts["returned"]}


OLD = os.environ.get("IPADAPTER_PLUS_PATH")


@pytest.mark.skipif(not OLD, reason="no old pack at $IPADAPTER_PLUS_PATH")
def test_the_table_of_calls_is_the_old_packs() -> None:
    file = Path(str(OLD)) / "IPAdapterPlus.py"
    theirs, classes = Source(file), registered(file, "NODE_CLASS_MAPPINGS")
    assert set(classes) == {kind for kind, facts in OLD_PACK.items() if "parameters" in facts}
    assert len(classes) == 37
    for kind, name in classes.items():
        facts = OLD_PACK[kind]
        assert theirs.member(name, "FUNCTION") == facts["function"]
        assert list(theirs.member(name, "RETURN_TYPES")) == facts["outputs"]
        assert theirs.parameters(name) == facts["parameters"]
        assert theirs.returned(name) == {facts["returned"]}


# --- files ------------------------------------------------------------------------------------------------------------


def spec(family: str = "plus", base: str = "sd15", encoder: str = "ViT-H/14") -> AdapterSpec:
    width = 2048 if base == "sdxl" else 768
    return AdapterSpec(format_named(family), base, 4, width, 1280, "zero_pixels", encoder, (320,))


def test_a_preset_finds_released_names() -> None:
    for entry in KNOWN_FILES:
        files = [other.release for other in KNOWN_FILES]
        kinds = {o.release: spec(o.family, o.base, o.encoder) for o in KNOWN_FILES}
        assert choose_file(entry, files, kinds.get) == entry.release


def test_content_decides_before_the_name() -> None:
    plus = known_file("PLUS (high strength)", "sd15")
    assert choose_file(plus, ["ip-adapter-plus_sd15.bin"], lambda _: spec("base")) is None, (
        "named plus, but base inside"
    )
    assert choose_file(plus, ["mine.bin"], lambda _: spec()) == "mine.bin"
    assert choose_file(plus, ["mine.bin", "other.bin"], lambda _: spec()) is None, "which of the two is not known"
    face = "ip-adapter-plus-face_sd15.bin"
    assert choose_file(plus, ["mine.bin", face], lambda _: spec()) == "mine.bin"
    assert choose_file(plus, ["mine.bin"], lambda _: spec(base="sdxl")) is None
    assert choose_file(plus, ["model.txt"], lambda _: None) is None
    with pytest.raises(
        InvalidInputError, match=r"no 'LIGHT - SD1.5 only \(low strength\)' adapter for SDXL.*only for SD1.5"
    ):
        known_file("LIGHT - SD1.5 only (low strength)", "sdxl")


def test_the_encoder_is_found_by_name_or_by_its_widths() -> None:
    widths = {"a.safetensors": (1664, 1280), "b.safetensors": (1280, 1024), "model.txt": None}
    assert choose_encoder(spec(), list(widths), widths.get) == "b.safetensors"
    named = {**widths, "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": (1280, 1024)}
    assert choose_encoder(spec(), list(named), named.get) == "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
    assert choose_encoder(spec(encoder="ViT-L/14"), list(widths), widths.get) is None
    siglips = {"siglip2-so400m-patch14-384.safetensors": (1152, 0), "sigclip_vision_patch14_384.safetensors": (1152, 0)}
    chosen = choose_encoder(spec(encoder="SigLIP so400m/14-384"), list(siglips), siglips.get)
    assert chosen == "sigclip_vision_patch14_384.safetensors"


# --- embeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 24), (3, 17, 8)])
def test_embeds_are_written_as_safetensors_that_say_what_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    embeds = torch.rand(shape)
    path = save_embeds(tmp_path / "a.ipadpt.safetensors", SavedEmbeds(embeds))
    assert_close(load_embeds(path).embeds, embeds, rtol=0, atol=0)
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["kind"] == "image embeds"


def test_files_of_other_tools_load(tmp_path: Path) -> None:
    path = tmp_path / "old.ipadpt"
    torch.save(torch.arange(6.0).view(2, 3), path)
    assert load_embeds(path).embeds.tolist() == [[0, 1, 2], [3, 4, 5]]
    pair = torch.rand(2, 1, 17, 8)
    torch.save(pair, path)  # the first version: positive, negative
    loaded = load_embeds(path)
    assert loaded.negative is not None
    assert_close((loaded.embeds, loaded.negative), (pair[0], pair[1]))
    torch.save([torch.cat([torch.zeros(1, 3, 24), torch.ones(1, 3, 24)])], path)  # diffusers: negative first
    loaded = load_embeds(path)
    assert loaded.negative is not None
    assert (loaded.embeds.shape, float(loaded.embeds.min()), float(loaded.negative.max())) == ((3, 24), 1.0, 0.0)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.mkdir, ("/tmp/never-made-by-a-test",)


def test_a_pickle_that_carries_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trap.ipadpt"
    torch.save(Trap(), path)
    with pytest.raises(UnsafeFileError, match="mkdir"):
        load_embeds(path)
    assert not Path("/tmp/never-made-by-a-test").exists()
    torch.save({"a": 1}, path)
    with pytest.raises(CorruptFileError, match="holds a dict; a tensor"):
        load_embeds(path)


def test_embeds_of_two_encoders_cannot_be_joined() -> None:
    with pytest.raises(InvalidInputError, match=r"\(1, 4\), \(1, 6\)"):
        combine_embeds([torch.zeros(1, 4), torch.zeros(1, 6)])


# --- frames -----------------------------------------------------------------------------------------------------------


def test_weights_that_stopped_the_old_pack() -> None:
    assert WeightsStrategy("1, 0", frames=4, start_frame=2, end_frame=3).curve() == [1, 1, 0, 0]  # division by zero
    assert WeightsStrategy("1, 0", frames=4, start_frame=0, end_frame=0).curve() == [0, 0, 0, 0]  # index error
    assert WeightsStrategy("0, 1", "random", frames=5).curve() == WeightsStrategy("0, 1", "random", frames=5).curve()
    with pytest.raises(InvalidInputError, match="at least two"):
        WeightsStrategy("1", method="shift batches").frames_of(torch.zeros(1, 4, 4, 3))
    with pytest.raises(InvalidInputError, match="cannot read"):
        WeightsStrategy("one").curve()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 10**5000}, "whole number of 0..100,000"),
        ({"frames": 10**9}, "frames is '1000000000'; it must be a whole number of 0..100,000"),
        ({"add_starting_frames": -1}, "whole number"),
        ({"frame_count": "many"}, "whole number"),
        ({"end_frame": 1.5}, "whole number"),
        ({"weights": None}, "weights are 'None'"),
        ({"method": "\n" * 10_000}, r"method is '\\n"),
        ({"weights": "1" * 5_000}, "as a number"),
        ({"weights": "1, 1e400"}, "'1e400'"),
        ({"weights": "1," * 100_001}, "100,001 entries"),
        ({"weights": "1" * 2_000_000}, "at most 1,000,000"),
    ],
)
def test_strategies_of_strangers_have_limits(changes: dict[str, object], message: str) -> None:
    values = WeightsStrategy("1, 0").as_mapping() | changes
    with pytest.raises(InvalidInputError, match=message) as caught:
        WeightsStrategy.from_mapping(values).curve()
    assert len(str(caught.value)) < 600


def test_frames_and_prompts_that_would_fill_the_memory_are_refused() -> None:
    picture = torch.zeros(1, 1, 1, 1).expand(2, 4096, 4096, 3)
    with pytest.raises(InvalidInputError, match=r"100,000 frames .* take more than 32 GiB"):
        WeightsStrategy("1, 0", frames=50_000).frames_of(picture)
    strategy = WeightsStrategy("1", frame_count=10_000)
    with pytest.raises(InvalidInputError, match="a prompt has 1,001 characters; at most 1,000"):
        strategy.prompt_schedule("a\n" + "b" * 1_001)
    assert strategy.prompt_schedule("b" * 1_000).count("b") == 10_000_000
    with pytest.raises(InvalidInputError, match="no weights strategy"):
        WeightsStrategy.from_mapping(None)  # type: ignore[arg-type]


def test_weights_of_other_nodes_must_be_numbers() -> None:
    assert LegacySettings((1, 0.5), unfold_batch=True).schedule().latent_strengths == (1.0, 0.5)
    for weight in ("one", ["one"], [None], None, 10**400, 10**5000):
        with pytest.raises(InvalidInputError, match="a number or a list of numbers was expected"):
            LegacySettings(weight).schedule()  # type: ignore[arg-type]


def test_preset_names_are_cut_without_searching() -> None:
    assert known_file("  plus  face (portraits)", "sd15").preset == "PLUS FACE"
    with pytest.raises(InvalidInputError, match="unknown preset") as caught:
        known_file("PLUS" + " " * 100_000 + "x", "sd15")
    assert len(str(caught.value)) < 400


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_noise_comes_from_the_picture_and_leaves_everybodys_random_numbers_alone() -> None:
    image = torch.rand(1, 60, 40, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b = noise_picture("shuffle", 0.5, 3, image), noise_picture("shuffle", 0.5, 3, image)
    assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert_close(a, b, rtol=0, atol=0)
    assert a.shape == (1, 224, 224, 3)
    assert not torch.equal(a, noise_picture("shuffle", 0.5, 3, image * 0.9))


def test_squares_keep_the_part_that_was_asked_for() -> None:
    image = torch.zeros(1, 30, 90, 3)
    image[:, :, :30, 0], image[:, :, 60:, 2] = 1, 1
    assert prepare_square(image, 16, position="left")[..., 0].mean() == 1
    assert prepare_square(image, 16, position="right")[..., 2].mean() == 1
    assert prepare_square(image, 16, position="center").max() == 0
    assert prepare_square(image, 18, position="pad").shape == (1, 18, 18, 3)
    flat = torch.full((1, 3, 8, 8), 0.5)
    assert_close(sharpen(flat, 1.0)[..., 1:-1, 1:-1], flat[..., 1:-1, 1:-1])


@pytest.mark.parametrize("shape", [(100, 100), (100, 130), (60, 200), (300, 50), (64, 900)])
def test_tiles_cover_the_region(shape: tuple[int, int]) -> None:
    tiles, masks = region_tiles(torch.rand(2, *shape, 3))
    assert all(tile.shape == (2, 256, 256, 3) for tile in tiles)
    assert len(tiles) == len(masks) <= 4
    covered = torch.stack(masks).amax(0)
    assert_close(covered, torch.ones_like(covered), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (200, 40), (60, 80), (41, 47)])
def test_placed_tiles_share_the_picture(shape: tuple[int, int]) -> None:
    """Each shows its own place, all together everything, and nothing counts twice."""
    y, x = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    places = torch.stack([y, x, x * 0], -1)[None] / 255
    tiles, regions = placed_tiles(places)
    side = {(40, 40): 20, (41, 47): 20}.get(shape, min(shape))
    assert {tuple(tile.shape) for tile in tiles} == {(1, side, side, 3)}
    assert_close(torch.cat(regions).sum(0), torch.ones(shape))
    for tile, region in zip(tiles, regions, strict=True):
        top, left = (round(float(tile[0, 0, 0, i]) * 255) for i in range(2))
        margin = max(shape) // 10 + 1  # what is cut off counts as the last square's
        inside = region[0, max(top - margin, 0) : top + side + margin, max(left - margin, 0) : left + side + margin]
        assert_close(inside.sum(), region.sum())
        assert region.max() <= 1
    half = torch.zeros(1, 10, 10)
    half[:, :5] = 0.5
    masked = torch.cat(placed_tiles(places, half)[1]).sum(0)
    assert masked[0].mean() == pytest.approx(0.5, abs=1e-3)
    assert masked[-1].max() == 0
    with pytest.raises(InvalidInputError, match="1000x10 cannot be cut"):
        placed_tiles(torch.zeros(1, 10, 1000, 3))


def test_tiles_of_the_first_version_begin_with_the_whole_picture() -> None:
    parts, regions = masked_tiles(torch.rand(1, 224, 224, 3), 2, 0.6)
    assert len(parts) == len(regions) == 5
    assert float(regions[0].min()) > 0.99
    assert [float(region.max()) for region in regions[1:]] == pytest.approx([0.6] * 4)
