"""What people see and touch in ComfyUI's editor, in both renderers where the host has both.

One file, so that each host's server and browser start once; a new check is a function that takes ``editor``.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import save_file

from host.comfy_server import ComfyServer
from host.servers import newest
from host.shrunk import build_checkpoint
from host.test_search import WORDS
from host.tiny_lora_files import lora_tensors
from ipadapter_core.attention.presets import parse_site_factors
from ipadapter_core.attention.schedule import parse_curve
from ipadapter_core.downloads import DOWNLOADS

if TYPE_CHECKING:
    from web.browser import Editor

WORKFLOWS = sorted((Path(__file__).resolve().parents[2] / "workflows").glob("*.json"))


def test_the_pack_serves_its_scripts(server: ComfyServer) -> None:
    listed = server.get("/extensions")
    assert [name for name in listed if name.startswith("/extensions/ipadapter-studio/")]


def test_templates_open_without_an_error_and_within_their_groups(editor: Editor) -> None:
    assert len(WORKFLOWS) > 20
    problems: list[str] = []
    for renderer in editor.renderers:
        editor.use(renderer)
        for path in WORKFLOWS:
            workflow = json.loads(path.read_text())
            with editor.quiet(path.name):
                editor.load(workflow)
            shown = editor.nodes()
            editor.shot(f"{path.stem} {renderer}")
            assert len(shown) == len(workflow["nodes"])
            for node_id, box in grouped(workflow):
                node = shown[str(node_id)]
                if not node.inside(box):
                    problems.append(f"{renderer}: {path.name}: {node.title} sticks out of its group: {node}, {box}")
    assert problems == [], "\n".join(problems)


def grouped(workflow: Mapping[str, Any]) -> list[tuple[int, list[float]]]:
    """Nodes of a workflow and the groups that they lie in, by their middle as they were saved."""
    found: list[tuple[int, list[float]]] = []
    for node in workflow["nodes"]:
        sides = (0, 0) if node["flags"].get("collapsed") else node["size"]
        x, y = (at + side / 2 for at, side in zip(node["pos"], sides, strict=True))
        for group in workflow.get("groups") or ():
            left, top, width, height = group["bounding"]
            if left <= x <= left + width and top <= y <= top + height:
                found.append((node["id"], group["bounding"]))
    return found


def test_lora_rows_are_added_dragged_ordered_and_sent(editor: Editor, lora_files: list[str]) -> None:
    ink, paper = lora_files
    page = editor.page
    for renderer in editor.renderers:
        editor.use(renderer)
        node = editor.add("ImagePromptLoRARows")
        with editor.quiet(f"LoRA Rows, {renderer}"):
            for words in ("paper water", "ink"):
                page.get_by_role("button", name="add a LoRA").click()
                page.get_by_role("combobox", name="add a LoRA").fill(words)
                page.get_by_role("option").first.click()
            editor.settle()
            assert rows_of(editor, node) == [{"on": True, "file": f, "strength": 1} for f in (paper, ink)]

            editor.drag(page.get_by_role("spinbutton", name="strength", exact=True).nth(0), by=(-40, 0))
            page.get_by_role("spinbutton", name="strength on the text encoders").nth(1).fill("0.25")
            page.get_by_role("switch").nth(1).click()
            editor.drag(page.get_by_role("button", name="reorder").nth(1), by=(0, -60))
            assert rows_of(editor, node) == [
                {"on": False, "file": ink, "strength": 1, "text_strength": 0.25},
                {"on": True, "file": paper, "strength": 0.6},
            ]

            page.get_by_role("button", name="strength by block").nth(1).click()
            bars = page.get_by_role("slider")
            bars.nth(3).wait_for()
            with page.expect_response(lambda answer: "lora/blocks" in answer.url):
                editor.drag(bars.nth(0), to=bars.nth(2), down=0.9)
            editor.settle()
            with page.expect_response(lambda answer: "lora/blocks" in answer.url):
                bars.nth(3).press("0")
            editor.settle()
            page.keyboard.press("ArrowUp")  # on a bar that was drawn anew
            editor.shot(f"LoRA Rows blocks {renderer}")
            selector = rows_of(editor, node)[1]["selector"]
            names = [(bar.get_attribute("aria-label") or "").split()[0] for bar in bars.all()[:4]]
            assert [entry.split(": ")[0] for entry in selector.split(", ")] == names
            assert selector.endswith(f"{names[3]}: 0.05")
            page.get_by_role("combobox", name="preset").select_option("SD-OUTALL")
            assert rows_of(editor, node)[1]["selector"] == "SD-OUTALL"

            page.get_by_role("button", name="what this LoRA is").nth(0).click()
            page.get_by_role("button", name="copy <img src=x onerror=window.hacked=1>").wait_for()
            assert page.evaluate("() => window.hacked") is None
            page.get_by_role("img", name="heat map of").wait_for()
            editor.shot(f"LoRA Rows facts {renderer}")

            page.get_by_role("checkbox", name="all LoRAs on").click()
            assert [row["on"] for row in rows_of(editor, node)] == [True, True]
            page.get_by_role("button", name="remove").nth(0).click()
            assert [row["file"] for row in rows_of(editor, node)] == [paper]
            saved = editor.saved()
            editor.load(saved)
            assert [row["file"] for row in rows_of(editor, node)] == [paper]


SELECTED = {
    "last_node_id": 1,
    "last_link_id": 0,
    "nodes": [
        {"id": 1, "type": "ImagePromptLoRAStrength", "pos": [0, 0], "size": [440, 420], "flags": {}, "order": 0, "mode": 0, "properties": {},
         "widgets_values": ["", 1.0, 1.0, "all: 0\nout3: 1", "auto", 0.0, 1.0, 1.0, "refuse"]},
    ],
    "links": [],
    "groups": [],
    "version": 0.4,
}  # fmt: skip


def test_a_selector_is_text_and_sliders_for_the_blocks_of_the_file(editor: Editor, lora_files: list[str]) -> None:
    page = editor.page
    graph: dict[str, Any] = json.loads(json.dumps(SELECTED))
    graph["nodes"][0]["widgets_values"][0] = lora_files[0]

    def selector() -> str:
        return editor.prompt()["1"]["selector"]

    for renderer in editor.renderers:
        editor.use(renderer)
        with editor.quiet(f"LoRA Strength, {renderer}"):
            editor.load(graph)
            text = page.get_by_role("textbox", name="selector")
            assert text.input_value() == selector() == "all: 0\nout3: 1"
            assert editor.prompt()["1"]["mode"] == "auto"
            page.get_by_role("button", name="strength by block").click()
            bars = page.get_by_role("slider", name="layers)")
            bars.nth(3).wait_for()
            names = [(bar.get_attribute("aria-label") or "").split()[0] for bar in bars.all()]
            assert [float(bar.get_attribute("aria-valuenow") or "nan") for bar in bars.all()] == [
                float(n == "out3") for n in names
            ]
            editor.drag(bars.nth(0), to=bars.nth(1), down=0.75)
            editor.shot(f"LoRA Strength {renderer}")
            assert selector() == f"all: 0, out3: 1, {names[0]}: 0.5, {names[1]}: 0.5"
            assert text.input_value() == selector()
            page.get_by_role("combobox", name="preset").select_option("SD-OUTALL")
            assert selector() == text.input_value() == "SD-OUTALL"
            page.get_by_role("button", name="everywhere 1").click()
            assert selector() == ""
            text.fill("attn2: 0.5")
            text.press("Tab")
            assert selector() == "attn2: 0.5"
            with page.expect_response(lambda answer: "lora/blocks" in answer.url and "watercolour" in answer.url):
                page.evaluate(
                    """name => { const widget = app.graph.getNodeById(1).widgets.find(w => w.name === "file");
                    widget.value = name; widget.callback(name); }""",
                    lora_files[1],
                )
            page.get_by_role("slider", name="in1 ").wait_for()
            editor.shot(f"LoRA Strength other file {renderer}")
            saved = editor.saved()
            assert saved["nodes"][0]["widgets_values"][:5] == [lora_files[1], 1, 1, "attn2: 0.5", "auto"]


def test_rows_that_are_no_list_stay_as_they_were_written(editor: Editor) -> None:
    node = editor.add("ImagePromptLoRARows")
    editor.set_text(node, "rows", "[{oops")
    assert editor.prompt()[str(node)]["rows"] == "[{oops"
    assert "no list of rows" in editor.page.locator(".image-prompt-error").inner_text()
    editor.page.get_by_role("textbox", name="rows as JSON").fill('[{"lora": "x", "strengthTwo": 0.5}]')
    editor.page.keyboard.press("Tab")
    assert not editor.page.locator(".image-prompt-error").is_visible()
    assert rows_of(editor, node) == [{"on": True, "file": "x", "strength": 1, "text_strength": 0.5}]


BROKEN = (
    "null",
    "{}",
    "[1]",
    '[{"file": 5}]',
    '[{"file": "a", "strength": "x"}]',
    '[{"file": "a", "on": 1}]',
    '[{"selector": []}]',
)


def test_a_graph_with_broken_rows_opens_and_keeps_them(editor: Editor) -> None:
    for broken in BROKEN:
        graph = json.loads(json.dumps(SELECTED))
        graph["nodes"][0] |= {"type": "ImagePromptLoRARows", "widgets_values": [broken, "auto", "refuse"]}
        with editor.quiet(broken):
            editor.load(graph)
        assert "no list of rows" in editor.page.locator(".image-prompt-error").inner_text()
        assert editor.prompt()["1"]["rows"] == broken


def test_rows_are_undone_copied_and_fed_from_elsewhere(editor: Editor, lora_files: list[str]) -> None:
    """A drag is one step back; a copy is a node of its own; a text that is connected counts."""
    page = editor.page
    files = json.dumps([{"file": file} for file in lora_files])
    for renderer in editor.renderers:
        editor.use(renderer)
        graph = json.loads(json.dumps(SELECTED))
        graph["nodes"][0] |= {"type": "ImagePromptLoRARows", "widgets_values": [files, "auto", "refuse"]}
        with editor.quiet(f"undone and copied, {renderer}"):
            editor.load(graph)
            strength = page.get_by_role("spinbutton", name="strength", exact=True)
            editor.drag(strength.nth(0), by=(-40, 0))
            assert [row["strength"] for row in rows_of(editor, 1)] == [0.6, 1]
            page.mouse.click(900, 850)
            page.keyboard.press("Control+z")
            page.wait_for_function(
                "() => !app.graph.getNodeById(1).widgets.find(w => w.name === 'rows').value.includes('0.6')"
            )
            editor.settle()
            page.wait_for_function("() => document.querySelector('.image-prompt-number').value === '1'")
            page.evaluate(
                """() => { app.canvas.selectNode(app.graph.nodes[0]); app.canvas.copyToClipboard(); app.canvas.pasteFromClipboard();
                           app.graph.nodes[1].pos = [700, 0] }"""
            )
            editor.fit()
            editor.shot(f"copied rows {renderer}")
            page.get_by_role("button", name="remove").nth(3).click()
            numbers = list(editor.nodes())
            assert [len(rows_of(editor, number)) for number in numbers] == [2, 1]
            page.evaluate(
                """() => { const text = LiteGraph.createNode('PrimitiveString'); app.graph.add(text); const rows = app.graph.nodes[0];
                           text.connect(0, rows, rows.inputs.findIndex(input => input.name === 'rows')) }"""
            )
            editor.settle()
            assert isinstance(editor.prompt()[numbers[0]]["rows"], list), "a link"
            if renderer == "nodes 2.0":  # the other one takes the rows away
                assert page.get_by_text("what is connected counts").locator("visible=true").count() == 1


def rows_of(editor: Editor, node: int | str) -> list[dict[str, Any]]:
    """What the server would get."""
    return json.loads(editor.prompt()[str(node)]["rows"])


@pytest.fixture(scope="module")
def lora_files(server: ComfyServer) -> list[str]:
    """Two LoRAs whose author is not a friend."""
    words = {"modelspec.trigger_phrase": "<img src=x onerror=window.hacked=1>, ink"}
    names = ["ink <b>drawing.safetensors", "styles/watercolour & paper.safetensors"]
    for name in names:
        path = server.models("loras") / name
        path.parent.mkdir(exist_ok=True)
        save_file(lora_tensors("sd15_small"), path, metadata=words)
    return names


NOTHING_THERE = "there is no file in"
TYPO = "cannot read 'half: 0.3' in the curve"


def test_what_is_wrong_is_read_where_it_happened(editor: Editor) -> None:
    """In the toast, or the dialog of older hosts, and in the node; gone with the next run."""
    for renderer in editor.renderers:
        editor.use(renderer)
        loader = editor.add("ImagePromptLoadAdapter")
        editor.page.evaluate(
            """() => { const shown = LiteGraph.createNode('ImagePromptInspect'); app.graph.add(shown);
                       app.graph.nodes[0].connect(0, shown, 0);
                       app.graph.nodes[0].widgets[0].value = 'no file in models/ipadapter yet' }"""
        )
        editor.page.evaluate("() => app.queuePrompt(0, 1)")
        said = f"""node => app.graph.getNodeById(node).widgets.some(
                     widget => widget.name === '$$node-text-preview' && widget.value.startsWith('{NOTHING_THERE}'))"""
        editor.page.wait_for_function(said, arg=loader, timeout=20_000)
        read(editor, NOTHING_THERE)
        editor.shot(f"error {renderer}")
        editor.page.keyboard.press("Escape")
        schedule = editor.add("ImagePromptSchedule")
        editor.page.evaluate(
            """node => { const shown = LiteGraph.createNode('PreviewAny'); app.graph.add(shown);
                         const from = app.graph.getNodeById(node); from.connect(0, shown, 0);
                         from.widgets.find(widget => widget.name === 'curve').value = '0: 1, half: 0.3' }""",
            schedule,
        )
        editor.page.evaluate("() => app.queuePrompt(0, 1)")
        read(editor, TYPO)
        editor.shot(f"typo {renderer}")
        editor.page.keyboard.press("Escape")
        editor.page.wait_for_function(
            "text => [...document.querySelectorAll('.p-toast-detail')].every(e => !e.innerText.includes(text))",
            arg=NOTHING_THERE,
            timeout=20_000,
        )


def read(editor: Editor, sentence: str) -> None:
    """Wait until a toast, or a dialog of hosts with the classic renderer alone, says a sentence."""
    place = ".p-toast-detail" if len(editor.renderers) > 1 else ".p-dialog"
    editor.page.wait_for_function(
        "([place, text]) => [...document.querySelectorAll(place)].some(e => e.innerText.includes(text))",
        arg=[place, sentence],
        timeout=20_000,
    )


# --- what is found ----------------------------------------------------------------------------------------------------

TYPED = ("style transfer", "regional", "train", "unified loader")
FIRST = {
    "ipadapter": "Load IP-Adapter",
    "style only": "Apply Adapter to Model",
    "two regions": "Preview Region",
    "lora by block": "LoRA Strength",
    "power lora": "LoRA Rows",
    "faceid": "Load Face Model",
    "training": "Train IP-Adapter",
    "reference": "Reference image (IP-Adapter)",
    "heatmap": "Show Image Attention",
    "demo": "Demo World",
    "try": "Demo World",
    "no download": "Demo World",
}
"""What somebody types, and what then is among the first six of some hundred nodes; most of ComfyUI's own have these words in titles."""


