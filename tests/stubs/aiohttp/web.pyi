from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

class StreamReader:
    def iter_chunked(self, n: int) -> AsyncIterator[bytes]: ...

class Request:
    content: StreamReader
    query: Mapping[str, str]
    headers: Mapping[str, str]

class StreamResponse: ...

class Response(StreamResponse):
    def __init__(
        self,
        *,
        body: bytes | None = None,
        text: str | None = None,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
    ) -> None: ...

class RouteTableDef:
    def get(
        self, path: str
    ) -> Callable[[Callable[[Request], Awaitable[Response]]], Callable[[Request], Awaitable[Response]]]: ...
    def post(
        self, path: str
    ) -> Callable[[Callable[[Request], Awaitable[Response]]], Callable[[Request], Awaitable[Response]]]: ...

def json_response(data: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response: ...
