"""LoRAs in regions of transformers, next to models whose layers blend the outputs of unmerged and merged weights token by token."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import tiny_families
from benchmarks.attention_cost import Cost, cost_of
from by_hand import Sequences, by_hand, in_front, of_a_video, text_apart
from ipadapter_core import WeightSchedule, Window, bake
from ipadapter_core.attention.call import COND, UNCOND, ModelCall
from ipadapter_core.backends.comfy import doors as comfy_prompts
from ipadapter_core.backends.comfy import lora as comfy
from ipadapter_core.backends.diffusers import doors as diffusers_prompts
from ipadapter_core.backends.diffusers import lora as diffusers
from ipadapter_core.checkpoints.format import Format
from ipadapter_core.errors import IncompatibleAdapterError, InvalidInputError
from ipadapter_core.lora import running, targets_of
from ipadapter_core.lora.patch import LoRAPatch, masked
from ipadapter_core.lora.running import Running
from ipadapter_core.lora.selector import parse_selector
from ipadapter_core.lora.unfused import UnfusedStack
from ipadapter_core.models import layout_of
from ipadapter_core.models.anima import walk_anima
from ipadapter_core.models.chroma import walk_chroma
from ipadapter_core.models.flux import walk_flux
from ipadapter_core.models.sd3 import walk_sd3
from ipadapter_core.models.sites import Walk
from tiny_loras import tiny_lora
from tiny_models import (
    TINY,
    TOKEN_DIM,
    AtEverySite,
    FakePatcher,
    Guider,
    HostModel,
    conditioning,
    noise,
    tiny_adapter,
    tiny_prompt,
)
from tiny_pipelines import chroma_pipeline, flux_pipeline, sd3_pipeline

TEXT = 7
PROMPT = noise(2, TEXT, TOKEN_DIM, seed=10)
Run = Callable[..., Tensor]
BESIDE_TEXT: Sequences = partial(text_apart, text=TEXT)
# --- models of diffusers, called as pipelines do -----------------------------------------------------------------------


def packed(x: Tensor) -> Tensor:
    return F.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def unpacked(out: Tensor, x: Tensor) -> Tensor:
    return F.pixel_shuffle(out.transpose(1, 2).unflatten(2, (x.shape[-2] // 2, x.shape[-1] // 2)), 2)


def call_flux2(model: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    rows, columns = x.shape[-2] // 2, x.shape[-1] // 2
    ids = torch.zeros(rows, columns, 4)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)
    time = (timestep / 1000).expand(len(x))
    places = {"img_ids": ids.flatten(0, 1), "txt_ids": torch.zeros(text.shape[1], 4)}
    out = model(packed(x), text, time, guidance=torch.full((len(x),), 3.5), return_dict=False, **places)[0]
    return unpacked(out, x)


def call_qwen_image(model: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    shapes = [[(1, x.shape[-2] // 2, x.shape[-1] // 2)]] * len(x)
    time = (timestep / 1000).expand(len(x))
    given = {"hidden_states": packed(x), "encoder_hidden_states": text, "timestep": time, "img_shapes": shapes}
    if "txt_seq_lens" in inspect.signature(model.forward).parameters:  # until diffusers 0.37
        given["txt_seq_lens"] = [text.shape[1]] * len(x)
    return unpacked(model(**given, return_dict=False)[0], x)


def call_zimage(model: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    time = 1 - (timestep / 1000).expand(len(x))
    return torch.stack(model(list(x[:, :, None]), time, list(text), return_dict=False)[0])[:, :, 0]


def call_wan(model: Any, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
    given = {"hidden_states": x, "encoder_hidden_states": text, "timestep": timestep.expand(len(x))}
    return model(**given, encoder_hidden_states_image=noise(1, 3, 8, seed=2).expand(len(x), -1, -1), return_dict=False)[
        0
    ]


# --- all models ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """A base model in one host: how it is built and called, and how LoRAs get onto it.

    Latents have a height and width that tokens of 2 by 2 do not divide where the host allows it: 6 rows of 5, the last ones of
    half the size. No two counts of tokens are equal.
    """

    host: str
    build: Callable[[], nn.Module]
    call: Callable[..., Tensor] | None = None
    walk: Walk | None = None
    shape: tuple[int, ...] = (4,)
    """Of latents, in front of height and width."""
    words: tuple[int, int] = (TEXT, TOKEN_DIM)
    """Of texts: how many, and how wide."""
    sequences: Sequences = BESIDE_TEXT

    @property
    def size(self) -> tuple[int, int]:
        return (11, 9) if self.host == "comfy" else (12, 10)

    @property
    def x(self) -> Tensor:
        return noise(2, *self.shape, *self.size, seed=3)

    @property
    def text(self) -> Tensor:
        return noise(2, *self.words, seed=10)

    @property
    def left(self) -> Tensor:
        mask = torch.zeros(self.size)
        mask[:, :5] = 1
        mask[3:5, 4:7] = 0.25
        return mask

    @property
    def columns(self) -> Tensor:
        """The first two columns of tokens."""
        mask = torch.zeros(self.size)
        mask[:, :4] = 1
        return mask

    def placed(self, model: Any, where: str = "", algorithm: str = "LoRA", *, seed: int = 0, **settings: Any) -> LoRAPatch:  # fmt: skip
        weights = tiny_lora(model, where, algorithm, seed=seed)
        if self.host == "diffusers":
            return replace(diffusers.place(model, weights), **settings)
        return LoRAPatch(comfy.place(weights, FakePatcher(HostModel(model))), **settings)

    @contextmanager
    def applied(self, model: Any, *patches: LoRAPatch, prompts: Sequence[Any] = ()) -> Generator[Run]:
        """LoRAs and image prompts on a model, and a call of it: latents, a text for each, in ComfyUI an area, and how it samples."""
        if self.host == "diffusers":
            assert self.call is not None
            call, x, text = self.call, self.x, self.text

            def run(x: Tensor = x, text: Tensor = text, timestep: float = 500.0) -> Tensor:
                with torch.no_grad():
                    return call(model, x, torch.tensor(timestep), text)

            with ExitStack() as stack:
                if prompts:
                    stack.enter_context(diffusers_prompts.apply(model, *prompts))
                if patches:
                    stack.enter_context(diffusers.apply(model, *patches))
                yield run
            return
        host: Any = FakePatcher(HostModel(model))
        for patch in patches:
            host = comfy.apply_unfused(host, patch)
        for prompt in prompts:
            host = comfy_prompts.apply(host, prompt)

        def sample(x: Tensor = self.x, text: Tensor = PROMPT, area: Any = None) -> Tensor:
            entries = [conditioning(text[:1], area)]
            return Guider(host, {"positive": entries}, ("positive",))(x, 0.5)["positive"]

        yield sample

    def run(self, model: Any, *patches: LoRAPatch, prompts: Sequence[Any] = (), **given: Any) -> Tensor:
        with self.applied(model, *patches, prompts=prompts) as call:
            return call(**given)


def forms() -> dict[str, Form]:
    found: dict[str, Form] = {}
    for walk in (walk_flux, walk_chroma, walk_sd3, walk_anima):
        tiny, name = TINY[walk], walk.__name__.removeprefix("walk_")
        found[f"{name}, comfy"] = Form("comfy", tiny.comfy, walk=walk)
        if tiny.call is not None:
            found[f"{name}, diffusers"] = Form("diffusers", tiny.diffusers, tiny.call, walk)

    def newer(tiny: tiny_families.Tiny, call: Callable[..., Tensor], **more: Any) -> Form:
        def build() -> nn.Module:
            model: Any = tiny.model(tiny.original()).requires_grad_(False)
            if tiny is tiny_families.ZIMAGE:
                model.rope_embedder.axes_lens = [128, 64, 64]  # for longer texts
            return model

        return Form("diffusers", build, call, **more)

    found["flux2, diffusers"] = newer(tiny_families.FLUX2, call_flux2, shape=(2,), words=(TEXT, 12))
    found["qwen_image, diffusers"] = newer(tiny_families.QWEN_IMAGE, call_qwen_image, shape=(2,), words=(TEXT, 12))
    found["zimage, diffusers"] = newer(
        tiny_families.ZIMAGE, call_zimage, words=(40, 16), sequences=partial(in_front, filled=2, text=64)
    )
    found["wan, diffusers"] = newer(
        tiny_families.WAN, call_wan, shape=(4, 2), words=(TEXT, 8), sequences=partial(of_a_video, moments=2)
    )
    return found


FORMS = forms()
WALKED = {name: form for name, form in FORMS.items() if form.walk}


@pytest.fixture(params=FORMS, scope="module")
def form(request: pytest.FixtureRequest) -> Form:
    torch.set_num_threads(1)
    return FORMS[request.param]


@pytest.fixture(scope="module")
def model(form: Form) -> nn.Module:
    return form.build()


# --- by hand ---------------------------------------------------------------------------------------------------------


def assert_near(ours: Tensor, expected: Tensor) -> None:
    """Equal but for the order of sums."""
    assert_close(ours, expected, rtol=0, atol=1e-5 * max(1.0, float(expected.abs().max())))


def halves(form: Form, model: nn.Module, *algorithms: str) -> list[LoRAPatch]:
    """LoRAs on every layer, in the two halves of the picture."""
    return [
        masked(form.placed(model, "", algorithm, seed=i, strength=(0.7, -0.5)[i]), (form.left, 1 - form.left)[i])
        for i, algorithm in enumerate(algorithms)
    ]


def last_of(model: nn.Module) -> str:
    """The layer that gives the prediction."""
    names = ("final_layer", "proj_out", "all_final_layer.2-1.linear")
    return next(path for path in names if path in targets_of(model).targets)


def only(patch: LoRAPatch, *paths: str) -> LoRAPatch:
    """A LoRA on some layers alone."""
    matches = tuple(m for m in patch.matched.matches if m.target.path in paths)
    return replace(patch, matched=replace(patch.matched, matches=matches))


@pytest.mark.parametrize("algorithms", [("LoRA", "LoRA"), ("DoRA out", "LoKr")], ids=" and ".join)
def test_two_halves_are_the_blend_by_hand(form: Form, model: nn.Module, algorithms: tuple[str, ...]) -> None:
    patches = halves(form, model, *algorithms)
    ours, plain = form.run(model, *patches), form.run(model)
    with by_hand(model, patches, form.sequences):
        assert_near(ours, form.run(model))
    assert (ours - plain).abs().max() > 0.05


def test_ones_are_no_mask_zeros_no_lora_and_two_halves_the_whole(form: Form, model: nn.Module) -> None:
    patch, left = form.placed(model, strength=0.8), form.left
    plain, whole = form.run(model), form.run(model, patch)
    assert_near(form.run(model, masked(patch, torch.ones(4, 4))), whole)
    assert torch.equal(form.run(model, masked(patch, torch.zeros(4, 4))), plain)
    assert_near(form.run(model, masked(patch, left), masked(patch, 1 - left)), whole)


def test_outside_of_a_region_the_last_layer_gives_what_it_gave(form: Form, model: nn.Module) -> None:
    """Bit for bit; inside it gives what it gives without a mask."""
    patch = only(form.placed(model), last_of(model))
    plain, whole, ours = form.run(model), form.run(model, patch), form.run(model, masked(patch, form.columns))
    assert torch.equal(ours[..., 4:], plain[..., 4:])
    assert_close(ours[..., :4], whole[..., :4], rtol=0, atol=1e-6)
    assert (ours - plain).abs().max() > 0.01


def test_every_layer_s_stream_is_known(model: nn.Module) -> None:
    unknown = [target.path for target in targets_of(model).targets.values() if target.stream is None]
    assert unknown == []


def test_latents_with_a_mask_each(form: Form, model: nn.Module) -> None:
    patch, masks = form.placed(model, strength=0.8), (form.left, 1 - form.left)
    if "cap_embedder.1" in targets_of(model).targets:  # reads all texts in a row, which take the mean of their shares
        patch = replace(patch, selector=parse_selector("*cap_embedder*: 0"))
    with form.applied(model, masked(patch, torch.stack(masks))) as call:
        both = call()
    for i, mask in enumerate(masks):
        text = form.text[:1] if form.host == "comfy" else form.text[i : i + 1]
        alone = form.run(model, masked(patch, mask), x=form.x[i : i + 1], text=text)
        assert_near(both[i : i + 1], alone)


def test_regions_cost_no_pass_no_wait_and_no_product(form: Form, model: nn.Module) -> None:
    """Of every LoRA its columns are multiplied by its strength and its region, and all are joined again."""
    found, left = [form.placed(model, seed=i) for i in range(4)], form.left
    passes, ran = list[int](), list[int]()
    handles = [model.register_forward_pre_hook(lambda *_: passes.append(1))]
    for match in found[0].matched.matches:
        handles.append(model.get_submodule(match.target.path).register_forward_hook(lambda *_: ran.append(1)))

    def cost(*patches: LoRAPatch) -> Cost:
        with form.applied(model, *patches) as call:
            call()
            return cost_of(call)

    try:
        whole, one = cost(found[0]), cost(masked(found[0], left))
        four = cost(*(masked(p, (left, 1 - left)[i % 2]) for i, p in enumerate(found)))
    finally:
        for handle in handles:
            handle.remove()
    assert len(passes) == 6
    layers = len(ran) // len(passes)
    assert whole.synchronisations == one.synchronisations == four.synchronisations
    if any(m.target.stream.sees == "prompt" for m in found[0].matched.matches if m.target.stream):
        return  # an attention more for each, with the text that its LoRA made
    assert whole.products == one.products == four.products
    assert one.operations - whole.operations <= 4 * layers
    assert four.operations - one.operations <= 3 * 3 * layers


def test_regions_are_made_once(form: Form, model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = running.token_rows

    def counting(*args: Any, **more: Any) -> Tensor:
        made.append(1)
        return make(*args, **more)

    monkeypatch.setattr(running, "token_rows", counting)
    patch = masked(form.placed(model), form.left)
    form.run(model, patch)
    kinds = len(made)
    assert 0 < kinds <= 8
    form.run(model, replace(patch, strength=0.3))
    assert len(made) == kinds


def test_a_layer_with_fewer_tokens_says_so(form: Form, model: nn.Module) -> None:
    last = last_of(model)
    handle = model.get_submodule(last).register_forward_pre_hook(lambda _, args: (args[0].flatten(1, -2)[:, :4],))
    try:
        with pytest.raises(InvalidInputError, match=r"does not fit a layer with 4 tokens.*token merging"):
            form.run(model, masked(only(form.placed(model), last), form.left))
    finally:
        handle.remove()


@pytest.mark.parametrize("name", [name for name, form in FORMS.items() if form.host == "diffusers"])
def test_a_window_opens_at_the_noise_that_the_model_is_told(name: str) -> None:
    """Models are told the noise, a share of it or, as Z-Image, what of it is gone."""
    form = FORMS[name]
    model = form.build()
    patch = masked(form.placed(model), form.left)
    early = replace(patch, window=Window(0.0, 0.3))
    assert torch.equal(form.run(model, early, timestep=800.0), form.run(model, patch, timestep=800.0))
    assert torch.equal(form.run(model, early, timestep=600.0), form.run(model, timestep=600.0))


def test_texts_in_a_row_have_one_strength() -> None:
    form = FORMS["zimage, diffusers"]
    model = form.build()
    patch = replace(masked(form.placed(model), form.left), uncond_strength=0.1)

    def run(patch: LoRAPatch) -> Tensor:
        with diffusers.apply(model, patch, branches=("cond", "uncond")), torch.no_grad():
            return call_zimage(model, form.x, torch.tensor(500.0), form.text)

    with pytest.raises(InvalidInputError, match=r"cap_embedder.1 reads the texts of all latents in one row.*selector"):
        run(patch)
    chosen = replace(patch, selector=parse_selector("*cap_embedder*: 0"))
    assert_near(run(chosen)[1:], form.run(model, chosen.with_strength(0.1), x=form.x[1:], text=form.text[1:]))


PROMPTS = [(name, TINY[form.walk].format) for name, form in WALKED.items()]


@pytest.mark.parametrize(("name", "family"), [*PROMPTS, ("anima, comfy", AtEverySite())], ids=str)
def test_regions_beside_an_image_prompt(name: str, family: Format) -> None:
    """A LoRA in no region is the prompt alone; in two halves it is the unmasked one, prompt included."""
    form = WALKED[name]
    model = form.build()
    layout = layout_of(model)
    sizes: dict[str, Any] = {"channels": tuple(layout.sites[i].channels for i in family.reach.sites(layout))}
    adapter = tiny_adapter(layout, **sizes)
    adapter = replace(adapter, spec=replace(adapter.spec, format=family))
    prompt = bake(adapter, tiny_prompt(adapter), layout, WeightSchedule(0.7), form.columns)
    patch, left = form.placed(model), form.left
    alone, whole = form.run(model, prompts=[prompt]), form.run(model, patch, prompts=[prompt])
    assert torch.equal(form.run(model, masked(patch, torch.zeros(4, 4)), prompts=[prompt]), alone)
    two = form.run(model, masked(patch, left), masked(patch, 1 - left), prompts=[prompt])
    assert_near(two, whole)
    merged = copy.deepcopy(model)
    for match, factor in patch.acting("denoiser"):
        weight: Tensor = merged.get_submodule(match.target.path).get_parameter(match.parameter)
        pristine = weight.clone()
        match.change(pristine, weight, factor)
    assert_near(form.run(merged, prompts=[prompt]), whole)
    assert (whole - alone).abs().max() > 0.05
    assert (alone - form.run(model)).abs().max() > 1e-3


# --- in ComfyUI ------------------------------------------------------------------------------------------------------

COMFY = {name: form for name, form in FORMS.items() if form.host == "comfy"}


@pytest.fixture(params=COMFY, scope="module")
def in_comfy(request: pytest.FixtureRequest) -> tuple[Form, nn.Module]:
    torch.set_num_threads(1)
    return COMFY[request.param], COMFY[request.param].build()


@pytest.mark.parametrize("chunks", [8, 1], ids=["one batch", "passes apart"])
def test_the_negative_prompt_s_strength(in_comfy: tuple[Form, nn.Module], chunks: int) -> None:
    form, model = in_comfy
    texts = {"positive": PROMPT[:1], "negative": PROMPT[1:]}

    def run(*patches: LoRAPatch) -> Mapping[str, Tensor]:
        host: Any = FakePatcher(HostModel(model))
        for patch in patches:
            host = comfy.apply_unfused(host, patch)
        conds: Any = {name: [conditioning(text)] for name, text in texts.items()}
        return Guider(host, conds, chunks=chunks)(form.x, 0.5)

    left = masked(form.placed(model, strength=0.8), form.left)
    right = masked(form.placed(model, seed=1, strength=0.8), 1 - form.left)
    both = run(replace(left, uncond_strength=0.0), replace(right, uncond_strength=-0.3))
    assert_near(both["positive"], run(left, right)["positive"])
    assert_near(both["negative"], run(right.with_strength(-0.3))["negative"])


def test_a_window_over_the_steps(in_comfy: tuple[Form, nn.Module]) -> None:
    form, model = in_comfy
    patch = masked(form.placed(model), form.left)
    assert_close(form.run(model, replace(patch, window=Window(0.6, 1.0))), form.run(model), rtol=0, atol=0)
    curve = Window(0.0, 1.0, ((0.0, 0.0), (1.0, 1.0)))
    assert_close(form.run(model, replace(patch, window=curve)), form.run(model, patch.with_strength(0.5)), rtol=0, atol=1e-3)  # fmt: skip


def test_an_area_takes_its_part_of_the_mask(in_comfy: tuple[Form, nn.Module]) -> None:
    form, model = in_comfy
    patch = form.placed(model)
    inside = form.run(model, masked(patch, form.left), area=(6, 4, 4, 4))[..., 4:10, 4:8]
    alone = form.run(model, masked(patch, form.left[4:10, 4:8]), x=form.x[..., 4:10, 4:8])
    assert_near(inside, alone)


def test_windows_of_an_animation_see_their_own_masks(in_comfy: tuple[Form, nn.Module]) -> None:
    form, model = in_comfy
    patch = form.placed(model)
    masks = torch.stack([form.left * i / 4 for i in range(5)])
    host: Any = comfy.apply_unfused(FakePatcher(HostModel(model)), masked(patch, masks))
    host.model_options["transformer_options"]["ad_params"] = {"sub_idxs": [3, 1], "full_length": 5}
    ours = Guider(host, {"positive": [conditioning(PROMPT[:1])]}, ("positive",))(form.x, 0.5)["positive"]
    assert_near(ours, form.run(model, masked(patch, masks[[3, 1]])))


def test_reference_pictures_take_the_share() -> None:
    form = FORMS["flux, comfy"]
    model: Any = form.build()
    model.reference = noise(1, 4, 8, 6, seed=5)
    patches = halves(form, model, "LoRA", "LoRA")
    ours = form.run(model, *patches)
    with by_hand(model, patches, partial(text_apart, text=TEXT, others=12)):
        assert_near(ours, form.run(model))


def test_texts_are_measured_in_every_call() -> None:
    form = FORMS["flux, comfy"]
    model = form.build()
    patches = halves(form, model, "LoRA", "LoRA")
    for length in (TEXT, 4, 12):
        text = noise(1, length, TOKEN_DIM, seed=length)
        ours = form.run(model, *patches, text=text)
        with by_hand(model, patches, partial(text_apart, text=length)):
            assert_near(ours, form.run(model, text=text))


def test_a_video_s_moments_have_the_same_mask() -> None:
    form = FORMS["anima, comfy"]
    model = form.build()
    video = noise(1, 4, 3, *form.size, seed=8)
    patch = form.placed(model, strength=0.8)
    whole = form.run(model, patch, x=video)
    assert_near(form.run(model, masked(patch, form.left), masked(patch, 1 - form.left), x=video), whole)
    last = only(patch, "blocks.2.mlp.2")
    plain, ours = form.run(model, x=video), form.run(model, masked(last, form.columns), x=video)
    assert torch.equal(ours[..., 4:], plain[..., 4:])
    assert ((ours - plain)[..., :4].abs().amax((0, 1, 3, 4)) > 0.01).all()


def test_modulations_that_come_twice_have_every_chunk_s_strength_twice() -> None:
    """Hosts run modulations for the picture and, at timestep 0, for reference pictures in one batch."""
    form, layer = FORMS["flux, comfy"], "double_blocks.0.img_mod"
    model = form.build()
    module = model.get_submodule(layer)
    patch = masked(only(form.placed(model), layer), torch.stack([form.left, 1 - form.left]))
    patch = replace(patch, uncond_strength=-0.5)
    (unfused,) = UnfusedStack([patch]).layers.values()
    call = ModelCall((UNCOND, COND), latent=form.size, batch=4)
    vec = noise(8, 32, seed=2)
    ours = unfused.add(module, vec, module(vec), Running((patch,), model=call))
    for half in (slice(0, 4), slice(4, 8)):
        assert_close(ours[half], unfused.add(module, vec[half], module(vec[half]), Running((patch,), model=call)))


def test_a_layer_of_which_nothing_is_known_is_named() -> None:
    form = FORMS["flux, comfy"]
    model = form.build()
    model.add_module("new_layer", nn.Linear(4, 4))
    patch = form.placed(model)
    form.run(model, patch)
    with pytest.raises(IncompatibleAdapterError, match=r"new_layer, of which this pack does not know .* selector"):
        form.run(model, masked(patch, form.left))
    form.run(model, masked(replace(patch, selector=parse_selector("*new_layer: 0")), form.left))


# --- compiled, and in pipelines --------------------------------------------------------------------------------------


def test_compiled_models_predict_the_same() -> None:
    """Few layers, as code breaks at each; the text's length is measured in compiled code too."""
    form = FORMS["flux, comfy"]
    model = form.build()
    layers = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear1")
    patches = [only(patch, *layers) for patch in halves(form, model, "LoRA", "LoRA")]
    plain, expected = form.run(model), form.run(model, *patches)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="aot_eager", dynamic=False)
    try:
        for _ in range(2):
            assert_near(form.run(compiled), plain)
            assert_near(form.run(compiled, *patches), expected)
    finally:
        torch.compiler.reset()


@pytest.mark.parametrize("build", [flux_pipeline, sd3_pipeline, chroma_pipeline])
def test_pipelines_tell_the_latent_s_size(build: Callable[[], Any]) -> None:
    pipeline = build()
    pipeline.set_progress_bar_config(disable=True)
    form = FORMS["flux, diffusers"]
    patch = form.placed(pipeline.transformer, strength=0.8)
    left = torch.zeros(12, 20)
    left[:, :7] = 1

    def picture(*patches: LoRAPatch) -> Tensor:
        with ExitStack() as stack:
            if patches:
                stack.enter_context(diffusers.apply(pipeline, *patches))
            return pipeline(
                "a red circle", height=24, width=40, num_inference_steps=2, output_type="latent", generator=torch.Generator().manual_seed(0)
            ).images  # fmt: skip

    plain, whole = picture(), picture(patch)
    assert_near(picture(masked(patch, left), masked(patch, 1 - left)), whole)
    assert torch.equal(picture(masked(patch, torch.zeros(4, 4))), plain)
    assert not torch.equal(picture(masked(patch, left)), whole)