def test_words_that_people_type_find_nodes_in_the_search_box(editor: Editor) -> None:
    """Those of ``WORDS`` and ``FIRST``; the box of older hosts knows titles alone, and shows its results in the list that it has."""
    titles = {kind: info["display_name"] for kind, info in editor.server.pack_nodes().items()}
    asked = {typed: {titles[kind] for kind in WORDS[typed]} for typed in TYPED} | {k: {v} for k, v in FIRST.items()}
    if len(editor.renderers) == 1:
        asked = {title.lower(): {title} for title in ("Apply Adapter to Model", "LoRA Rows", "Demo World")}
    page = editor.page
    editor.empty()
    try:
        with editor.quiet("search"):
            page.evaluate("() => app.extensionManager.command.execute('Workspace.SearchBox.Toggle')")
            box = page.get_by_role("combobox", name=re.compile("Add a node")).or_(
                page.locator("input[placeholder='Search Nodes...']")
            )
            for typed, wanted in asked.items():
                box.fill(typed)
                for title in wanted:
                    page.get_by_role("option").filter(has_text=title).first.wait_for(timeout=10_000)
                editor.shot(f"search {typed}")
    finally:
        page.keyboard.press("Escape")  # at which older boxes write an error of their own


def test_a_template_offers_its_files_for_download(editor: Editor) -> None:
    """In the panel of errors, or on older hosts in a dialog before anything else."""
    page = editor.page
    workflow = json.loads((WORKFLOWS[0].parent / "10 Image prompt, SD1.5.json").read_text())
    files = {model["name"] for node in workflow["nodes"] for model in node["properties"].get("models", ())}
    assert len(files) == 3
    buttons = page.get_by_role("button").filter(has_text=re.compile("^Download( |$)"))
    if len(editor.renderers) == 1:
        setting = "Comfy.Workflow.ShowMissingModelsWarning"
        page.evaluate("name => app.extensionManager.setting.set(name, true)", setting)
        page.evaluate("graph => void app.loadGraphData(graph)", workflow)
        buttons.nth(len(files) - 1).wait_for()
        editor.shot("missing models")
        for file in files:
            page.get_by_text(file).first.wait_for()
        assert buttons.count() == len(files)
        page.keyboard.press("Escape")
        page.evaluate("name => app.extensionManager.setting.set(name, false)", setting)
        return
    editor.use("nodes 2.0")
    editor.load(workflow)
    page.get_by_role("button", name="View details").click()
    page.get_by_role("button", name="Download all").wait_for()
    editor.shot("missing models")
    for file in files:
        page.get_by_role("button", name=file).first.wait_for()
    assert buttons.filter(has_not_text="all").count() == len(files)
    page.get_by_role("button", name="Toggle properties panel").click()


