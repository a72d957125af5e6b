"""POST and GET /compare/votes, and GET /compare/votes.csv: the tally of the comparison page"""

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fewstep.serve.fields import VoteBody
from fewstep.serve.server import Server
from fewstep.serve.votes import Vote


async def add_vote(server: Server, request: Request) -> Response:
    body, _ = await server.read(request, VoteBody)
    server.votes.add(Vote(**body.model_dump(), time=int(time.time())))
    return await tell_votes(server, request)


async def tell_votes(server: Server, request: Request) -> Response:
    return JSONResponse({"pairs": server.votes.tally(), "n": len(server.votes.votes)})


async def export_votes(server: Server, request: Request) -> Response:
    headers = {"Content-Disposition": 'attachment; filename="votes.csv"'}
    return Response(server.votes.as_csv(), media_type="text/csv; charset=utf-8", headers=headers)
