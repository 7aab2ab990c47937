"""The attention path's budget, counted with the functions of tests/benchmarks/attention_cost.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from benchmarks.attention_cost import (
    CASES,
    Case,
    comfy_rows,
    cost_of,
    diffusers_rows,
    graph_breaks,
    held_bytes,
    kv_bytes,
    reachable,
    sdxl_plus_file,
)
from ipadapter_core.attention.schedule import SCALINGS, WeightSchedule
from ipadapter_core.backends.comfy import doors as comfy_backend
from ipadapter_core.backends.diffusers import doors as diffusers_backend
from ipadapter_core.bake import bake
from ipadapter_core.checkpoints import describe_adapter
from ipadapter_core.models import layout_of
from tiny_models import SDXL, Guider, call_unet, conditioning, noise, tiny_adapter, tiny_host, tiny_prompt, tiny_unet

BUDGET = 12
"""aten operations per UNet call and site that one adapter may add, views included."""


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.mark.parametrize("rows", [diffusers_rows, comfy_rows], ids=["diffusers", "comfy"])
def test_operations_synchronisations_and_projections(rows: object) -> None:
    counted = list(rows())  # type: ignore[operator]
    assert [row.case for row in counted] == list(CASES)
    assert {row.case.schedule.scaling for row in counted if not row.case.mask} == set(SCALINGS)
    assert {row.case.schedule.scaling for row in counted if row.case.mask} == set(SCALINGS)
    for row in counted:
        name = row.case.name
        assert 3 < row.operations_per_site <= BUDGET, (name, row.operations_per_site)  # fewer would mean nothing ran
        assert row.synchronisations == (1 if row.case.windowed else 0), name
        assert row.layer_calls == 0, f"{name}: keys or values were projected while sampling"
        assert row.products == 0, f"{name}: {row.products} matrix products besides the attention itself"


def test_the_budget_holds_on_sdxl() -> None:
    windowed = Case("window", WeightSchedule(0.7, start_percent=0.1))
    for rows in (diffusers_rows(SDXL, (CASES[0], windowed)), comfy_rows(SDXL, (CASES[0], windowed))):
        constant, windowed_row = rows
        assert constant.sites == windowed_row.sites == 70
        assert constant.operations_per_site <= BUDGET
        assert windowed_row.operations_per_site <= BUDGET
        assert (constant.synchronisations, windowed_row.synchronisations) == (0, 1)


def test_a_split_step_synchronises_once() -> None:
    """Where memory forces one model call per conditioning, the sigma is still read once."""
    model = tiny_host()
    layout = comfy_backend.comfy_layout(model)
    adapter = tiny_adapter(layout)
    patches = [
        bake(adapter, tiny_prompt(adapter, seed=i), layout, WeightSchedule(end_percent=0.9 - i / 10)) for i in range(2)
    ]
    conds: dict[str, list[dict[str, object]] | None] = {
        name: [conditioning(noise(1, 7, layout.token_dim))] for name in ("positive", "negative")
    }
    patched = comfy_backend.apply(comfy_backend.apply(model, patches[0]), patches[1])
    guider = Guider(patched, conds, chunks=1)
    x = noise(1, 4, 8, 8)
    guider(x)
    model.model.calls.clear()
    added = (
        cost_of(lambda: guider(x)).synchronisations
        - cost_of(lambda: Guider(model, conds, chunks=1)(x)).synchronisations
    )
    assert model.model.calls[:2] == [[1], [0]]
    assert added == 1


def test_the_counters_see_what_they_count() -> None:
    layer = nn.Linear(3, 3)
    cost = cost_of(lambda: float(layer(torch.ones(1, 3)).sum().detach()), layer)
    assert (cost.synchronisations, cost.products, cost.layer_calls) == (1, 1, 1)
    assert cost.operations >= 4


def test_torch_compile_breaks_no_graph() -> None:
    assert graph_breaks(applied=True) == graph_breaks(applied=False)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_after_apply_only_keys_and_values_are_held(scaling: str) -> None:
    unet = tiny_unet()
    layout = layout_of(unet)
    adapter = tiny_adapter(layout, "plus")
    prompt = tiny_prompt(adapter)
    patch = bake(adapter, prompt, layout, WeightSchedule(scaling=scaling))  # type: ignore[arg-type]
    assert held_bytes(patch) == kv_bytes(patch, prompt)
    assert reachable(patch)[1] == [patch.held], "the patch keeps the adapter's layers alive"
    assert patch.held is not None
    assert patch.held.bytes == kv_bytes(patch, prompt), "the host's memory manager counts another number"
    with diffusers_backend.apply(unet, patch):
        call_unet(unet, noise(4, 4, 16, 16), noise(4, 7, layout.token_dim))
        call_unet(unet, noise(2, 4, 8, 8), noise(2, 7, layout.token_dim))
    means = sum(2 * site.channels * 4 for site in layout.sites)
    assert held_bytes(patch) <= kv_bytes(patch, prompt) + means, "sampling copied keys or values"


def test_a_chain_of_clones_holds_each_prompt_once() -> None:
    model = tiny_host()
    layout = comfy_backend.comfy_layout(model)
    adapter = tiny_adapter(layout)
    prompts = [tiny_prompt(adapter, seed=i) for i in range(2)]
    patches = [bake(adapter, prompt, layout) for prompt in prompts]
    one = comfy_backend.apply(model, patches[0])
    both = comfy_backend.apply(one.clone(), patches[1]).clone()
    held = held_bytes([list(one.slots.values()), list(both.slots.values())])
    assert held == sum(kv_bytes(patch, prompt) for patch, prompt in zip(patches, prompts, strict=True))


@pytest.fixture
def big_file() -> Iterator[object]:
    with sdxl_plus_file() as path:
        yield path


def test_an_850_mb_file_is_described_without_reading_it(big_file: object) -> None:
    """Counted: the description's tensors have no storage."""
    spec = describe_adapter(big_file)
    assert (spec.family, spec.base_model, spec.num_tokens) == ("plus", "SDXL", 16)
