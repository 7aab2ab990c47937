"""What other programs and the widgets of this pack may ask over HTTP below ``/image_prompt/``, one table of routes.

Answers are about files that ComfyUI's lists offer, by the names on these lists, and read nothing else. An error of ours is
400 with its sentence: ``{"error": "…"}``. A new route is a function and a line in ``ROUTES``.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Literal

from aiohttp import web
from server import PromptServer

from ...ipadapter_core import COMPATIBILITIES, SCALINGS, InvalidInputError, describe_adapter, describe_spec, spec_facts
from ...ipadapter_core.attention.presets import preset_facts
from ...ipadapter_core.errors import AdapterError, one_line, quoted
from ...ipadapter_core.files.text import as_table, parse_json, read_text
from ...ipadapter_core.legacy.migrate import migrate_graph
from ...ipadapter_core.legacy.migrate.names import OLD_TYPES
from ...ipadapter_core.lora import LoRAWeights, describe_lora, load_lora, parse_where
from ...ipadapter_core.lora.blocks import block_shares, parse_presets, presets_for
from ...ipadapter_core.lora.inspection import draw_heat_map, heat_map, lora_facts
from ...ipadapter_core.narrowing import is_row
from . import by_need, demo, files, sites

PREFIX = "/image_prompt/"
LONGEST = 1000
"""Most characters of a name that is asked for."""
MOST_BYTES = 2 * 2**30
"""Of a file whose numbers are all read for one answer; the largest LoRAs that people share have half of it."""
MOST_POSTED = 32 * 2**20
"""Bytes of a body; a large workflow has one or two million."""
KEPT = 64
"""Answers of a kind that are kept; they are of a file as it was, and asked for anew when it has changed."""

LORA_PRESETS = "image_prompt/lora_presets.txt"
"""Block presets of the user, below ComfyUI's user folder: ``NAME: 1,0,0.5,…`` or ``NAME: all: 0, in4: 1``, one a line."""

Query = Mapping[str, str]
Answer = Mapping[str, object] | bytes
"""A table, sent as JSON, or a PNG."""


@dataclass(frozen=True, slots=True)
class Route:
    """``GET /image_prompt/<path>``: ``answer`` gets the query, in a thread beside the server's loop, one request at a time."""

    path: str
    answer: Callable[[Query], Answer]


@dataclass(frozen=True, slots=True)
class Posted:
    """``POST /image_prompt/<path>``: ``answer`` gets the body, at most ``MOST_POSTED`` bytes, likewise."""

    path: str
    answer: Callable[[bytes], Answer]


def facts_of_adapter(query: Query) -> Answer:
    """``?file=``: what an adapter file of ``models/ipadapter`` is, and which encoder it needs. Of a safetensors file the header is read."""
    return _adapter(files.version("ipadapter", _asked(query, "file")), query["file"])


@lru_cache(KEPT)
def _adapter(version: files.Version, name: str) -> Answer:
    if version[2] > MOST_BYTES and not name.lower().endswith(".safetensors"):  # pickles are read whole
        raise InvalidInputError(
            f"{quoted(name)} has {version[2] / 1e9:.1f} GB; files up to {MOST_BYTES / 1e9:.1f} GB are read here, use the node Inspect Adapter"
        )
    spec = describe_adapter(version[0], name=name)
    facts = {key: one_line(value, 300) if isinstance(value, str) else value for key, value in spec_facts(spec).items()}
    left_out = {one_line(group): count for group, count in spec.left_out.items()}
    return {"name": name, **facts, "left_out": left_out, "text": describe_spec(spec, name)}


def presets(query: Query) -> Answer:
    """Nothing asked: the weight presets and scalings that apply nodes offer, what each does and what of a model it needs."""
    return {"presets": preset_facts(), "scalings": list(SCALINGS), "compatibilities": list(COMPATIBILITIES)}


def facts_of_lora(query: Query) -> Answer:
    """``?file=``: what a LoRA file is, of ``models/loras``. Of its numbers only alphas are read."""
    return _facts(files.version("loras", _asked(query, "file")), query["file"])


@lru_cache(KEPT)
def _facts(version: files.Version, name: str) -> Answer:
    facts = lora_facts(version[0], name=name)
    return {
        "name": facts["name"],
        "base_model": facts["base_model"],
        "key_format": facts["key_format"],
        "modules": facts["modules"],
        "algorithms": facts["algorithms"],
        "ranks": facts["ranks"],
        "parameters": facts["parameters"],
        "not_applied": facts["not_applied"],
        "notes": facts["notes"],
        "trigger_words": facts["trigger_words"],
        "tags": {one_line(tag): count for tag, count in facts["tags"].items()},
        "training": {key: one_line(value, 300) for key, value in facts["training"].items()},
    }


def heat_map_of_lora(query: Query) -> Answer:
    """``?file=``: a picture of how strongly a LoRA changes each block and kind of layer."""
    version = files.version("loras", _asked(query, "file"))
    if version[2] > MOST_BYTES:
        raise InvalidInputError(
            f"{quoted(query['file'])} has {version[2] / 1e9:.1f} GB; heat maps are sent of files up to {MOST_BYTES / 1e9:.1f} GB, "
            "use the node Inspect LoRA"
        )
    return _heat_map(version, query["file"])


@lru_cache(KEPT)
def _heat_map(version: files.Version, name: str) -> Answer:
    picture = io.BytesIO()
    draw_heat_map(heat_map(load_lora(version[0], name=name)), name).save(picture, "PNG")
    return picture.getvalue()


