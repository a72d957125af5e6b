"""GET /v1/models and /v1/models/{id}, /health and /ready"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.serve.errors import ApiError, stopping
from fewstep.serve.fields import LoadBody
from fewstep.serve.server import Server
from fewstep.serve.streams import event


async def list_models(server: Server, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [entry.card() for entry in server.catalogue.entries.values()]})


async def show_model(server: Server, request: Request) -> Response:
    return JSONResponse(server.catalogue[request.path_params["name"]].card())


async def load_model(server: Server, request: Request) -> Response:
    """What `transformers chat` asks first: a model of this server is always loaded."""
    body, _ = await server.read(request, LoadBody)
    name = server.catalogue[body.model].name
    told = event({"status": "ready", "model": name, "cached": True})
    return Response(told, media_type="text/event-stream")


async def health(server: Server, request: Request) -> Response:
    """Whether the process can answer: not so once the thread that runs the networks has ended."""
    if server.service.failed:
        raise ApiError("the thread that runs the networks has ended; start the server again", status=503, code="failed")
    return JSONResponse({"status": "ok"})


async def ready(server: Server, request: Request) -> Response:
    """Whether requests are taken."""
    if server.draining:
        raise stopping()
    return await health(server, request)
