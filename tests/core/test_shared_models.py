"""One model, several users: threads, copies, and backward passes that run its layers again; each sees what is its own."""

from __future__ import annotations

import copy
import io
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ipadapter_core import RegionMask, WeightSchedule, Window, bake, layout_of
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.backends.diffusers import doors as images
from ipadapter_core.backends.diffusers import lora as loras
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.lora.patch import LoRAPatch, masked
from tiny_loras import tiny_lora
from tiny_models import TOKEN_DIM, call_unet, noise, tiny_adapter, tiny_prompt, tiny_unet

WHERE = "attn1: 1, attn2: 1, ff: 1, conv: 1"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def unet() -> Any:
    return tiny_unet("small")


def image_on(unet: nn.Module, *, seed: int = 0, mask: Tensor | None = None, **schedule: Any) -> AdapterPatch:
    layout = layout_of(unet)
    adapter = tiny_adapter(layout, seed=seed)
    return bake(adapter, tiny_prompt(adapter, seed=seed), layout, WeightSchedule(**schedule), mask)


def lora_on(unet: nn.Module, *, seed: int = 0, algorithm: str = "LoRA", **settings: Any) -> LoRAPatch:
    return replace(loras.place(unet, tiny_lora(unet, WHERE, algorithm, seed=seed)), **settings)


CURVE: Any = ((0.0, 1.0), (1.0, 0.1))


def applied(kind: str, unet: nn.Module) -> ExitStack:
    """Everything that depends on a call: its progress, its size, its branches."""
    stack = ExitStack()
    halves = torch.zeros(32, 32)
    halves[:16] = 1
    if kind in ("image", "both"):
        patch = image_on(unet, curve=CURVE, mask=halves)
        stack.enter_context(images.apply(unet, patch, image_on(unet, seed=1, strength=0.5)))
    if kind in ("lora", "both"):
        first = lora_on(unet, window=Window(curve=CURVE), uncond_strength=0.3)
        second = masked(lora_on(unet, seed=1, algorithm="DoRA out"), RegionMask.from_tensor(halves))
        stack.enter_context(loras.apply(unet, first, second, branches=("uncond", "cond")))
    return stack


def together(work: Sequence[Callable[[], object]]) -> list[Any]:
    """Run functions in threads that start at once; their results, or the first error."""
    results: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = work[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# --- threads ---------------------------------------------------------------------------------------------------------

CALLS = [
    (999.0, (2, 16, 16)), (500.0, (4, 8, 8)), (20.0, (2, 13, 9)), (700.0, (6, 8, 16)),
]  # fmt: skip


def call_number(unet: Any, i: int) -> Tensor:
    t, (b, y, x) = CALLS[i]
    return call_unet(unet, noise(b, 4, y, x, seed=i), noise(b, 7, TOKEN_DIM, seed=10 + i), t=t)


@pytest.mark.parametrize("kind", ["image", "lora", "both"])
def test_threads_see_their_own_calls(unet: Any, kind: str) -> None:
    """Other timesteps, sizes, batches and prompts in every thread: the same bits as one after the other."""
    with applied(kind, unet):
        expected = [call_number(unet, i) for i in range(len(CALLS))]
        plain = together([lambda i=i: [call_number(unet, i) for _ in range(4)] for i in range(len(CALLS))])
    for want, got in zip(expected, plain, strict=True):
        assert all(torch.equal(want, out) for out in got)


@pytest.mark.parametrize("kind", ["image", "lora"])
def test_a_change_during_calls_is_seen_whole_or_not_at_all(unet: Any, kind: str) -> None:
    handle: Any = (
        images.apply(unet, image_on(unet)) if kind == "image" else loras.apply(unet, lora_on(unet), branches=("cond",))
    )

    def change(strength: float) -> None:
        handle.set_schedule(WeightSchedule(strength)) if kind == "image" else handle.set_strength(strength)

    states = (0.3, -1.0, 0.0)
    expected: list[Tensor] = []
    for strength in states:
        change(strength)
        expected.append(call_number(unet, 0))
    over = threading.Event()

    def switch() -> None:
        while not over.is_set():
            for strength in states:
                change(strength)

    def run() -> list[Tensor]:
        try:
            return [call_number(unet, 0) for _ in range(12)]
        finally:
            over.set()

    _, *runs = together([switch, run, run])
    for out in (out for found in runs for out in found):
        assert any(torch.equal(out, want) for want in expected)


@pytest.mark.parametrize("kind", ["image", "lora"])
def test_removing_lets_running_calls_end_as_they_began(unet: Any, kind: str) -> None:
    """A call that another thread is inside of keeps its adapters; the next one has none, and then no hook is left."""
    plain = call_number(unet, 0)
    handle: Any = images.apply(unet, image_on(unet)) if kind == "image" else loras.apply(unet, lora_on(unet))
    steered = call_number(unet, 0)
    inside, removed = threading.Event(), threading.Event()
    pause = unet.mid_block.register_forward_hook(lambda *_: (inside.set(), removed.wait(60), None)[2])

    def remove() -> None:
        inside.wait(60)
        handle.remove()
        removed.set()

    got, _ = together([lambda: call_number(unet, 0), remove])
    pause.remove()
    assert torch.equal(got, steered)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())
    assert torch.equal(call_number(unet, 0), plain)


