"""ComfyUI's editor in a real browser, for tests of what people see: one page per host, both renderers of nodes."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Response, sync_playwright

from host.comfy_server import ComfyServer

CHROMIUM = os.environ.get("IMAGE_PROMPT_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
"""The browser; ``apt install chromium`` brings it."""

SCREENSHOTS = os.environ.get("IMAGE_PROMPT_SCREENSHOTS")
"""Environment variable: a folder where pictures of what was tested are written, for a person to look at."""

CLASSIC, NODES_2 = "classic", "nodes 2.0"
RENDERERS = (CLASSIC, NODES_2)

SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.Graph.CanvasInfo": False,
}

HOSTS_OWN = re.compile(
    r"Failed to load resource|Content Security Policy|Fetch API cannot load https://|for graph that was never set up|primevue/autocomplete"
)
"""What the host's own frontend writes as errors: files of users that are not there yet, models that it would look up, a graph that
takes the place of one whose subgraph is open, a search box that is closed."""

TRANSLATED_HELP = re.compile(r"/docs/[^/]+/[^/]+\.md$")
"""Help pages are asked for in the editor's language first, then in the one in which they are written."""

READY = """() => window.app?.graph && window.app.extensionManager && window.app.vueAppReady !== false
  && window.LiteGraph?.registered_node_types?.ImagePromptApply && window.app.canvas?.graph"""

SETTLE = """async () => {
  const seen = () => JSON.stringify(app.canvas.graph.nodes.map(node => [...node.pos, ...node.size]));
  for (let calm = 0, last = '', tries = 0; calm < 3 && tries < 200; tries++) {
    app.canvas.setDirty(true, true);
    await new Promise(requestAnimationFrame);
    calm = seen() === last ? calm + 1 : 0;
    last = seen();
  }
}"""

FIT = """() => {
  const boxes = [...app.canvas.graph.nodes.map(n => [n.pos[0], n.pos[1] - 30, n.size[0], n.size[1] + 30]),
                 ...(app.canvas.graph.groups ?? []).map(g => [...g._bounding])];
  if (!boxes.length) return;
  const left = Math.min(...boxes.map(b => b[0])), top = Math.min(...boxes.map(b => b[1]));
  const right = Math.max(...boxes.map(b => b[0] + b[2])), bottom = Math.max(...boxes.map(b => b[1] + b[3]));
  const view = app.canvas.ds;
  view.scale = Math.min(1400 / (right - left), 780 / (bottom - top), 1.5);
  view.offset = [-left + 90 / view.scale, -top + 110 / view.scale];
  app.canvas.setDirty(true, true);
}"""

EMPTY: Mapping[str, Any] = {
    "last_node_id": 0,
    "last_link_id": 0,
    "nodes": [],
    "links": [],
    "groups": [],
    "version": 0.4,
}

TITLE = 30
"""Height of a node's title, which lies above its position."""


