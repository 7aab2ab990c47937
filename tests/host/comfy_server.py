"""A real ComfyUI server as a subprocess, and the few HTTP calls tests need. Standard library, numpy and Pillow only."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

REPOSITORY = Path(__file__).resolve().parents[2]
PACK_NAME = "ipadapter-studio"
TEST_PACK = Path(__file__).resolve().parent / "test_pack"
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "tests", "*.egg-info", "build", "dist", "venv")
ANSI_COLOUR = re.compile(r"\x1b\[[0-9;]*m")

Link = list[Any]  # [node id, output index], as in ComfyUI's API format


class ComfyError(RuntimeError):
    """Something the server said no to."""


class ServerFailed(ComfyError):
    """The server did not start, or died; the message ends with its log."""


class GraphRejected(ComfyError):
    """POST /prompt answered 400: the graph did not validate. `errors` is the server's JSON."""

    def __init__(self, message: str, errors: dict[str, Any]) -> None:
        super().__init__(message)
        self.errors = errors


class ExecutionFailed(ComfyError):
    """A node raised while the graph ran. `message` is the node's own text."""

    def __init__(self, details: Mapping[str, Any]) -> None:
        self.node_id = str(details.get("node_id"))
        self.node_type = str(details.get("node_type"))
        self.exception_type = str(details.get("exception_type"))
        self.message = str(details.get("exception_message")).strip()
        self.traceback = "".join(details.get("traceback") or [])
        super().__init__(
            f"node {self.node_id} ({self.node_type}) raised {self.exception_type}: {self.message}\n{self.traceback}"
        )


class ExecutionInterrupted(ComfyError):
    """The run was stopped by interrupt()."""


class Node:
    """One node of a Graph; `node[i]` is the link to its i-th output."""

    def __init__(self, node_id: str) -> None:
        self.id = node_id

    def __getitem__(self, output: int) -> Link:
        return [self.id, output]

    def __repr__(self) -> str:
        return f"Node({self.id})"


class Graph(dict[str, dict[str, Any]]):
    """A prompt in API format, built with `add`; a dict, so it can be sent and printed as it is."""

    def add(self, class_type: str, /, **inputs: Any) -> Node:
        """Append a node; a Node given as input means its first output."""
        node_id = str(max(map(int, self), default=0) + 1)
        links = {name: value[0] if isinstance(value, Node) else value for name, value in inputs.items()}
        self[node_id] = {"class_type": class_type, "inputs": links}
        return Node(node_id)


@dataclass(frozen=True)
class Host:
    """One ComfyUI checkout and the Python that runs it."""

    path: Path
    python: Path

    @property
    def version(self) -> str:
        """Version as written in comfyui_version.py, "unknown" without that file."""
        file = self.path / "comfyui_version.py"
        found = re.search(r'__version__\s*=\s*"([^"]+)"', file.read_text()) if file.is_file() else None
        return found.group(1) if found else "unknown"

    @property
    def name(self) -> str:
        return f"comfyui-{self.version}"


def find_hosts() -> list[Host]:
    """ComfyUI checkouts to test with: $COMFYUI_PATH, else the usual two under ~/comfy."""
    listed = os.environ.get("COMFYUI_PATH")
    if listed:
        folders = [Path(p).expanduser() for p in listed.split(os.pathsep) if p]
        missing = [str(p) for p in folders if not (p / "main.py").is_file()]
        if missing:
            raise FileNotFoundError(f"COMFYUI_PATH names folders without a main.py: {', '.join(missing)}")
    else:
        folders = [Path.home() / "comfy" / "ComfyUI", Path.home() / "comfy" / "ComfyUI-0.3.64"]
    return [Host(p, _python_of(p)) for p in folders if (p / "main.py").is_file()]


def _python_of(folder: Path) -> Path:
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        return Path(named)
    for candidate in (folder / ".venv", folder / "venv"):
        python = candidate / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
        if python.exists():
            return python
    return Path(sys.executable)


@dataclass(frozen=True)
class Result:
    """What a finished prompt left behind."""

    server: ComfyServer
    prompt_id: str
    outputs: dict[str, dict[str, Any]]  # node id -> its ui output
    cached: frozenset[str]  # ids of the nodes that did not run again
    seconds: float

    def _ui(self, node: Node | str) -> dict[str, Any]:
        node_id = node.id if isinstance(node, Node) else node
        if node_id not in self.outputs:
            raise KeyError(f"node {node_id} has no ui output; nodes with one: {sorted(self.outputs)}")
        return self.outputs[node_id]

    def images(self, node: Node | str) -> list[np.ndarray]:
        """Images of a SaveImage/PreviewImage node: uint8, h w c."""
        return [np.asarray(Image.open(io.BytesIO(self.server.view(entry)))) for entry in self._ui(node)["images"]]

    def tensor(self, node: Node | str) -> np.ndarray:
        """The exact array given to a TestSaveTensor node."""
        (entry,) = self._ui(node)["tensor"]
        return np.load(io.BytesIO(self.server.view(entry)), allow_pickle=False)

    def sha256(self, node: Node | str) -> str:
        """Hash of the bytes given to a TestSaveTensor node."""
        (entry,) = self._ui(node)["tensor"]
        return entry["sha256"]

    def text(self, node: Node | str) -> list[str]:
        """The `text` ui output of a node (PreviewAny and the like)."""
        return list(self._ui(node)["text"])