FIRST_PICTURE = "1 Try it, no download"


def test_a_first_picture_is_three_clicks_away(editor: Editor) -> None:
    """From the templates, with no model there: the pack, the card with its picture, Run."""
    page = editor.page
    editor.empty()
    with editor.quiet("first picture"):
        page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
        page.get_by_text("ipadapter-studio").first.click()
        card = page.get_by_text(FIRST_PICTURE, exact=True).first
        card.wait_for()
        page.wait_for_function("() => [...document.images].filter(image => image.naturalWidth === 512).length > 3")
        editor.shot("templates")
        card.click()
        page.wait_for_function("() => app.graph.nodes.some(node => node.type === 'ImagePromptDemoWorld')")
        page.get_by_role("button", name="Run", exact=True).first.click()
        page.wait_for_function(
            "() => app.graph.nodes.filter(node => node.type === 'SaveImage').every(node => node.imgs?.length)",
            timeout=120_000,
        )
        editor.settle()
        editor.shot("first picture")


def test_files_of_a_need_are_listed_in_its_node_with_buttons(editor: Editor) -> None:
    """Older hosts and ``.bin`` files too; the list follows the need and the model, and no graph stores it."""
    page = editor.page
    workflow = json.loads((WORKFLOWS[0].parent / "9 The right files by need.json").read_text())
    number = next(node["id"] for node in workflow["nodes"] if node["type"] == "ImagePromptLoadModels")
    for renderer in editor.renderers:
        editor.use(renderer)
        with editor.quiet(f"files of a need, {renderer}"):
            editor.load(workflow)
            page.get_by_role("link", name="download ip-adapter-plus_sd15.safetensors").wait_for()
            for name, value in (("need", "faceid"), ("ckpt_name", "sd_xl_base_1.0.safetensors")):
                page.evaluate(
                    """([name, value]) => { for (const node of app.graph.nodes) for (const widget of node.widgets ?? [])
                       if (widget.name === name) widget.value = value;
                       const changes = app.extensionManager.workflow.activeWorkflow.changeTracker;
                       (changes.captureCanvasState ?? changes.checkState).call(changes) }""",
                    [name, value],
                )
            adapter = page.get_by_role("link", name="download ip-adapter-faceid-plusv2_sdxl.bin")
            adapter.wait_for()
            editor.settle()
            editor.shot(f"files of a need {renderer}")
            file = DOWNLOADS["ip-adapter-faceid-plusv2_sdxl.bin"]
            assert (adapter.get_attribute("href"), adapter.get_attribute("download")) == (file.url, file.name)
            assert page.get_by_role("link", name=re.compile("^download ")).count() == 4
            assert editor.prompt()[str(number)].keys() == {"need", "lora_strength", "provider", "model"}
            saved = next(node for node in editor.saved()["nodes"] if node["id"] == number)
            assert saved["widgets_values"] == ["faceid", 0.6, "CPU"]