class Editor:
    """A page with the editor of one server."""

    def __init__(self, browser: Browser, server: ComfyServer, sharp: float = 1) -> None:
        self.server = server
        self.errors: list[str] = []
        server.post("/settings", SETTINGS)
        self.page: Page = browser.new_page(viewport={"width": 1600, "height": 1000}, device_scale_factor=sharp)
        self.page.on("console", self._heard)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("response", self._answered)
        self.page.goto(server.url)
        self.ready()

    def ready(self) -> None:
        """Wait until the page has started, with nothing open."""
        self.page.wait_for_function(READY, timeout=120_000)
        self.load(EMPTY)
        self.errors.clear()  # those of the host's own start

    def _heard(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not HOSTS_OWN.search(message.text):
            self.errors.append(message.text)

    def _answered(self, response: Response) -> None:
        ours = "/extensions/ipadapter-studio/" in response.url or "/image_prompt/" in response.url
        if ours and response.status >= 400 and not TRANSLATED_HELP.search(response.url):
            self.errors.append(f"{response.status} {response.url}")

    @property
    def renderers(self) -> tuple[str, ...]:
        """Those that the host has; the newer one of older frontends was a trial."""
        version: str = self.page.evaluate("() => window.__COMFYUI_FRONTEND_VERSION__")
        return RENDERERS if tuple(map(int, version.split(".")[:2])) >= (1, 40) else (CLASSIC,)

    def use(self, renderer: str) -> None:
        """Draw nodes with this renderer from now on."""
        if renderer not in self.renderers:
            raise ValueError(f"{self.server.host.name} has no {renderer}")
        self.page.evaluate("on => app.extensionManager.setting.set('Comfy.VueNodes.Enabled', on)", renderer == NODES_2)
        self.settle()

    def load(self, workflow: Mapping[str, Any]) -> None:
        """Open a workflow in place of what is there, whole in view."""
        self.page.evaluate("graph => app.loadGraphData(graph)", workflow)
        self.page.evaluate("() => app.extensionManager.toast.removeAll()")  # older hosts find fault with small graphs
        self.fit()

    def empty(self) -> None:
        """Open a graph without nodes."""
        self.load(EMPTY)

    def add(self, kind: str) -> int | str:
        """Open a graph of one node with the widgets that it begins with; returns the node's id."""
        self.load(EMPTY)
        made = self.page.evaluate(
            "kind => { const node = LiteGraph.createNode(kind); app.graph.add(node); node.pos = [0, 0]; return node.id }",
            kind,
        )
        self.fit()
        return made

    def enter(self, subgraph: str) -> None:
        """Open a subgraph of the open graph, by its name."""
        self.page.evaluate(
            "name => app.canvas.setGraph([...(app.rootGraph ?? app.graph).subgraphs.values()].find(g => g.name === name))",
            subgraph,
        )
        self.fit()

    def fit(self) -> None:
        """Have the whole open graph in view."""
        self.page.evaluate(FIT)
        self.settle()

    def settle(self) -> None:
        """Wait until the page has drawn what was asked for: some frames in a row without a change of a size."""
        self.page.evaluate(SETTLE)

    def nodes(self) -> dict[str, Node]:
        """The open graph's nodes, as they are drawn."""
        found = self.page.evaluate(
            """() => app.graph.nodes.map(n => [String(n.id), n.type, n.title, [...n.pos],
                                             n.flags.collapsed ? [n._collapsed_width ?? 0, 0] : [...n.size]])"""
        )
        return {number: Node(kind, title, *pos, *size) for number, kind, title, pos, size in found}

    def prompt(self) -> dict[str, dict[str, Any]]:
        """What Run would send: inputs of every node, by its id."""
        sent = self.page.evaluate("async () => (await app.graphToPrompt()).output")
        return {number: node["inputs"] for number, node in sent.items()}

    def saved(self) -> dict[str, Any]:
        """The open graph as ComfyUI's menu would save it."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).workflow")

    def set_text(self, node: int | str, name: str, text: str) -> None:
        """Give a widget a value from elsewhere, as a loaded graph does."""
        self.page.evaluate(
            "([id, name, text]) => { app.graph.getNodeById(id).widgets.find(w => w.name === name).value = text }",
            [node, name, text],
        )
        self.settle()

    def drag(
        self, what: Locator, *, by: tuple[float, float] = (0, 0), to: Locator | None = None, down: float = 0.5
    ) -> None:
        """Press in the middle of an element (``down``: at this part of its height), move, let go."""
        start, end = what.bounding_box(), (to or what).bounding_box()
        assert start, f"{what} is not seen"
        assert end, f"{to} is not seen"
        mouse = self.page.mouse
        mouse.move(start["x"] + start["width"] / 2, start["y"] + start["height"] * down)
        mouse.down()
        mouse.move(end["x"] + end["width"] / 2 + by[0], end["y"] + end["height"] * down + by[1], steps=8)
        mouse.up()
        self.settle()

    def shot(self, name: str) -> None:
        """Write what is seen to the folder for pictures, if there is one."""
        if SCREENSHOTS:
            folder = Path(SCREENSHOTS) / self.server.host.name
            folder.mkdir(parents=True, exist_ok=True)
            self.page.screenshot(path=folder / f"{re.sub('[^a-zA-Z0-9.]+', '_', name)}.png")

    @contextmanager
    def quiet(self, what: str) -> Generator[None]:
        """Fails if the page writes an error meanwhile."""
        self.errors.clear()
        yield
        assert self.errors == [], f"{what}: {self.errors}"


@dataclass(frozen=True)
class Node:
    """A node as it is drawn, in the graph's own units; ``y`` is below the title, of a folded one the end of it."""

    kind: str
    title: str
    x: float
    y: float
    width: float
    height: float

    def inside(self, box: Sequence[float], slack: float = 1) -> bool:
        """Whether all of it, title included, lies in ``box``: x, y, width, height."""
        left, top, width, height = box
        return (
            left - slack <= self.x
            and self.x + self.width <= left + width + slack
            and top - slack <= self.y - TITLE
            and self.y + self.height <= top + height + slack
        )


@contextmanager
def editor(server: ComfyServer, sharp: float = 1) -> Generator[Editor]:
    """An editor in a browser of its own; ``sharp`` pixels of a screenshot for one of the page."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield Editor(browser, server, sharp)
        finally:
            browser.close()