@dataclass
class ComfyServer:
    """ComfyUI on the CPU with an empty base directory, our pack and the test pack; use it as a context manager."""

    host: Host
    base: Path
    pack: Path | None = REPOSITORY  # copied when it has an __init__.py
    extra_args: tuple[str, ...] = ()
    port: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    start_seconds: float = 0.0

    # -- life ---------------------------------------------------------------------------------------------------------

    def __enter__(self) -> ComfyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def has_pack(self) -> bool:
        """Whether our pack was there to be copied."""
        return (self.base / "custom_nodes" / PACK_NAME / "__init__.py").is_file()

    def start(self, timeout: float = 240) -> None:
        """Lay out the base directory, start main.py and wait until it answers."""
        began = time.monotonic()
        custom_nodes = self.base / "custom_nodes"  # ComfyUI does not create it and dies without it
        custom_nodes.mkdir(parents=True, exist_ok=True)
        for folder in ("checkpoints", "clip_vision", "ipadapter", "loras"):
            self.models(folder)
        for file in TEST_PACK.glob("*.py"):
            shutil.copy(file, custom_nodes / file.name)
        if self.pack is not None and (self.pack / "__init__.py").is_file():
            shutil.copytree(self.pack, custom_nodes / PACK_NAME, ignore=NOT_COPIED, dirs_exist_ok=True)

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        # The tests' own PYTHONPATH would let our `nodes` package shadow ComfyUI's nodes.py.
        environment = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}}
        environment["PYTHONUNBUFFERED"] = "1"
        if hasattr(os, "sched_getaffinity"):
            # More threads than cores spin on each other, 20 times slower; tests/conftest.py gives each worker its share.
            environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        command = [str(self.host.python), "main.py", "--cpu", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-api-nodes", "--disable-auto-launch", *self.extra_args]
        with (self.base / "server.log").open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.host.path, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        while True:
            if self.process.poll() is not None:
                raise ServerFailed(f"{self.host.name} ended with code {self.process.returncode}\n{self.log[-6000:]}")
            try:
                self.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if time.monotonic() - began > timeout:
                    self.stop()
                    message = f"{self.host.name} did not answer within {timeout} s\n{self.log[-6000:]}"
                    raise ServerFailed(message) from None
                time.sleep(0.2)
        self.start_seconds = time.monotonic() - began

    def stop(self) -> None:
        """End the server; safe to call twice."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        self.process = None

    # -- files --------------------------------------------------------------------------------------------------------

    @property
    def log(self) -> str:
        """Everything the server printed so far, without colours."""
        file = self.base / "server.log"
        return ANSI_COLOUR.sub("", file.read_text(errors="replace")) if file.is_file() else ""

    def models(self, folder: str) -> Path:
        """The folder models/<folder> of this server, created if missing."""
        path = self.base / "models" / folder
        path.mkdir(parents=True, exist_ok=True)
        return path

    def add_model(self, folder: str, file: Path, name: str | None = None) -> str:
        """Make `file` selectable in models/<folder> (a link, or a copy where links fail); returns its name."""
        name = name or file.name
        target = self.models(folder) / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)  # a link whose file is gone
            try:
                target.symlink_to(file.resolve())
            except OSError:
                shutil.copy(file, target)
        return name

    def upload_image(self, image: Path | bytes | np.ndarray, name: str | None = None) -> str:
        """Upload a file, PNG/JPEG bytes or a uint8 array (h w c); returns the name LoadImage takes."""
        if isinstance(image, Path):
            content, name = image.read_bytes(), name or image.name
        elif isinstance(image, bytes):
            content = image
        else:
            buffer = io.BytesIO()
            Image.fromarray(image).save(buffer, "PNG")
            content = buffer.getvalue()
        name = name or f"{uuid.uuid4().hex[:12]}.png"
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
        head += "Content-Type: application/octet-stream\r\n\r\n"
        overwrite = f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue'
        body = head.encode() + content + overwrite.encode() + f"\r\n--{boundary}--\r\n".encode()
        answer = json.loads(self._http("/upload/image", body, f"multipart/form-data; boundary={boundary}"))
        return str(answer["name"])

    def view(self, entry: Mapping[str, Any]) -> bytes:
        """Bytes of an output file described by {filename, subfolder, type}."""
        query = {key: entry[key] for key in ("filename", "subfolder", "type")}
        return self._http("/view?" + urllib.parse.urlencode(query))

    # -- HTTP ---------------------------------------------------------------------------------------------------------

    def _http(self, path: str, body: bytes | None = None, content_type: str = "application/json") -> bytes:
        request = urllib.request.Request(self.url + path, data=body)
        if body is not None:
            request.add_header("Content-Type", content_type)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def get(self, path: str) -> Any:
        """GET a JSON route."""
        return json.loads(self._http(path))

    def post(self, path: str, value: Mapping[str, Any]) -> Any:
        """POST JSON; returns the JSON answer, None if it is empty."""
        answer = self._http(path, json.dumps(value).encode())
        return json.loads(answer) if answer.strip() else None

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The server's node list, or the entry of one node; KeyError if the server does not know it."""
        if node is None:
            return self.get("/object_info")
        return self.get("/object_info/" + urllib.parse.quote(node))[node]

    def pack_nodes(self) -> dict[str, Any]:
        """object_info of our own nodes; the old pack's class types, marked as deprecated, are left out."""
        module = f"custom_nodes.{PACK_NAME}"
        ours = {name: info for name, info in self.object_info().items() if info.get("python_module") == module}
        return {name: info for name, info in ours.items() if not info.get("deprecated")}

    def import_problems(self) -> list[str]:
        """Log lines saying that our pack or the test pack did not load; empty when all is well."""
        names = (PACK_NAME, *(file.name for file in TEST_PACK.glob("*.py")))
        signs = ("IMPORT FAILED", "Cannot import", "Error while calling comfy_entrypoint", "Skip")
        lines = self.log.splitlines()
        return [line for line in lines if any(s in line for s in signs) and any(n in line for n in names)]

    # -- prompts ------------------------------------------------------------------------------------------------------

    def submit(self, graph: Mapping[str, Any]) -> str:
        """Queue a graph (API format); returns the prompt id. Raises GraphRejected when it does not validate."""
        try:
            answer = self.post("/prompt", {"prompt": graph, "client_id": uuid.uuid4().hex})
        except urllib.error.HTTPError as error:
            if error.code != 400:
                raise
            rejected = json.loads(error.read())
            raise GraphRejected("\n".join(_validation_lines(rejected)), rejected) from None
        if answer.get("node_errors"):  # one branch validated, another did not: a test never wants that silently
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise GraphRejected("\n".join(_validation_lines(answer)), answer)
        return str(answer["prompt_id"])

    def wait(self, prompt_id: str, timeout: float = 300) -> Result:
        """Wait for a queued prompt. Raises ExecutionFailed, ExecutionInterrupted, ServerFailed or TimeoutError."""
        began = time.monotonic()
        while True:
            if self.process is None or self.process.poll() is not None:
                raise ServerFailed(f"{self.host.name} died while running a prompt\n{self.log[-6000:]}")
            history = self.get(f"/history/{prompt_id}").get(prompt_id)
            if history is not None:
                break
            if time.monotonic() - began > timeout:
                self.interrupt()
                raise TimeoutError(f"prompt {prompt_id} not done after {timeout} s\n{self.log[-3000:]}")
            time.sleep(0.05)
        messages = [(name, details) for name, details in history["status"]["messages"]]
        for name, details in messages:
            if name == "execution_error":
                raise ExecutionFailed(details)
            if name == "execution_interrupted":
                raise ExecutionInterrupted(f"interrupted in node {details.get('node_id')} ({details.get('node_type')})")
        cached = {str(i) for name, details in messages if name == "execution_cached" for i in details["nodes"]}
        return Result(self, prompt_id, history["outputs"], frozenset(cached), time.monotonic() - began)

    def run(self, graph: Mapping[str, Any], timeout: float = 300) -> Result:
        """submit() and wait()."""
        return self.wait(self.submit(graph), timeout)

    def interrupt(self) -> None:
        """Stop the running prompt."""
        self.post("/interrupt", {})

    def queue(self) -> dict[str, Any]:
        """{"queue_running": [...], "queue_pending": [...]}."""
        return self.get("/queue")

    def free(self) -> None:
        """Unload models and drop the cache of node outputs, so that the next prompt runs every node."""
        self.post("/free", {"unload_models": True, "free_memory": True})
        # The worker looks at that request only after the prompt it takes next: give it one that means nothing.
        graph = Graph()
        graph.add("TestSaveTensor", value=graph.add("EmptyImage", width=8, height=8, batch_size=1, color=0))
        self.run(graph)


def _validation_lines(answer: Mapping[str, Any]) -> Iterator[str]:
    error = answer.get("error")
    if error:
        yield f"{error.get('type')}: {error.get('message')} {error.get('details') or ''}".rstrip()
    for node_id, found in (answer.get("node_errors") or {}).items():
        for reason in found["errors"]:
            yield f"node {node_id} ({found['class_type']}): {reason['type']}: {reason['message']}: {reason['details']}"