def test_help_opens_with_its_picture(editor: Editor) -> None:
    page = editor.page
    for renderer in editor.renderers:
        editor.use(renderer)
        node = editor.add("ImagePromptApply")
        with editor.quiet(f"help, {renderer}"):
            page.evaluate("id => app.canvas.selectNode(app.graph.getNodeById(id))", node)
            page.get_by_test_id("info-button").click()
            page.get_by_role("heading", name="Recipe").wait_for()
            picture = page.locator("img[src*='docs/presets']").first
            picture.scroll_into_view_if_needed()
            page.wait_for_function("() => document.querySelector(\"img[src*='docs/presets']\").naturalWidth > 100")
            editor.shot(f"help {renderer}")
            if len(editor.renderers) > 1:
                page.get_by_role("button", name="Toggle properties panel").click()
            else:
                page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.node-library')")


def test_another_language_shows_translated_nodes(editor: Editor) -> None:
    texts = json.loads((WORKFLOWS[0].parents[1] / "locales/zh/texts.json").read_text("utf-8"))
    page = editor.page
    try:
        editor.server.post("/settings", {"Comfy.Locale": "zh"})
        page.reload()
        editor.ready()
        for renderer in editor.renderers:
            editor.use(renderer)
            node = editor.add("ImagePromptApply")
            editor.shot(f"zh {renderer}")
            assert editor.nodes()[str(node)].title == texts["Apply Adapter to Model"]
    finally:
        editor.server.post("/settings", {"Comfy.Locale": "en"})
        page.reload()
        editor.ready()
    node = editor.add("ImagePromptApply")
    assert editor.nodes()[str(node)].title == "Apply Adapter to Model"


