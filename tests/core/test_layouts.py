"""Every site of every base model; of UNets: checkpoint key, diffusers path, ComfyUI block and transformer index."""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ChromaTransformer2DModel,
    FluxTransformer2DModel,
    SD3ControlNetModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from torch import nn

from ipadapter_core.errors import IncompatibleAdapterError
from ipadapter_core.models import BASE_MODELS, flux, layout_of
from ipadapter_core.models.sites import ModelLayout
from ipadapter_core.models.unet import UNETS, down_up_middle, spatial_transformers
from tiny_anima import ComfyAnima, comfy_anima
from tiny_flux import comfy_chroma, comfy_flux
from tiny_models import SD15, SDXL, TINY, LdmUNet, tiny_unet
from tiny_sd3 import CONFIG as SD3_CONFIG
from tiny_sd3 import comfy_sd3, diffusers_sd3

# The published numbering (reference: tencent-ailab/IP-Adapter's released files, diffusers' and ComfyUI's UNets).
# first key, diffusers block, ComfyUI block and id, channels, transformer index, transformer blocks
SD15_TABLE = [
    (1, "down_blocks.0.attentions.0", "input", 1, 320, 0, 1),
    (3, "down_blocks.0.attentions.1", "input", 2, 320, 1, 1),
    (5, "down_blocks.1.attentions.0", "input", 4, 640, 2, 1),
    (7, "down_blocks.1.attentions.1", "input", 5, 640, 3, 1),
    (9, "down_blocks.2.attentions.0", "input", 7, 1280, 4, 1),
    (11, "down_blocks.2.attentions.1", "input", 8, 1280, 5, 1),
    (31, "mid_block.attentions.0", "middle", 0, 1280, 6, 1),
    (13, "up_blocks.1.attentions.0", "output", 3, 1280, 7, 1),
    (15, "up_blocks.1.attentions.1", "output", 4, 1280, 8, 1),
    (17, "up_blocks.1.attentions.2", "output", 5, 1280, 9, 1),
    (19, "up_blocks.2.attentions.0", "output", 6, 640, 10, 1),
    (21, "up_blocks.2.attentions.1", "output", 7, 640, 11, 1),
    (23, "up_blocks.2.attentions.2", "output", 8, 640, 12, 1),
    (25, "up_blocks.3.attentions.0", "output", 9, 320, 13, 1),
    (27, "up_blocks.3.attentions.1", "output", 10, 320, 14, 1),
    (29, "up_blocks.3.attentions.2", "output", 11, 320, 15, 1),
]
SDXL_TABLE = [
    (1, "down_blocks.1.attentions.0", "input", 4, 640, 0, 2),
    (5, "down_blocks.1.attentions.1", "input", 5, 640, 1, 2),
    (9, "down_blocks.2.attentions.0", "input", 7, 1280, 2, 10),
    (29, "down_blocks.2.attentions.1", "input", 8, 1280, 3, 10),
    (121, "mid_block.attentions.0", "middle", 0, 1280, 4, 10),
    (49, "up_blocks.0.attentions.0", "output", 0, 1280, 5, 10),
    (69, "up_blocks.0.attentions.1", "output", 1, 1280, 6, 10),
    (89, "up_blocks.0.attentions.2", "output", 2, 1280, 7, 10),
    (109, "up_blocks.1.attentions.0", "output", 3, 640, 8, 2),
    (113, "up_blocks.1.attentions.1", "output", 4, 640, 9, 2),
    (117, "up_blocks.1.attentions.2", "output", 5, 640, 10, 2),
]
SD15_CONFIG: dict[str, Any] = {"cross_attention_dim": 768, "attention_head_dim": 8}
SD2_CONFIG: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SDXL_CONFIG: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def layers_of(layout: ModelLayout) -> list[int]:
    """Position of every site's layer in a checkpoint."""
    order = down_up_middle(layout)
    return [order.index(i) for i in range(len(layout.sites))]


