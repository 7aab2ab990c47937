"""Which family of models a checkpoint is of, told by its name: presets of unified loaders mean other files for each."""

from __future__ import annotations

import re
from collections.abc import Iterable

from ...errors import quoted
from ...known_files import KNOWN_FILES, preset_of
from .graph import FAR, REROUTE, Migration, Node, NodeId, table

# The first that is found in a name (folders too) decides. Names of models, not of LoRAs or ControlNets.
_SIGNS: tuple[tuple[str, str], ...] = (
    (
        r"flux|chroma|sd[-_. ]?3|stable[-_ ]?diffusion[-_ ]?3|hunyuan|pixart|aura[-_ ]?flow|lumina|neta[-_ ]?yume|hidream|qwen"
        r"|\bwan[-_ ]?2|\bltx|cascade|z[-_ ]?image|\bsvd|zero123|ace[-_ ]?step|stable[-_ ]?audio|cosmos[-_ ]?(predict|[12])|omnigen|kandinsky"
        r"|deepfloyd",
        "",
    ),
    (r"sd[-_. ]?2[-_.]?[01](?!\d)|stable[-_ ]?diffusion[-_ ]?2|(^|[/\\|])v2[-_.][01]|768[-_]?v?[-_]?ema|512[-_]?(base|inpainting|depth)[-_]?ema", ""),
    (r"sd[-_. ]?v?1[-_.]?[45](?!\d)|stable[-_ ]?diffusion[-_ ]?v?1[-_.]?[45]|(^|[/\\|])v1[-_.][45]", "sd15"),
    (
        r"xl|illustrious|pony|noob[-_ ]?ai|\bnoob|animagine|\bwai|[-_ ]wai[-_A-Z]|kolors|ssd[-_ ]?1b|playground[-_ ]?v?2|juggernaut[-_ ]?x"
        r"|hassaku|autism[-_ ]?mix|\bil[-_. ]|[-_ ]il[-_. ]|obsession|nova[-_ ]?(anime|furry)|proteus|copax|segmind[-_ ]?vega",
        "sdxl",
    ),
    (
        r"dreamshaper|realistic[-_ ]?vision|epic[-_ ]?realism|epic[-_ ]?photo|anything|deliberate|rev[-_ ]?animated|majic[-_ ]?mix"
        r"|counterfeit|chillout|absolute[-_ ]?reality|cyberrealistic|photon|orange[-_ ]?mix|aom[23]|meina|toon[-_ ]?you|openjourney"
        r"|ghostmix|lyriel|pastel[-_ ]?mix|juggernaut[-_ ]?(reborn|aftermath)|analog[-_ ]?diffusion|nai[-_ ]|disney[-_ ]?pixar"
        r"|aniverse|rpg[-_ ]?v[45]|awpainting|dark[-_ ]?sushi|henmix|japanese[-_ ]?style[-_ ]?realistic|hyper[-_ ]?realism|lofi",
        "sd15",
    ),
)  # fmt: skip
_FILE = re.compile(r"\.(safetensors|ckpt|sft|gguf|pt|bin)$", re.IGNORECASE)
_LOADER = re.compile(
    r"checkpoint|ckpt|unet|diffus\w* ?model|efficient|full ?loader|\ba1111 ?loader|model ?loader", re.IGNORECASE
)
_NOT_A_MODEL = re.compile(r"lora|controlnet|vae|clip|upscale|ipadapter|insightface|style|gligen", re.IGNORECASE)


def base_of_name(name: str) -> str | None:
    """``sd15`` or ``sdxl``; empty for a family that the presets have no files for, None where the name does not tell."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name[:300]) + "|" + name[:300]
    return next((base for signs, base in _SIGNS if re.search(signs, name, re.IGNORECASE)), None)


def checkpoint_names(node: Node) -> list[str]:
    """Files of models that a node names; some packs' widgets are tables that hold the name."""
    if not _LOADER.search(node.type) or _NOT_A_MODEL.search(node.type):
        return []
    values = node.widgets.values() if isinstance(node.widgets, dict) else node.widgets
    texts = [table(value).get("content", value) for value in values]
    return [text for text in texts if isinstance(text, str) and _FILE.search(text)][:1]


class Bases:
    """The family behind each loader: as said, else of the checkpoint that feeds it, else of all in the file if they agree."""

    def __init__(self, said: str | None, nodes: Iterable[Node]) -> None:
        self.said = said
        self.names = list(dict.fromkeys(name for node in nodes for name in checkpoint_names(node)))

    def of(self, made: Migration, number: NodeId) -> tuple[str, str]:
        """The family for a loader, or an empty text and why that is not known."""
        preset = made.nodes[number].named(("preset",)).get("preset")
        only = {entry.base for entry in KNOWN_FILES if isinstance(preset, str) and entry.preset == preset_of(preset)}
        if self.said:
            return self.said, ""
        names = self._feeding(made, number) or self.names
        bases = {base_of_name(name) for name in names}
        if len(bases) == 1 and None not in bases:
            (base,) = bases
            return (base, "") if base else ("", f"{quoted(names[0])} is of a family that its presets have no files for")
        if len(only) == 1:
            return only.pop(), ""
        shown = " and ".join(quoted(name) for name in names[:3]) or "the file, which names no checkpoint,"
        return "", f"{shown} does not tell SD1.5 from SDXL: add --base sd15 or --base sdxl"

    def _feeding(self, made: Migration, number: NodeId) -> list[str]:
        """The checkpoint that a node's model comes from, through whatever changes the model in between."""
        todo, seen, left = [number], {number}, FAR
        while todo and left > 0:
            into = made.edges.first(todo.pop(), left)
            left -= max(len(into), 1)
            for name, edge in into:
                if edge.source in seen or edge.source not in made.nodes:
                    continue
                if edge.type != "MODEL" and name != "model" and made.type_of(edge.source) != REROUTE:
                    continue
                seen.add(edge.source)
                found = checkpoint_names(made.nodes[edge.source])
                if found:
                    return found
                todo.append(edge.source)
        return []