# --- old nodes --------------------------------------------------------------------------------------------------------

OLD: dict[str, Any] = {
    "last_node_id": 3,
    "last_link_id": 1,
    "nodes": [
        {
            "id": number, "type": "IPAdapterNoise", "pos": [60 + 400 * i, 60], "size": [300, 130], "flags": {}, "order": i, "mode": 0,
            "inputs": [{"name": "image_optional", "type": "IMAGE", "link": link}],
            "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": links}],
            "properties": {}, "widgets_values": ["fade", 0.5, 3],
        }
        for i, (number, link, links) in enumerate([(1, None, [1]), (3, 1, list[int]())])
    ],
    "links": [[1, 1, 0, 3, 0, "IMAGE"]],
    "groups": [],
    "version": 0.4,
}  # fmt: skip


def choose(editor: Editor, where: tuple[float, float], item: str, seen: str) -> None:
    """An item of the menu at a place of the open graph, and read what the conversion says."""
    page = editor.page
    x, y = page.evaluate("at => app.canvas.ds.convertOffsetToCanvas(at)", list(where))
    box = page.evaluate("() => { const b = app.canvas.canvas.getBoundingClientRect(); return [b.x, b.y] }")
    page.mouse.click(box[0] + x, box[1] + y, button="right")
    entry = page.get_by_text(item, exact=True).first
    entry.wait_for(timeout=10_000)
    editor.shot(f"convert menu {item} {seen}")
    entry.click()
    told = page.get_by_role("dialog", name="old nodes converted")
    told.wait_for()
    editor.shot(f"converted {item} {seen}")
    told.get_by_role("button", name="Close").click()
    editor.settle()


def test_old_nodes_are_converted_one_by_one_or_all_and_back(editor: Editor) -> None:
    page = editor.page

    def types() -> list[str]:
        return [node["type"] for node in sorted(editor.saved()["nodes"], key=lambda node: node["id"])]

    for renderer in editor.renderers:
        editor.use(renderer)
        with editor.quiet(f"conversion, {renderer}"):
            editor.load(OLD)
            assert types() == ["IPAdapterNoise"] * 2
            choose(editor, (200, 45), "Convert to IP-Adapter Studio", renderer)
            assert types() == ["ImagePromptNoise", "IPAdapterNoise"]
            node = editor.saved()["nodes"][0]
            assert (node["widgets_values"], node["pos"]) == (["fade", 0.5, 3], [60, 60])
            choose(editor, (300, 400), "Convert all to IP-Adapter Studio", renderer)
            assert types() == ["ImagePromptNoise"] * 2
            assert editor.saved()["links"] == OLD["links"]
            for expected in (["ImagePromptNoise", "IPAdapterNoise"], ["IPAdapterNoise"] * 2):
                page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
                editor.settle()
                assert types() == expected
            page.evaluate("() => app.extensionManager.command.execute('Comfy.Redo')")
            editor.settle()
            assert types() == ["ImagePromptNoise", "IPAdapterNoise"]


