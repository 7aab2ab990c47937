"""Train IP-Adapter and Train LoRA in a running ComfyUI: they train, cancel, go on, and say what went wrong.

Every training is a process of the tests' own Python that takes five seconds to start: beside older hosts each node trains
once, which shows what the host has a part in, and what is between the node and the trainer is asked beside the newest alone.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest

from host.comfy_server import REPOSITORY, ComfyServer, ExecutionFailed, ExecutionInterrupted, Graph, GraphRejected, Node
from host.servers import HOSTS, newest
from ipadapter_core import load_adapter
from ipadapter_core.lora import load_lora
from tiny_training import picture, save_model
from workflows.graph import to_prompt

SETTINGS = "\n".join(
    [
        "train.device=cpu", "train.warmup=0", "train.ignore_memory=true", "data.min_side=16", "watch.sample_steps=1",
        "watch.tensorboard=false", "watch.log_every=1",
    ]
)  # fmt: skip


def is_newest(server: ComfyServer) -> bool:
    return server.host == HOSTS[0]


@pytest.fixture(scope="module")
def model(server: ComfyServer, tmp_path_factory: pytest.TempPathFactory) -> str:
    return server.add_model("diffusers", save_model(tmp_path_factory.mktemp("model")), "tiny")


def training(
    server: ComfyServer, model: str, name: str, kind: str = "ImagePromptTrain", **changes: object
) -> tuple[Graph, Node, Node]:
    graph = Graph()
    images = [server.upload_image(np.asarray(picture(i, (64, 64))), f"train_{i}.png") for i in range(2)]
    batch = graph.add(
        "ImageBatch", image1=graph.add("LoadImage", image=images[0]), image2=graph.add("LoadImage", image=images[1])
    )
    values: dict[str, object] = {
        "name": name, "base_model": model, "start_from": "nothing", "pictures": "", "captions": "cat\ndog", "steps": 4,
        "batch": 2, "resolution": 64, "learning_rate": 1e-3, "precision": "fp32", "sample_every": 2, "sample_prompt": "",
        "seed": 0, "settings": SETTINGS, "start_over": False, "images": batch,
    }  # fmt: skip
    node = graph.add(kind, **(values | KINDS[kind] | changes))
    return graph, node, graph.add("TestSaveTensor", value=node[1])


KINDS: dict[str, dict[str, object]] = {
    "ImagePromptTrain": {"image_encoder": "inside the base model's folder", "family": "base"},
    "ImagePromptTrainLoRA": {
        "algorithm": "lora", "rank": 2, "alpha": 0.0, "targets": "", "text_encoders": False, "trigger": "in tiny style",
    },
}  # fmt: skip


def test_it_trains_and_the_result_can_be_loaded(server: ComfyServer, model: str) -> None:
    graph, node, plot = training(server, model, "first")
    samples = graph.add("TestSaveTensor", value=node[2])
    result = server.run(graph)
    assert result.tensor(plot).shape == (1, 600, 800, 3)
    assert result.tensor(samples).shape == (1, 2 * 68 - 4, 2 * 68 - 4, 3)
    file = server.base / "output/ipadapter/first.safetensors"
    assert json.loads(load_adapter(file).metadata["settings"])["train"]["steps"] == 4
    files = server.object_info("ImagePromptLoadAdapter")["input"]["required"]["file"][1]["options"]
    assert "first.safetensors" in files, "Load IP-Adapter lists it without a restart"
    if not is_newest(server):
        return
    longer, _, _ = training(server, model, "first", steps=6)
    server.run(longer)
    rows = (server.base / "output/ipadapter_training/first/progress.jsonl").read_text().splitlines()
    steps = [json.loads(row)["step"] for row in rows if '"step"' in row and json.loads(row)["event"] == "step"]
    assert steps == list(range(1, 7)), "queueing it again goes on"
    assert json.loads(load_adapter(file).metadata["settings"])["train"]["steps"] == 6, "and replaces its own result"
    file.write_bytes(b"somebody's")
    server.run(training(server, model, "first", start_over=True)[0])
    assert file.read_bytes() == b"somebody's"
    assert load_adapter(file.with_name("first-2.safetensors")).metadata["steps"] == "4"
    assert list((server.base / "output/ipadapter_training/first.earlier-1").glob("state-00000006")), (
        "set aside, not deleted"
    )


def test_cancelling_saves_and_leaves_the_queue_usable(server: ComfyServer, model: str) -> None:
    graph, _, _ = training(server, model, "cancelled", steps=100_000, sample_every=100_000)
    prompt = server.submit(graph)
    folder: Path = server.base / "output/ipadapter_training/cancelled"
    end = time.monotonic() + 200
    while not (folder / "progress.jsonl").is_file() or '"step": 3' not in (folder / "progress.jsonl").read_text():
        assert time.monotonic() < end, server.log[-3000:]
        queue = server.queue()  # asked once: between two questions a prompt moves from pending to running
        assert queue["queue_running"] or queue["queue_pending"], server.log[-3000:]
        time.sleep(0.2)
    server.interrupt()
    with pytest.raises(ExecutionInterrupted):
        server.wait(prompt)
    assert list(folder.glob("state-*/run.json")), "where it was is saved"
    assert list(folder.glob("cancelled-*.safetensors"))
    assert not (folder / "stop").exists()
    small = Graph()
    small.add("TestSaveTensor", value=small.add("EmptyImage", width=8, height=8, batch_size=1, color=0))
    server.run(small)


def test_the_real_error_is_shown(server: ComfyServer, model: str) -> None:
    (server.base / "input/nothing").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ExecutionFailed, match=r"holds no usable picture"):
        server.run(training(server, model, "failing", pictures="nothing")[0])
    if not is_newest(server):
        return
    with pytest.raises(ExecutionFailed, match="did you mean 'warmup'"):
        server.run(training(server, model, "typo", settings="train.warmpu=3")[0])
    with pytest.raises(ExecutionFailed, match="must be a plain file name"):
        server.run(training(server, model, "../up")[0])
    with pytest.raises(ExecutionFailed, match="captions has 3 lines for 2 images"):
        server.run(training(server, model, "lines", captions="a\nb\nc")[0])


def test_checkpoints_and_encoders_of_one_file_are_offered(server: ComfyServer, model: str, sd15_small: str) -> None:
    """What a checkpoint lacks is said in a sentence; tests/core/test_training_single_file.py trains on whole ones."""
    inputs = server.object_info("ImagePromptTrain")["input"]["required"]
    assert {sd15_small, model} <= set(inputs["base_model"][1]["options"])
    with pytest.raises(ExecutionFailed, match=r"has no image encoder inside; choose one in image_encoder"):
        server.run(training(server, sd15_small, "alone")[0])
    with pytest.raises(ExecutionFailed, match=r"text encoder, autoencoder and UNet must all be in the file"):
        server.run(training(server, sd15_small, "part", "ImagePromptTrainLoRA")[0])
    assert not (server.base / "output/lora_training/part/model configs").exists(), "a client could upload others there"


def test_a_lora_is_trained_on_and_listed(server: ComfyServer, model: str) -> None:
    lora = {"kind": "ImagePromptTrainLoRA", "text_encoders": True, "targets": "all: 0, attn2: 1, te v: 1"}
    graph, node, plot = training(server, model, "my lora", **lora)
    samples, path = graph.add("TestSaveTensor", value=node[2]), graph.add("PreviewAny", source=node[0])
    result = server.run(graph)
    assert result.tensor(plot).shape == (1, 600, 800, 3)
    # pictures, without the LoRA, with it
    assert result.tensor(samples).shape == (1, 3 * 68 - 4, 2 * 68 - 4, 3)
    file = server.base / "output/loras/my lora.safetensors"
    assert result.text(path) == [str(file)]
    weights = load_lora(file)
    assert weights.components == ("denoiser", "te1")
    assert weights.metadata["modelspec.trigger_phrase"] == "in tiny style"
    assert weights.metadata["ss_steps"] == "4"
    for node_type, field in (("ImagePromptLoRAStrength", "file"), ("LoraLoader", "lora_name")):
        kind, *more = server.object_info(node_type)["input"]["required"][field]
        files = more[0]["options"] if kind == "COMBO" else kind
        assert "my lora.safetensors" in files, "listed without a restart"
    if not is_newest(server):
        return
    longer, _, _ = training(server, model, "my lora", steps=6, **lora)
    server.run(longer)
    assert load_lora(file).metadata["ss_steps"] == "6"
    again, _, _ = training(server, model, "on", **(lora | {"start_from": "my lora.safetensors", "steps": 1}))
    server.run(again)
    assert {m.name for m in load_lora(server.base / "output/loras/on.safetensors").modules} == {
        m.name for m in weights.modules
    }
    with pytest.raises(GraphRejected, match="unknown word 'atn'"):
        server.run(training(server, model, "typo", "ImagePromptTrainLoRA", targets="atn: 1")[0])
    with pytest.raises(ExecutionFailed, match="give a folder in pictures, or connect images"):
        server.run(training(server, model, "none", "ImagePromptTrainLoRA", images=None)[0])


@newest
def test_the_workflow_without_downloads_trains_as_it_is(server: ComfyServer) -> None:
    """On the shipped world and its pictures; only the steps are fewer."""
    workflow = json.loads((REPOSITORY / "workflows/3 Train an adapter, no download.json").read_text("utf-8"))
    graph = to_prompt(workflow, server.object_info())
    for node in graph.values():
        if node["class_type"] == "ImagePromptTrain":
            node["inputs"] |= {"steps": 2, "batch": 2, "sample_every": 2, "settings": "watch.sample_steps=1"}
        elif node["class_type"] == "KSampler":
            node["inputs"]["steps"] = 2
    result = server.run(graph)
    saved = next(i for i, node in graph.items() if node["class_type"] == "SaveImage")
    assert result.images(saved)[0].shape == (384, 384, 3)
    assert load_adapter(server.base / "output/ipadapter/demo-world-adapter.safetensors").spec.num_tokens == 4


@newest
@pytest.mark.parametrize("file", ["50 Train an IP-Adapter", "51 Train a LoRA"])
def test_the_workflow_trains(server: ComfyServer, model: str, file: str) -> None:
    workflow = json.loads((REPOSITORY / f"workflows/{file}.json").read_text("utf-8"))
    graph = to_prompt(workflow, server.object_info())
    more = "\nadapter.depth=1" if file == "50 Train an IP-Adapter" else ""
    for node in graph.values():
        if node["class_type"] in KINDS:
            node["inputs"] |= {
                "name": "from a workflow", "base_model": model, "steps": 2, "resolution": 64, "precision": "fp32",
                "settings": SETTINGS + more, "batch": 1,
            }  # fmt: skip
            if file == "50 Train an IP-Adapter":
                node["inputs"]["image_encoder"] = KINDS["ImagePromptTrain"]["image_encoder"]
        elif node["class_type"] == "LoadImage":
            node["inputs"]["image"] = server.upload_image(np.asarray(picture(3, (64, 64))), "learn.png")
    result = server.run(graph)
    previews = [i for i, node in graph.items() if node["class_type"] == "PreviewImage"]
    assert [result.images(i)[0].ndim for i in previews] == [3, 3]
    if file == "50 Train an IP-Adapter":
        assert load_adapter(server.base / "output/ipadapter/from a workflow.safetensors").spec.family == "plus"
    else:
        weights = load_lora(server.base / "output/loras/from a workflow.safetensors")
        assert {m.weight.rank for m in weights.modules if m.weight is not None} <= {8, 16}
