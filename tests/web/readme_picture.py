"""README's first picture: a graph of ComfyUI's editor beside what it makes, from the demo world.

``python tests/web/readme_picture.py`` starts a ComfyUI, builds the graph, runs it and writes ``nodes/web/docs/graph.webp``.
Look at it before you commit it.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image

FILE = Path(__file__).resolve().parents[2] / "nodes/web/docs/graph.webp"
WIDTH, HEIGHT = 1156, 616
"""Of the part of the canvas that is shown, in the graph's own units, which are pixels at scale 1."""
SHARP = 1.5
"""Pixels of the file for one of the canvas."""
MARGIN = 12

BUILD = """async () => {
  const graph = app.graph;
  const add = (kind, title, pos, size, values, collapsed) => {
    const node = LiteGraph.createNode(kind);
    graph.add(node);
    if (title) node.title = title;
    node.pos = pos;
    if (size) node.setSize(size);
    for (const [name, value] of Object.entries(values ?? {})) node.widgets.find(one => one.name === name).value = value;
    if (collapsed) node.collapse();
    return node;
  };
  const link = (from, output, to, input) =>
    from.connect(from.outputs.findIndex(one => one.name === output), to, to.inputs.findIndex(one => one.name === input));
  const world = add('ImagePromptDemoWorld', null, [0, 30], [250, 190], { reference: 'sunflower', adapter: 'plus' });
  const reference = add('PreviewImage', 'The reference', [0, 330], [250, 270]);
  const text = add('CLIPTextEncode', 'The text', [300, 30], [290, 90], { text: 'fox face on red background' });
  const nothing = add('CLIPTextEncode', 'Negative text', [300, 180], null, { text: '' }, true);
  const latent = add('EmptyLatentImage', null, [640, 300], null, { width: 128, height: 128, batch_size: 1 }, true);
  const steer = add('ImagePromptApplyImage', null, [300, 240], [290, 250], { strength: 1 });
  const after = (model, output, y, title) => {
    const sample = add('KSampler', 'KSampler', [640, y + 50], null,
      { seed: 1, steps: 20, cfg: 2, sampler_name: 'euler_ancestral', scheduler: 'sgm_uniform' }, true);
    const decode = add('VAEDecode', 'VAE Decode', [640, y + 110], null, {}, true);
    const picture = add('PreviewImage', title, [890, y], [265, 270]);
    link(model, output, sample, 'model');
    link(text, 'CONDITIONING', sample, 'positive');
    link(nothing, 'CONDITIONING', sample, 'negative');
    link(latent, 'LATENT', sample, 'latent_image');
    link(sample, 'LATENT', decode, 'samples');
    link(world, 'vae', decode, 'vae');
    link(decode, 'IMAGE', picture, 'images');
  };
  link(world, 'image', reference, 'images');
  link(world, 'clip', text, 'clip');
  link(world, 'clip', nothing, 'clip');
  for (const name of ['model', 'adapter', 'clip_vision', 'image']) link(world, name, steer, name);
  after(world, 'model', 30, 'The text alone');
  after(steer, 'model', 330, 'The text and the image');
}"""

VIEW = """([scale, x, y]) => {
  app.canvas.ds.scale = scale;
  app.canvas.ds.offset = [x, y];
  app.canvas.setDirty(true, true);
}"""


def drawn(renderer: str) -> Image.Image:
    """The graph after a run, as the editor shows it."""
    from host.comfy_server import ComfyServer, find_hosts
    from web.browser import editor

    with (
        tempfile.TemporaryDirectory() as folder,
        ComfyServer(find_hosts()[0], Path(folder)) as server,
        editor(server, SHARP) as opened,
    ):
        page = opened.page
        opened.use(renderer)
        opened.empty()
        page.evaluate(BUILD)
        page.evaluate("async () => { await app.queuePrompt(0, 1) }")
        for _ in range(600):
            if server.get("/history"):
                break
            page.wait_for_timeout(500)
        else:
            raise TimeoutError(server.log[-2000:])
        page.wait_for_function(
            "() => app.graph.nodes.filter(one => one.type === 'PreviewImage').every(one => one.imgs?.length)"
        )
        left, top = 150, 120
        page.evaluate(VIEW, [1, left, top])
        opened.settle()
        page.wait_for_timeout(1500)
        shot = page.screenshot(
            clip={"x": left - MARGIN, "y": top - MARGIN, "width": WIDTH + 2 * MARGIN, "height": HEIGHT + 2 * MARGIN}
        )
    return Image.open(io.BytesIO(shot)).convert("RGB")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    picture = drawn(sys.argv[1] if len(sys.argv) > 1 else "nodes 2.0")
    picture.save(FILE, quality=82, method=6)
    print(f"{FILE}: {picture.width} x {picture.height}, {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