def blocks_of_lora(query: Query) -> Answer:
    """``?file=&selector=``: the blocks of a LoRA's layers, the factors that a selector gives them, and its rules one by one."""
    weights = _described(files.version("loras", _asked(query, "file")), query["file"])
    selector = parse_where(query.get("selector", ""), weights.base_model)
    shares = block_shares(weights, selector)
    return {
        "base_model": weights.base_model,
        "blocks": [{"block": s.block, "layers": s.layers, "low": s.low, "high": s.high} for s in shares],
        "rules": [{"where": rule.where, "factor": rule.factor} for rule in selector.rules],
    }


@lru_cache(8)
def _described(version: files.Version, name: str) -> LoRAWeights:
    return describe_lora(version[0], name=name)


def presets_of_lora(query: Query) -> Answer:
    """``?base_model=``: names of the block presets for it, and those in the user's file, with what they mean."""
    own = files.user_file(LORA_PRESETS)
    found = parse_presets(read_text(own)) if own.is_file() else {}
    return {"presets": presets_for(_asked(query, "base_model")), "own": found, "file": f"user/{LORA_PRESETS}"}


def sites_of_model(query: Query) -> Answer:
    """``?kind=&file=&sites=``: the layers where image prompts act in a model, with the factors that a site table gives them.

    The model of the node Demo World is ``kind=demo``, without a file.
    """
    kind = _kind_of_model(query)
    if kind is None:
        return sites.site_table(demo.layout(), query.get("sites", ""))
    layout = sites.layout_of_file(files.version(kind, _asked(query, "file")), query["file"])
    return sites.site_table(layout, query.get("sites", ""))


def files_of_need(query: Query) -> Answer:
    """``?need=&kind=&file=``: the files that a need takes on a model, each with the one that is there or what to download.

    The model's own file may be missing: then its name tells what it is.
    """
    kind = _kind_of_model(query)
    if kind is None:
        raise InvalidInputError("Demo World has its own adapter and image encoder: connect these outputs of it instead")
    found = by_need.files_for(_asked(query, "need"), kind, _asked(query, "file"))
    return {"files": [asdict(one) | {"comes_as": one.public.comes_as if one.public else ""} for one in found]}


def _kind_of_model(query: Query) -> Literal["checkpoints", "diffusion_models"] | None:
    """The folder that a model's file is of; None for the demo world's, which is no file."""
    kind = query.get("kind", "")
    if kind == "demo":
        return None
    if kind == "checkpoints" or kind == "diffusion_models":
        return kind
    raise InvalidInputError(
        f"the query needs kind=checkpoints, kind=diffusion_models or kind=demo; it has {quoted(kind)}"
    )


def _asked(query: Query, name: str) -> str:
    """A value of the query. Raises InvalidInputError where it is missing, too long or no text."""
    value = query.get(name, "")
    if not 0 < len(value) <= LONGEST or not value.isprintable():
        raise InvalidInputError(
            f"the query needs {name}=, a name of at most {LONGEST:,} characters; it has {quoted(value)}"
        )
    return value


def migrated(body: bytes) -> Answer:
    """``{"workflow": …, "nodes": [numbers], "subgraph": id}``: a graph of old nodes with ours, as ``ipadapter migrate`` writes it,
    and what changed.

    ``nodes`` are those that shall change, all without it; with ``subgraph`` they are nodes of that one. Nothing is read but the
    body, nothing written.
    """
    asked = as_table(parse_json(body, "the workflow", constants=True))
    nodes = asked.get("nodes")
    only = [node for node in nodes if isinstance(node, (int, str))] if is_row(nodes) else None
    subgraph = asked.get("subgraph")
    made = migrate_graph(asked.get("workflow"), only=only, inside=subgraph if isinstance(subgraph, str) else None)
    return {"workflow": made.graph, "report": made.report, "found": made.found, "rewritten": made.rewritten}


def old_types(query: Query) -> Answer:
    """Nothing asked: class types of other packs that ``migrate`` knows."""
    return {"types": sorted(OLD_TYPES)}


ROUTES: tuple[Route | Posted, ...] = (
    Posted("migrate", migrated),
    Route("migrate", old_types),
    Route("inspect", facts_of_adapter),
    Route("presets", presets),
    Route("lora/blocks", blocks_of_lora),
    Route("lora/facts", facts_of_lora),
    Route("lora/heatmap", heat_map_of_lora),
    Route("lora/presets", presets_of_lora),
    Route("needs", files_of_need),
    Route("sites", sites_of_model),
)


def register() -> None:
    """Make the routes known to ComfyUI's server, which serves them below ``/api`` too."""
    one_at_a_time, routes = asyncio.Lock(), PromptServer.instance.routes
    for route in ROUTES:
        at = routes.get if isinstance(route, Route) else routes.post
        at(PREFIX + route.path)(_handler(route, one_at_a_time))


def _handler(route: Route | Posted, one_at_a_time: asyncio.Lock) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def handle(request: web.Request) -> web.Response:
        try:
            if isinstance(route, Route):
                ask: Callable[[], Answer] = partial(route.answer, request.query)
            else:
                ask = partial(route.answer, await _body(request))
            async with one_at_a_time:
                answer = await asyncio.to_thread(ask)
        except (AdapterError, OSError) as error:
            return web.json_response({"error": str(error)}, status=400)
        if isinstance(answer, bytes):
            return web.Response(body=answer, content_type="image/png")
        return web.json_response(answer)

    return handle


async def _body(request: web.Request) -> bytes:
    """What was posted. Raises InvalidInputError beyond the limit, before more of it is read."""
    body = bytearray()
    async for part in request.content.iter_chunked(2**16):
        body += part
        if len(body) > MOST_POSTED:
            raise InvalidInputError(f"more than {MOST_POSTED >> 20} MiB were sent; no workflow is as large")
    return bytes(body)