def full_size(config: dict[str, Any]) -> UNet2DConditionModel:
    """The real model's shapes without its memory."""
    with torch.device("meta"):
        return UNet2DConditionModel(**config)


UNET_TABLES = {"SD1.5": (SD15_CONFIG, SD15_TABLE), "SD2": (SD2_CONFIG, SD15_TABLE), "SDXL": (SDXL_CONFIG, SDXL_TABLE)}
Row = tuple[str, str, int, int, int, int]
"""Path, group, number, depth, channels and order of a site."""


def unet_rows(table: list[Any]) -> list[Row]:
    return [
        (f"{path}.transformer_blocks.{depth}.attn2", block, number, depth, channels, order)
        for _, path, block, number, channels, order, blocks in table
        for depth in range(blocks)
    ]


# black-forest-labs/flux, util.py: 19 double and 38 single blocks of 24 heads of 128
FLUX_ROWS: list[Row] = [
    *((f"transformer_blocks.{i}.attn", "double", i, 0, 3072, i) for i in range(19)),
    *((f"single_transformer_blocks.{i}.attn", "single", i, 0, 3072, 19 + i) for i in range(38)),
]


# Stability-AI/sd3.5, mmditx.py and the released Large: 38 blocks of 38 heads of 64
SD3_ROWS: list[Row] = [(f"transformer_blocks.{i}.attn", "joint", i, 0, 2432, i) for i in range(38)]
SD35_LARGE = {"num_layers": 38, "num_attention_heads": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
# circlestone-labs' Anima, as ComfyUI detects it from nvidia's Cosmos-Predict2 2B: 28 blocks of 16 heads of 128
ANIMA_ROWS: list[Row] = [(f"blocks.{i}.cross_attn", "block", i, 0, 2048, i) for i in range(28)]


def on_meta(kind: Callable[..., nn.Module], **config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(**config)


GOLDEN: Mapping[str, tuple[Callable[[], nn.Module], int, list[Row]]] = {
    name: (partial(full_size, config), config["cross_attention_dim"], unet_rows(table))
    for name, (config, table) in UNET_TABLES.items()
} | {
    "Flux": (partial(on_meta, FluxTransformer2DModel), 4096, FLUX_ROWS),
    "Chroma": (partial(on_meta, ChromaTransformer2DModel), 4096, FLUX_ROWS),
    "SD3": (partial(on_meta, SD3Transformer2DModel, **SD35_LARGE), 4096, SD3_ROWS),
    "Anima": (partial(on_meta, ComfyAnima, width=2048, heads=16, text=1024, blocks=28), 1024, ANIMA_ROWS),
}
"""By family: the real model in diffusers' form (Anima: in ComfyUI's), the width of its text tokens, and its sites as published."""


@pytest.mark.parametrize("name", [base.name for base in BASE_MODELS if base.walk])
def test_numbering_of_the_real_models(name: str) -> None:
    if name not in GOLDEN:
        pytest.fail(
            f"{name} has a walk and no golden table; write its sites into GOLDEN, from a source other than the walk"
        )
    model, token_dim, rows = GOLDEN[name]
    layout = layout_of(model())
    assert [(s.path, s.group, s.number, s.depth, s.channels, s.order) for s in layout.sites] == rows
    assert (layout.name, layout.token_dim) == (name, token_dim)
    assert layout.orders == len({row[-1] for row in rows})
    assert layout.groups == layout.model.groups


@pytest.mark.parametrize(("name", "sites"), [("SD1.5", 16), ("SD2", 16), ("SDXL", 70)])
def test_key_numbers_of_the_files(name: str, sites: int) -> None:
    config, table = UNET_TABLES[name]
    found = [2 * layer + 1 for layer in layers_of(layout_of(full_size(config)))]
    assert found == [row[0] + 2 * depth for row in table for depth in range(row[-1])]
    assert sorted(found) == list(range(1, 2 * sites, 2))


def test_key_numbers_are_positions_among_diffusers_processors() -> None:
    """The rule behind the numbers: position in unet.attn_processors, which lists down, up, middle."""
    for config in (SD15_CONFIG, SDXL_CONFIG):
        unet = full_size(config)
        positions = {name.removesuffix(".processor"): i for i, name in enumerate(unet.attn_processors)}
        sites = layout_of(unet).sites
        assert [positions[sites[i].path] for i in down_up_middle(layout_of(unet))] == list(range(1, 2 * len(sites), 2))


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (SD15_CONFIG, {320: 8, 640: 8, 1280: 8}),
        (SD2_CONFIG, {320: 5, 640: 10, 1280: 20}),
        (SDXL_CONFIG, {640: 10, 1280: 20}),
    ],
)
def test_heads_and_levels(config: dict[str, Any], heads: dict[int, int]) -> None:
    sites = layout_of(full_size(config)).sites
    assert {site.channels: site.heads for site in sites} == heads
    found = spatial_transformers(full_size(config)) or []
    first_middle = next(at for at in found if at.group == "middle")
    assert first_middle.level == len(config.get("block_out_channels", range(4))) - 1
    assert {(at.group, at.number): at.level for at in found if at.number in (1, 4, 8)} == (
        {("input", 1): 0, ("input", 4): 1, ("input", 8): 2, ("output", 4): 2, ("output", 8): 1}
        if len(sites) == 16
        else {("input", 4): 1, ("input", 8): 2, ("output", 1): 2, ("output", 4): 1}
    )


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_both_walks_find_the_same_sites(kind: str) -> None:
    ours, ldm = layout_of(tiny_unet(kind)), layout_of(LdmUNet(kind))

    def facts(site: Any) -> tuple[object, ...]:
        return site.group, site.number, site.depth, site.order, site.channels, site.heads

    def levels(model: nn.Module) -> list[tuple[object, ...]]:
        return [(at.group, at.number, at.level) for at in spatial_transformers(model) or ()]

    assert levels(LdmUNet(kind)) == levels(tiny_unet(kind)) != []
    assert [facts(s) for s in ldm.sites] == [facts(s) for s in ours.sites]
    assert (ldm.name, ldm.token_dim, ldm.model.roles) == (ours.name, ours.token_dim, ours.model.roles)
    assert len({s.path for s in ldm.sites}) == len(ldm.sites)


