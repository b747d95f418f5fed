"""The reference: one FastAPI route that returns bytes and does nothing else, served as `tesapi serve` is."""

from __future__ import annotations

import gc
import socket
import sys

import uvicorn
import uvloop
from fastapi import FastAPI, Request, Response

from tesapi.cli.serve import configured

app = FastAPI()


@app.get("/")
@app.post("/")
async def empty(request: Request) -> Response:
    await request.body()
    return Response(b'{"id":"x"}', media_type="application/json")


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", int(sys.argv[1])), backlog=2048)
    gc.collect()
    gc.freeze()
    uvloop.run(uvicorn.Server(configured(app)).serve([listener]))