@pytest.mark.parametrize("kind", ["image", "lora"])
def test_applying_leaves_running_calls_alone(unet: Any, kind: str) -> None:
    plain = call_number(unet, 0)
    inside, done = threading.Event(), threading.Event()
    pause = unet.mid_block.register_forward_hook(lambda *_: (inside.set(), done.wait(60), None)[2])
    handles: list[Any] = []

    def apply() -> None:
        inside.wait(60)
        handles.append(images.apply(unet, image_on(unet)) if kind == "image" else loras.apply(unet, lora_on(unet)))
        done.set()

    got, _ = together([lambda: call_number(unet, 0), apply])
    pause.remove()
    assert torch.equal(got, plain)
    assert not torch.equal(call_number(unet, 0), plain)


def test_a_call_inside_a_call(unet: Any) -> None:
    """A hook that calls the same model at another timestep, as some guidance does, leaves the outer call alone."""
    with applied("both", unet):
        expected = [call_number(unet, i) for i in (0, 1)]
        inner: list[Tensor] = []

        def call_again(*_: Any) -> None:
            if not inner:
                inner.append(torch.empty(0))  # once
                inner[0] = call_number(unet, 1)

        hook = unet.down_blocks[0].register_forward_hook(call_again)
        outer = call_number(unet, 0)
        hook.remove()
    assert torch.equal(outer, expected[0])
    assert torch.equal(inner[0], expected[1])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("kind", ["image", "lora"])
def test_after_an_error_in_a_call_the_next_is_right(unet: Any, kind: str, error: type[BaseException]) -> None:
    plain = call_number(unet, 0)
    with applied(kind, unet):
        expected = call_number(unet, 0)

        def fail(*_: Any) -> None:
            raise error

        hook = unet.mid_block.register_forward_hook(fail)
        with pytest.raises(error):
            call_number(unet, 1)
        hook.remove()
        assert torch.equal(call_number(unet, 0), expected)
    assert torch.equal(call_number(unet, 0), plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_an_attention_on_its_own_is_named(unet: Any) -> None:
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    x, text = noise(2, 16, 8), noise(2, 7, TOKEN_DIM)
    with images.apply(unet, image_on(unet)), pytest.raises(InvalidInputError, match="outside of a call of the model"):
        attention(x, text)
    plain = attention(x, text)
    with loras.apply(unet, lora_on(unet)):  # a constant strength needs to know no more
        assert not torch.equal(attention(x, text), plain)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpointing(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, str], None]:
    """Switches gradient checkpointing on, in either of torch's forms (diffusers has one of them) or of the model as a whole."""

    def switch(unet: Any, form: str) -> None:
        unet.train()
        if form.startswith("whole"):
            return
        unet.enable_gradient_checkpointing()
        if form != "diffusers":

            def run(function: Any, *args: Any, **settings: Any) -> Any:
                return checkpoint(function, *args, **(settings | {"use_reentrant": form == "reentrant"}))

            monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", run)

    return switch


Switch = Callable[[Any, str], None]


def loss_of(unet: Any, x: Tensor, t: float, form: str = "") -> Tensor:
    text = noise(2, 7, TOKEN_DIM, seed=8)

    def run(x: Tensor) -> Tensor:
        return unet(x, torch.tensor(t), text).sample

    if form.startswith("whole"):
        return checkpoint(run, x, use_reentrant=form == "whole, reentrant").square().mean()  # type: ignore[union-attr]
    return run(x).square().mean()


CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-8}  # reentrant checkpoints add gradients up in another order
FORMS = ["diffusers", "reentrant", "not reentrant", "whole, reentrant", "whole, not reentrant"]


def two_gradients(unet: Any, form: str, between: Callable[[], object] = lambda: None) -> list[Tensor]:
    """Two forwards at two timesteps, one backward."""
    inputs = [noise(2, 4, 8, 8, seed=i).requires_grad_() for i in (0, 1)]
    first = loss_of(unet, inputs[0], 900.0, form)
    between()
    second = loss_of(unet, inputs[1], 100.0, form)
    between()
    (first + second).backward()
    return [x.grad for x in inputs if x.grad is not None]


@pytest.mark.parametrize("kind", ["image", "lora"])
@pytest.mark.parametrize("form", FORMS)
def test_a_recomputed_call_sees_what_it_saw(unet: Any, checkpointing: Switch, kind: str, form: str) -> None:
    with applied(kind, unet):
        expected = two_gradients(unet, "")
        assert (expected[0] - expected[1]).abs().max() > 1e-4
        checkpointing(unet, form)
        for want, got in zip(expected, two_gradients(unet, form), strict=True):
            assert_close(want, got, **CLOSE)


@pytest.mark.parametrize("kind", ["image", "lora"])
@pytest.mark.parametrize("form", FORMS)
def test_changes_before_the_backward_pass_do_not_reach_it(
    unet: Any, checkpointing: Switch, kind: str, form: str
) -> None:
    """Also where the calls go back to before the adapter was there; a whole model in a reentrant checkpoint says so."""

    def gradients(form: str) -> list[Tensor]:
        handle: Any = (
            images.apply(unet, image_on(unet))
            if kind == "image"
            else loras.apply(unet, lora_on(unet), branches=("cond",))
        )
        strengths = iter((0.4, 0.0))

        def change() -> None:
            strength = next(strengths)
            handle.set_schedule(WeightSchedule(strength)) if kind == "image" else handle.set_strength(strength)

        try:
            return two_gradients(unet, form, change)
        finally:
            handle.remove()

    expected = gradients("")
    checkpointing(unet, form)
    if form == "whole, reentrant":
        with pytest.raises(InvalidInputError, match="changed between a call and its backward"):
            gradients(form)
        return
    for want, got in zip(expected, gradients(form), strict=True):
        assert_close(want, got, **CLOSE)


@pytest.mark.parametrize("kind", ["image", "lora"])
@pytest.mark.parametrize("form", ["reentrant", "not reentrant"])
def test_applied_or_removed_before_the_backward_pass(unet: Any, checkpointing: Switch, kind: str, form: str) -> None:
    """The gradient is that of the call, or torch says that the layers have changed; never another one in silence."""

    def apply() -> Any:
        return images.apply(unet, image_on(unet)) if kind == "image" else loras.apply(unet, lora_on(unet))

    def gradient(*, before: bool, checkpointed: bool) -> Tensor:
        x = noise(2, 4, 8, 8).requires_grad_()
        handle = apply() if before else None
        loss = loss_of(unet, x, 500.0)
        if handle is None:
            handle = apply() if checkpointed else None
        elif checkpointed:
            handle.remove()
        try:
            loss.backward()
        finally:
            if handle is not None:
                handle.remove()
        assert x.grad is not None
        return x.grad

    expected = [gradient(before=before, checkpointed=False) for before in (False, True)]
    checkpointing(unet, form)
    assert_close(gradient(before=False, checkpointed=True), expected[0], **CLOSE)
    try:
        got = gradient(before=True, checkpointed=True)
    except torch.utils.checkpoint.CheckpointError:
        assert form == "not reentrant"
    else:
        assert_close(got, expected[1], **CLOSE)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


def test_threads_that_train_through_one_model(unet: Any, checkpointing: Switch) -> None:
    """Each backward pass runs in the thread of its call, which tells the calls apart."""

    def gradient(i: int) -> Tensor:
        x = noise(2, 4, 8, 8, seed=i).requires_grad_()
        loss_of(unet, x, 900.0 - 300 * i).backward()
        assert x.grad is not None
        return x.grad

    with applied("both", unet):
        expected = [gradient(i) for i in range(3)]
        checkpointing(unet, "diffusers")
        got = together([lambda i=i: [gradient(i) for _ in range(3)] for i in range(3)])
    for want, found in zip(expected, got, strict=True):
        assert all(torch.equal(want, one) for one in found)