OLD_INSIDE: dict[str, Any] = {
    "last_node_id": 7,
    "last_link_id": 2,
    "nodes": [
        {"id": 7, "type": "11111111-0000-4000-8000-000000000007", "pos": [0, 0], "size": [200, 60], "flags": {}, "order": 0, "mode": 0,
         "inputs": [], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": []}], "properties": {}},
        {**OLD["nodes"][0], "pos": [300, 0], "inputs": [], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": []}]},
    ],
    "links": [],
    "groups": [],
    "version": 0.4,
    "definitions": {"subgraphs": [{
        "id": "11111111-0000-4000-8000-000000000007", "version": 1, "revision": 0, "config": {}, "name": "noises", "widgets": [],
        "groups": [], "state": {"lastGroupId": 0, "lastNodeId": 7, "lastLinkId": 3, "lastRerouteId": 0},
        "inputNode": {"id": -10, "bounding": [-200, 0, 120, 60]}, "outputNode": {"id": -20, "bounding": [900, 0, 120, 60]},
        "inputs": [],
        "outputs": [{"id": "11111111-0000-4000-8000-000000000008", "name": "IMAGE", "type": "IMAGE", "linkIds": [3]}],
        "nodes": [OLD["nodes"][0], {**OLD["nodes"][1], "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [3]}]}],
        "links": [
            {"id": 1, "origin_id": 1, "origin_slot": 0, "target_id": 3, "target_slot": 0, "type": "IMAGE"},
            {"id": 3, "origin_id": 3, "origin_slot": 0, "target_id": -20, "target_slot": 0, "type": "IMAGE"},
        ],
    }]},
}  # fmt: skip


def test_an_old_node_inside_a_subgraph_is_converted_there(editor: Editor) -> None:
    """Alone, in the subgraph that stays open; and back."""
    page = editor.page

    def types() -> list[list[str]]:
        saved = editor.saved()
        graphs = [saved, *saved["definitions"]["subgraphs"]]
        # by place: newer editors number nodes anew that have the same number in two graphs
        return [[node["type"] for node in sorted(g["nodes"], key=lambda node: node["pos"][0])] for g in graphs]

    for renderer in editor.renderers:
        editor.use(renderer)
        with editor.quiet(f"conversion in a subgraph, {renderer}"):
            editor.load(OLD_INSIDE)
            outside, inside = types()
            editor.enter("noises")
            choose(editor, (200, 45), "Convert to IP-Adapter Studio", f"inside {renderer}")
            assert types() == [outside, ["ImagePromptNoise", inside[1]]]
            assert page.evaluate("() => app.canvas.graph.name") == "noises", "it stays open"
            page.evaluate("() => app.extensionManager.command.execute('Comfy.Undo')")
            editor.settle()
            assert types() == [outside, inside]


BLUEPRINT = "Reference image (IP-Adapter)"
"""Its name is all that the search box knows of it."""


@newest
def test_the_blueprint_opens_as_one_node_and_sends_three(editor: Editor) -> None:
    """ComfyUI offers what lies in subgraphs/ beside its own; older ones know none."""
    offered = editor.server.get("/global_subgraphs").values()
    ours = [entry["name"] for entry in offered if entry["info"]["node_pack"] == "custom_nodes.ipadapter-studio"]
    assert ours == [BLUEPRINT]
    blueprint = json.loads((WORKFLOWS[0].parents[1] / f"subgraphs/{BLUEPRINT}.json").read_text())
    for renderer in editor.renderers:
        editor.use(renderer)
        with editor.quiet("blueprint"):
            editor.load(blueprint)
        editor.shot(f"blueprint {renderer}")
        (node,) = editor.nodes().values()
        assert node.title == BLUEPRINT
        editor.page.evaluate(
            "() => { for (const widget of app.graph.nodes[0].widgets) if (widget.name === 'need') widget.value = 'style' }"
        )
        sent = list(editor.prompt().values())
        load, encode, apply = (next(s for s in sent if name in s) for name in ("need", "combine", "preset"))
        assert load["need"] == "style"
        number = apply["model"][0]
        assert apply["model"] == [number, 0]
        assert apply["adapter"] == encode["adapter"] == [number, 1]
        assert (encode["clip_vision"], encode["clip_vision_2"]) == ([number, 2], [number, 3])
        assert apply["strength"] == 0.8


# --- presets ----------------------------------------------------------------------------------------------------------


def test_a_preset_is_shown_while_its_name_is_pointed_at(editor: Editor) -> None:
    page = editor.page
    for renderer in editor.renderers:
        editor.use(renderer)
        node = editor.add("ImagePromptApply")
        with editor.quiet(f"pictures of presets, {renderer}"):
            if renderer == "classic":
                at = page.evaluate(
                    """id => { const n = app.graph.getNodeById(id), w = n.widgets.find(w => w.name === 'preset');
                    const [x, y] = app.canvas.ds.convertOffsetToCanvas([n.pos[0] + n.size[0] / 2, n.pos[1] + w.last_y + 10]);
                    const box = app.canvas.canvas.getBoundingClientRect(); return [x + box.x, y + box.y] }""",
                    node,
                )
                page.mouse.click(*at)
                entry = page.locator(".litemenu-entry", has_text="style transfer precise")
            else:
                page.get_by_role("combobox").nth(0).click()
                entry = page.get_by_role("option", name="style transfer precise")
            entry.hover()
            page.get_by_role("img", name="style transfer precise: style").wait_for()
            page.wait_for_timeout(500)
            editor.shot(f"preset picture {renderer}")
            page.keyboard.press("Escape")
            assert page.locator(".image-prompt-preset").count() == 0


SCHEDULED = {
    "last_node_id": 3,
    "last_link_id": 2,
    "nodes": [
        {"id": 1, "type": "CheckpointLoaderSimple", "pos": [0, 0], "size": [300, 100], "widgets_values": ["sd15.safetensors"],
         "outputs": [{"name": "MODEL", "type": "MODEL", "links": [1]}]},
        {"id": 2, "type": "ImagePromptSchedule", "pos": [0, 200], "size": [420, 500],
         "widgets_values": ["0: 1, 1: 1", "", False, 1.0, 1.0],
         "outputs": [{"name": "schedule", "type": "IMAGE_PROMPT_SCHEDULE", "links": [2]}]},
        {"id": 3, "type": "ImagePromptApply", "pos": [500, 0], "size": [330, 300],
         "inputs": [{"name": "model", "type": "MODEL", "link": 1},
                    {"name": "schedule", "type": "IMAGE_PROMPT_SCHEDULE", "link": 2}]},
    ],
    "links": [[1, 1, 0, 3, 0, "MODEL"], [2, 2, 0, 3, 1, "IMAGE_PROMPT_SCHEDULE"]],
    "groups": [],
    "version": 0.4,
}  # fmt: skip


def schedule_of(editor: Editor) -> tuple[str, str]:
    """Curve and table of the node 2."""
    inputs = editor.prompt()["2"]
    return inputs["curve"], inputs["sites"]


def test_a_curve_is_drawn_over_the_steps(editor: Editor) -> None:
    page = editor.page
    for renderer in editor.renderers:
        editor.use(renderer)
        with editor.quiet(f"curve, {renderer}"):
            editor.load(SCHEDULED)
            picture = page.get_by_role("group", name="strength over the steps")
            box = picture.bounding_box()
            assert box
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] * 0.2)
            middle = page.get_by_role("slider", name="point 2 of 3")
            added = parse_curve(schedule_of(editor)[0])
            assert (added[0], added[2]) == ((0.0, 1.0), (1.0, 1.0))
            assert 0.45 < added[1][0] < 0.55
            assert added[1][1] > 1
            editor.drag(middle, by=(0, box["height"] * 0.7))
            assert parse_curve(schedule_of(editor)[0])[1][1] < 0.3
            middle.press("ArrowUp")
            editor.shot(f"curve {renderer}")
            assert 0 < parse_curve(schedule_of(editor)[0])[1][1] < 0.4
            middle.press("Delete")
            assert schedule_of(editor)[0] == "0: 1, 1: 1"
            page.get_by_role("combobox", name="shape").select_option(label="strong start")
            assert parse_curve(schedule_of(editor)[0])[0] == (0.0, 1.5)
            editor.set_text(2, "curve", "0: 1, what")
            assert schedule_of(editor)[0] == "0: 1, what"
            assert "progress: factor" in page.locator(".image-prompt-error:visible").inner_text()


@newest
def test_a_curve_of_the_hosts_own_editor_comes_in(editor: Editor) -> None:
    """Drawn in ComfyUI's node, where it draws; ours says that it does not count then."""
    page = editor.page
    editor.use("nodes 2.0")
    with editor.quiet("the host's curve"):
        editor.load(SCHEDULED)
        page.evaluate(
            """() => { const curve = LiteGraph.createNode('CurveEditor'), schedule = app.graph.getNodeById(2); app.graph.add(curve);
                       curve.pos = [-500, 200];
                       curve.connect(0, schedule, schedule.inputs.findIndex(input => input.name === 'drawn')) }"""
        )
        editor.fit()
        editor.drag(page.get_by_test_id("curve-point").nth(1), by=(0, 60))
        editor.shot("curve of the host")
        sent = editor.prompt()
        number = sent["2"]["drawn"][0]
        (_, start), (_, end) = sent[number]["curve"]["points"]
        assert start == 0 < end < 1
        assert page.get_by_text("what is connected counts").locator("visible=true").count() == 1


def test_strengths_per_layer_are_bars_of_the_connected_model(
    editor: Editor, server: ComfyServer, model_cache: Path
) -> None:
    server.add_model("checkpoints", build_checkpoint("sd15", model_cache), "sd15.safetensors")
    page = editor.page
    for renderer in editor.renderers:
        editor.use(renderer)
        with editor.quiet(f"layers, {renderer}"):
            editor.load(SCHEDULED)
            page.get_by_role("button", name="strength per layer of the connected model").click()
            bars = page.locator(".image-prompt-bar")
            bars.nth(15).wait_for()
            assert bars.count() == 16
            editor.drag(bars.nth(0), to=bars.nth(1), down=0.75)
            assert schedule_of(editor)[1] == "t0: 0.5, t1: 0.5"
            group = page.get_by_role("spinbutton", name="all of output")
            group.fill("0.25")
            group.press("Enter")
            assert schedule_of(editor)[1] == "t0: 0.5, t1: 0.5, output: 0.25"
            page.get_by_role("combobox", name="fill from a preset").select_option(label="style transfer")
            editor.shot(f"layers {renderer}")
            factors = {rule.where: rule.factor for rule in parse_site_factors(schedule_of(editor)[1])}
            assert len(factors) == 16
            assert set(factors.values()) == {0.0, 1.0}
            page.get_by_role("button", name="everywhere 1").click()
            assert schedule_of(editor)[1] == ""


def in_subgraphs(graph: dict[str, Any]) -> dict[str, Any]:
    """The graph with what loads the model and what applies it each in a subgraph of its own."""

    def subgraph(name: str, node: dict[str, Any], inputs: list[str], outputs: list[str]) -> dict[str, Any]:
        into = [
            {"id": i, "origin_id": -10, "origin_slot": i, "target_id": 1, "target_slot": i, "type": t}
            for i, t in enumerate(inputs)
        ]
        out = [
            {"id": 10 + i, "origin_id": 1, "origin_slot": i, "target_id": -20, "target_slot": i, "type": t}
            for i, t in enumerate(outputs)
        ]
        return {
            "id": name, "version": 1, "revision": 0, "config": {}, "name": name, "widgets": [], "groups": [],
            "state": {"lastGroupId": 0, "lastNodeId": 1, "lastLinkId": 20, "lastRerouteId": 0},
            "inputNode": {"id": -10, "bounding": [-200, 0, 120, 60]}, "outputNode": {"id": -20, "bounding": [600, 0, 120, 60]},
            "inputs": [{"id": f"{name}-in-{i}", "name": NAMES[t], "type": t, "linkIds": [i]} for i, t in enumerate(inputs)],
            "outputs": [{"id": f"{name}-out-{i}", "name": NAMES[t], "type": t, "linkIds": [10 + i]} for i, t in enumerate(outputs)],
            "nodes": [node], "links": [*into, *out],
        }  # fmt: skip

    loader, _, apply = graph["nodes"]
    names = ["11111111-0000-4000-8000-000000000001", "11111111-0000-4000-8000-000000000003"]
    loader_in = {**DEMO, "id": 1, "outputs": [{"name": "model", "type": "MODEL", "links": [10]}]}
    apply_in = {
        **apply, "id": 1,
        "inputs": [{**entry, "link": i} for i, entry in enumerate(apply["inputs"])],
    }  # fmt: skip
    definitions = [
        subgraph(names[0], loader_in, [], ["MODEL"]),
        subgraph(names[1], apply_in, ["MODEL", "IMAGE_PROMPT_SCHEDULE"], []),
    ]
    return {
        **graph,
        "nodes": [
            {**loader, "type": names[0], "widgets_values": []},
            graph["nodes"][1],
            {**apply, "type": names[1]},
        ],
        "definitions": {"subgraphs": definitions},
    }


NAMES = {"MODEL": "model", "IMAGE_PROMPT_SCHEDULE": "schedule"}
DEMO = {
    "id": 1, "type": "ImagePromptDemoWorld", "pos": [0, 0], "size": [300, 160], "widgets_values": ["fox", "plus"],
    "outputs": [{"name": "model", "type": "MODEL", "links": [1]}],
}  # fmt: skip


def test_layers_of_the_demo_world_are_bars_also_through_subgraphs(editor: Editor) -> None:
    page = editor.page
    plain = {**SCHEDULED, "nodes": [DEMO, *SCHEDULED["nodes"][1:]]}
    for renderer in editor.renderers:
        editor.use(renderer)
        for name, graph in (("plain", plain), ("subgraphs", in_subgraphs(plain))):
            with editor.quiet(f"layers of the demo world, {name}, {renderer}"):
                editor.load(json.loads(json.dumps(graph)))
                page.get_by_role("button", name="strength per layer of the connected model").click()
                bars = page.locator(".image-prompt-bar")
                bars.nth(6).wait_for()
                editor.shot(f"layers of the demo world {name} {renderer}")
                assert bars.count() == 7
                assert page.get_by_text("Demo World", exact=False).last.is_visible()
