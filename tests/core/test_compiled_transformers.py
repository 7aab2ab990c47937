"""SD3 and Anima compiled: what acts at a site by its query alone is in the code; the rest runs beside it and is right."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from ipadapter_core import WeightSchedule, bake
from ipadapter_core.backends.comfy import doors
from ipadapter_core.backends.comfy.recording import Recording, record
from ipadapter_core.checkpoints.format import Format
from tiny_anima import comfy_anima
from tiny_models import (
    AtEverySite,
    FakePatcher,
    GatedBehindBlocks,
    Guider,
    HostModel,
    TimedWithOwnKeys,
    conditioning,
    noise,
    tiny_adapter,
    tiny_prompt,
)
from tiny_sd3 import comfy_sd3
from torch_versions import WHOLE_GRAPHS

CASES: dict[str, tuple[Any, Format, bool]] = {
    "SD3, own keys": (comfy_sd3, TimedWithOwnKeys(), False),
    "SD3, the query": (comfy_sd3, AtEverySite(), True),
    "Anima, a gate": (comfy_anima, GatedBehindBlocks(), False),
    "Anima, the query": (comfy_anima, AtEverySite(), True),
}
"""The model, the adapters' family, and whether it is one graph."""


@pytest.fixture
def counted() -> Iterator[Mapping[str, Any]]:
    """What torch.compile did, from a fresh start."""
    import torch._dynamo.config as config
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    config.skip_nnmodule_hook_guards = True  # as torch starts
    yield counters
    torch.compiler.reset()


@pytest.mark.parametrize("case", CASES)
def test_compiled_models_predict_the_same(case: str, counted: Any) -> None:
    build, form, whole = CASES[case]
    model = FakePatcher(HostModel(build()))
    layout = doors.comfy_layout(model)
    adapter = tiny_adapter(layout, channels=tuple(site.channels for site in layout.sites))
    adapter = replace(adapter, spec=replace(adapter.spec, format=form))
    steered = doors.apply(model, bake(adapter, tiny_prompt(adapter), layout, WeightSchedule(0.8), torch.ones(8, 8)))
    recordings = Recording(2), Recording(2)
    x, texts = noise(2, 4, 10, 6), {name: noise(1, 7, 32, seed=i) for i, name in enumerate(("positive", "negative"))}

    def predictions(model: FakePatcher) -> list[dict[str, torch.Tensor]]:
        conds: Any = {name: [conditioning(text)] for name, text in texts.items()}
        with torch.no_grad():
            return [Guider(model, conds)(x, percent) for percent in (0.3, 0.6, 0.3)]

    plain, expected = predictions(model), predictions(steered)
    predictions(record(steered, recordings[0]))
    model.model.diffusion_model = torch.compile(model.model.diffusion_model, backend="aot_eager", dynamic=False)
    for of, wanted in ((model, plain), (steered, expected), (model, plain), (steered, expected)):
        for got, want in zip(predictions(of), wanted, strict=True):
            for name in want:
                assert_close(got[name], want[name], rtol=0, atol=2e-5)
    assert float((expected[0]["positive"] - plain[0]["positive"]).abs().max()) > 1e-3
    assert (sum(counted["graph_break"].values()) == 0) == (whole and WHOLE_GRAPHS)
