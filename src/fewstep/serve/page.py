"""GET / and /page/...: the web page, static files beside this module."""

from pathlib import Path

from starlette.requests import Request
from starlette.responses import FileResponse, Response

from fewstep.serve.errors import ApiError
from fewstep.serve.server import Server

FOLDER = Path(__file__).resolve().parent / "page"

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


async def show_page(server: Server, request: Request) -> Response:
    """Of the files that lie in the folder, by their names alone: no name leads out of it."""
    name = request.path_params.get("name", "index.html")
    files = {file.name: file for file in FOLDER.iterdir() if file.suffix in _TYPES} if FOLDER.is_dir() else {}
    if name not in files:
        raise ApiError(f"there is no page {name[:200]!r}", status=404, code="not_found")
    return FileResponse(files[name], media_type=_TYPES[files[name].suffix], headers=HEADERS)