# --- copies ----------------------------------------------------------------------------------------------------------


class Pipeline:
    """The least of a pipeline."""

    def __init__(self, unet: nn.Module) -> None:
        self.unet, self.do_classifier_free_guidance = unet, True


@pytest.mark.parametrize("kind", ["image", "lora", "DoRA"])
def test_a_copy_is_independent(unet: Any, kind: str) -> None:
    """Strength, removal and weights of the one do not reach the other; what is frozen is shared."""
    handle: Any
    if kind == "image":
        handle = images.apply(unet, image_on(unet))
    else:
        handle = loras.apply(unet, lora_on(unet, algorithm="DoRA out" if kind == "DoRA" else "LoRA"))
    plain = call_number(tiny_unet("small"), 0)
    expected = call_number(unet, 0)
    other = copy.deepcopy(unet)
    again = copy.deepcopy(other)
    assert torch.equal(call_number(other, 0), expected)
    handle.set_schedule(WeightSchedule(0.1)) if kind == "image" else handle.set_strength(0.1)
    changed = call_number(unet, 0)
    assert not torch.equal(changed, expected)
    assert torch.equal(call_number(other, 0), expected)
    handle.remove()
    assert torch.equal(call_number(unet, 0), plain)
    for model in (other, again):
        assert torch.equal(call_number(model, 0), expected)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.01)
    assert torch.equal(call_number(again, 0), expected)
    assert torch.equal(together([lambda: call_number(again, 0)])[0], expected)


def test_a_copied_pipeline_asks_itself_about_guidance(unet: Any) -> None:
    pipeline = Pipeline(unet)
    handle = images.apply_to_pipeline(pipeline, image_on(unet))
    expected = call_number(unet, 0)
    other = copy.deepcopy(pipeline)
    pipeline.do_classifier_free_guidance = False
    assert torch.equal(call_number(other.unet, 0), expected)
    assert not torch.equal(call_number(unet, 0), expected)
    handle.remove()
    assert torch.equal(call_number(other.unet, 0), expected)


def test_a_unet_called_before_its_pipeline_is_named(unet: Any) -> None:
    pipeline = Pipeline(unet)
    del pipeline.do_classifier_free_guidance
    with (
        images.apply_to_pipeline(pipeline, image_on(unet)),
        pytest.raises(InvalidInputError, match="before its pipeline"),
    ):
        call_number(unet, 0)


@pytest.mark.parametrize("kind", ["image", "lora"])
def test_a_steered_model_is_saved_and_loaded_whole(unet: Any, kind: str) -> None:
    handle: Any = images.apply(unet, image_on(unet)) if kind == "image" else loras.apply(unet, lora_on(unet))
    expected = call_number(unet, 0)
    file = io.BytesIO()
    torch.save(unet, file)
    handle.remove()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)  # our own file
    assert torch.equal(call_number(loaded, 0), expected)


def test_replicas_in_threads(unet: Any) -> None:
    """What DataParallel does: shallow copies that share the hooks, one thread each."""

    def replica_of(module: nn.Module) -> nn.Module:
        found = module._replicate_for_data_parallel()
        for name, child in module._modules.items():
            found._modules[name] = None if child is None else replica_of(child)
        for name, parameter in module._parameters.items():
            found._parameters[name] = parameter
        return found

    with applied("both", unet):
        expected = [call_number(unet, i) for i in (0, 1)]
        replicas: list[Any] = [replica_of(unet) for _ in (0, 1)]
        got = together([lambda i=i: call_number(replicas[i], i) for i in (0, 1)])
    for want, one in zip(expected, got, strict=True):
        assert torch.equal(want, one)


@pytest.mark.parametrize("kind", ["image", "lora", "both"])
def test_a_model_that_moves_while_applied(unet: Any, kind: str) -> None:
    with applied(kind, unet):
        expected = call_number(unet, 0)
        unet.to(torch.float64)
        x, text = noise(2, 4, 16, 16, seed=0).double(), noise(2, 7, TOKEN_DIM, seed=10).double()
        with torch.no_grad():
            wide = unet(x, torch.tensor(999.0), text).sample
        assert wide.dtype == torch.float64
        assert_close(wide.float(), expected, rtol=0, atol=5e-5)
        unet.to(torch.float32)
        assert torch.equal(call_number(unet, 0), expected)