@pytest.mark.parametrize("kind", [SD15, SDXL])
def test_paths_lead_to_the_attention(kind: str) -> None:
    for model in (tiny_unet(kind), LdmUNet(kind)):
        for site in layout_of(model).sites:
            attention: Any = model.get_submodule(site.path)
            assert attention.to_k.out_features == site.channels
            assert attention.heads == site.heads


@pytest.mark.parametrize("family", ["Flux", "Chroma"])
def test_both_walks_of_double_and_single_blocks_find_the_same_sites(family: str) -> None:
    walk = {base.name: base.walk for base in BASE_MODELS}[family]
    diffusers, comfy = TINY[walk].diffusers(), TINY[walk].comfy()
    ours, theirs = layout_of(diffusers), layout_of(comfy)
    facts = [(s.group, s.number, s.depth, s.order, s.channels, s.heads) for s in ours.sites]
    assert [(s.group, s.number, s.depth, s.order, s.channels, s.heads) for s in theirs.sites] == facts
    assert facts == [("double", i, 0, i, 32, 2) for i in range(2)] + [("single", i, 0, 2 + i, 32, 2) for i in range(3)]
    assert (ours.name, theirs.name, ours.token_dim, theirs.token_dim) == (family, family, 32, 32)
    for model, layout in ((diffusers, ours), (comfy, theirs)):
        for site in layout.sites:
            attention: Any = model.get_submodule(site.path)
            norm = attention.norm_q if model is diffusers else attention.norm.query_norm
            assert norm.weight.shape == (site.channels // site.heads,)


@pytest.mark.parametrize("lacking", ["vector_in", "txt_in"])
def test_relatives_of_flux_are_no_flux(lacking: str) -> None:
    """FLUX.2, Ovis and LongCat have no pooled text; HunyuanVideo refines the text by a transformer first."""
    model = comfy_flux()
    setattr(model, lacking, None)
    with pytest.raises(IncompatibleAdapterError, match="ComfyFlux, which is of no family"):
        layout_of(model)


def test_chroma_on_pixels_is_no_chroma() -> None:
    model = comfy_chroma()
    del model.img_in  # Chroma Radiance reads patches of pixels
    with pytest.raises(IncompatibleAdapterError, match="ComfyChroma, which is of no family"):
        layout_of(model)


def test_flux_on_foreign_kernels_is_refused_with_what_works() -> None:
    inner = type("NunchakuFluxTransformer2dModel", (nn.Module,), {"__module__": "nunchaku.models.transformers"})
    wrapper = nn.Module()
    wrapper.model = inner()
    for model in (wrapper, wrapper.model):
        with pytest.raises(IncompatibleAdapterError, match=r"nunchaku's kernels.*safetensors"):
            layout_of(model)


@pytest.mark.parametrize("medium", [False, True])
def test_both_walks_of_joint_blocks_find_the_attention_with_the_text(medium: bool) -> None:
    """SD3.5 Medium's second attention, of the picture with itself, is no site."""
    diffusers, comfy = diffusers_sd3(medium=medium), comfy_sd3(medium=medium)
    assert hasattr(diffusers.transformer_blocks[0], "attn2")
    assert (
        (diffusers.transformer_blocks[0].attn2 is not None) == medium == hasattr(comfy.joint_blocks[0].x_block, "attn2")
    )
    ours, theirs = layout_of(diffusers), layout_of(comfy)
    for layout, model, norm in ((ours, diffusers, "norm_q"), (theirs, comfy, "ln_q")):
        facts = [(s.group, s.number, s.depth, s.order, s.channels, s.heads) for s in layout.sites]
        assert facts == [("joint", i, 0, i, 32, 2) for i in range(3)]
        assert (layout.name, layout.token_dim) == ("SD3", 32)
        for site in layout.sites:
            assert getattr(model.get_submodule(site.path), norm).weight.shape == (16,)


def test_relatives_of_sd3_are_no_sd3() -> None:
    """A ControlNet has its blocks and guides another model; one without pooled text is some other family's."""
    sizes = {key: value for key, value in SD3_CONFIG.items() if key != "qk_norm"}
    control = SD3ControlNetModel(**sizes)
    comfy_control = comfy_sd3()
    other: Any = diffusers_sd3()
    del comfy_control.final_layer
    other.time_text_embed.text_embedder = None
    for model in (control, comfy_control, other):
        with pytest.raises(IncompatibleAdapterError, match=f"{type(model).__name__}, which is of no family"):
            layout_of(model)


def test_cosmos_without_the_text_adapter_is_no_anima() -> None:
    model = comfy_anima()
    del model.llm_adapter
    with pytest.raises(IncompatibleAdapterError, match="ComfyAnima, which is of no family"):
        layout_of(model)


def test_labels() -> None:
    def labels(kind: str) -> list[str]:
        layout = layout_of(tiny_unet(kind))
        return [layout.label(site) for site in layout.sites]

    assert labels(SD15)[5:8] == ["input 8", "middle 0", "output 3"]
    assert labels(SDXL)[:3] == ["input 4.0", "input 4.1", "input 5.0"]


def test_an_unusual_unet_is_named_by_its_size() -> None:
    assert layout_of(tiny_unet("one site")).name == "UNet with 1 sites, width 32"


class NotAUNet(nn.Module):
    """A transformer, as Flux or SD3 is one."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList([nn.Linear(2, 2)])


def test_other_models_are_refused_with_their_name() -> None:
    with pytest.raises(IncompatibleAdapterError, match=r"NotAUNet.*SD1\.5"):
        layout_of(NotAUNet())


def test_a_unet_without_cross_attention_is_refused() -> None:
    blocks: dict[str, Any] = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": None,
    }
    with pytest.raises(
        IncompatibleAdapterError, match="UNet2DConditionModel has no attention that an image prompt could steer"
    ):
        layout_of(tiny_unet("one site", **blocks))


def test_a_layout_is_a_value() -> None:
    """Baked keys are looked up by it, and two loads of one model must find the same."""
    a, b = layout_of(tiny_unet(seed=1)), layout_of(tiny_unet(seed=2))
    assert a == b
    assert hash(a) == hash(b)
    assert a != layout_of(tiny_unet(SDXL))


@pytest.mark.parametrize(("kind", "condition", "multiple"), [(SD15, "text", 8), (SDXL, "text and sizes", 4)])
def test_what_the_trainer_asks(kind: str, condition: str, multiple: int) -> None:
    unet = tiny_unet(kind)
    training = layout_of(unet).model.training
    assert training is not None
    assert (training.condition, training.side_multiple(unet)) == (condition, multiple)
    classes = {type(module).__name__ for module in unet.modules()}
    assert {*training.checkpointed, *training.units} <= classes


# --- stated once -----------------------------------------------------------------------------------------------------

ROOMS = Path(__file__).resolve().parents[2] / "ipadapter_core"
WIDTHS = {width for unet in UNETS for width in (unet.text_width, *unet.channels)}
LISTS = (
    "down_blocks", "up_blocks", "mid_block", "input_blocks", "middle_block", "output_blocks",
    "joint_blocks", *(flux.BLOCKS.keys() - {"transformer_blocks"}),
)  # fmt: skip
OTHER_SUBJECTS = {
    "features.py": "widths of image encoders",
    "images/encoder.py": "widths of image encoders",
    "images/towers.py": "widths of image encoders",
    "checkpoints/containers.py": "keys by which a whole model is refused",
    "checkpoints/xlabs.py": "keys of an adapter's layers",
    "lora/extract.py": "keys by which a whole model is read",
}


def facts_of_base_models(source: str) -> list[str]:
    """Widths of base models that choose something, and names of their lists of blocks; prose does not count."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}

    def widths(node: ast.AST) -> set[int]:
        return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and type(n.value) is int} & WIDTHS

    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Compare() if any(widths(side) for side in (node.left, *node.comparators)):
                found.append(f"line {node.lineno} compares with a width")
            case ast.Dict() if any(key is not None and widths(key) for key in node.keys):
                found.append(f"line {node.lineno} is a table by width")
            case ast.Tuple() | ast.List() | ast.Set() if len(widths(node)) > 1 and len(node.elts) < 10:
                found.append(f"line {node.lineno} lists widths")
            case ast.Constant(value=str(text)) if id(node) not in prose and any(name in text for name in LISTS):
                found.append(f"line {node.lineno} names blocks")
            case _:
                pass
    return found


def test_facts_of_base_models_are_stated_in_their_room_alone() -> None:
    files = {path.relative_to(ROOMS).as_posix(): path for path in ROOMS.rglob("*.py")}
    found = {name: facts_of_base_models(path.read_text()) for name, path in files.items() if name[:7] != "models/"}
    assert {name: facts for name, facts in found.items() if facts and name not in OTHER_SUBJECTS} == {}
    assert facts_of_base_models((ROOMS / "models/unet.py").read_text()), "the rule sees nothing"


@pytest.mark.parametrize(
    "source",
    ["{768: 'SD1.5'}", "x = 'a' if width == 2048 else 'b'", "CHANNELS = (320, 640, 1280)", "f'{i}.double_blocks.{j}'"],
)
def test_a_fact_stated_again_is_found(source: str) -> None:
    assert facts_of_base_models(source)
    assert not facts_of_base_models('"""A base model with double_blocks."""\nSIDE = 1024\nlimits(640, 99)')
