"""The reference: one FastAPI route that returns bytes and does nothing else, served as `tesapi serve` is."""

from __future__ import annotations

import sys

import uvicorn
from fastapi import FastAPI, Request, Response

app = FastAPI()


@app.get("/")
@app.post("/")
async def empty(request: Request) -> Response:
    await request.body()
    return Response(b'{"id":"x"}', media_type="application/json")


if __name__ == "__main__":
    config = uvicorn.Config(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        lifespan="off",
        log_level="warning",
        access_log=False,
    )
    uvicorn.Server(config).run()
