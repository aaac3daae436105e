"""A server of embeddings that speaks OpenAI's protocol: any client of that can use the model by its base_url.

    python -m moe_embed.serve --model=runs/demo --port=8080            # pip install -e ".[serve]"
    curl -s localhost:8080/v1/embeddings -H 'Content-Type: application/json' -d '{"input": "Wie drucke ich?", "task": "query"}'

POST /v1/embeddings takes "input" (a text or a list of texts), "model", "encoding_format" (float or base64), "dimensions", and of our
own "task": the name of the model's prompt to put in front ("query", "document"; "" for none). A client that cannot send that field
may send the header X-Task; without either --task counts. "prompt_tokens" is what the model read, prompt and ends included. Any other
field is refused, "user" is ignored. GET /v1/models, /health (200 once the model is warm) and /metrics (Prometheus) are the rest.

Requests that arrive while the model is busy are encoded together; nobody's vector depends on whose (batcher.py). There are no
access tokens: it listens to this machine only, unless --host says otherwise. SIGTERM or ctrl-C end it when what was asked is answered.
Who has no answer after 58 s is told that the server is ending (503), and the process ends with the call under way, of at most
--max_batch texts: a call of the model is not broken off.
"""

import argparse
import asyncio
import contextlib
import importlib.util
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from moe_embed import protocol, verb
from moe_embed.batcher import Batcher, Closed, QueueFull
from moe_embed.config import UserError
from moe_embed.load import MIN_ROW, Model, load, power_of_two, rows_of_call
from moe_embed.protocol import Refusal

BETWEEN_LINES = 15  # seconds of warming up, where nobody sees a bar
GRACE = 60  # seconds after SIGTERM in which uvicorn lets answers go out; then it cuts connections, with a traceback for each
LAST_WORD = 2  # of them, for the 503 of who would be cut off


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("serve", __doc__)
    parser.add_argument("--model", required=True, help="a workdir, or a folder written by export")
    parser.add_argument("--port", type=int, default=8080, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 is everybody")
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--task", help="the prompt of requests that name none: query, document, ... (default: none)")
    parser.add_argument("--max_texts", type=int, default=2048, help="texts of a request")
    parser.add_argument("--max_bytes", type=int, default=16 * 2**20, help="bytes of a request")
    parser.add_argument("--max_queue", type=int, default=8192, help="texts waiting; more are refused with 429")
    parser.add_argument("--max_batch", type=int, default=256, help="texts encoded together")
    flags = parser.parse_args(argv)
    for flag in ("max_texts", "max_bytes", "max_batch"):
        if getattr(flags, flag) < 1:
            raise UserError(f"--{flag}={getattr(flags, flag)} lets nothing in; give 1 or more.")
    if flags.max_queue < flags.max_texts:
        raise UserError(f"--max_queue={flags.max_queue} has no room for one request of --max_texts={flags.max_texts}.")
    if not all(map(importlib.util.find_spec, ("starlette", "uvicorn"))):
        raise UserError('the server needs starlette and uvicorn, which are not installed: pip install -e ".[serve]"')
    with listen(flags.host, flags.port) as listener:
        verb.say(f"reading {flags.model} ...")
        model = load(flags.model)
        if flags.task is not None and flags.task not in model.prompts:
            raise UserError(
                f"--task={flags.task} is no prompt of {model.origin}; it has {', '.join(model.prompts) or 'none'}."
            )
        serve(model, listener, flags=flags, name=flags.name or pathlib.Path(flags.model).resolve().name)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, taken before the model is read. UserError when the port is in use or the host is not ours."""
    if not 0 <= port < 2**16:
        raise UserError(f"--port={port} is no port; give 1 to 65535, or 0 for a free one.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(f"cannot listen at --host={host} --port={port}: {error}.") from error


def serve(model: Model, listener: socket.socket, *, flags: argparse.Namespace, name: str) -> None:
    """Warm up, answer until SIGTERM or ctrl-C, and end when what was asked is answered, or refused after GRACE - LAST_WORD,
    and the call under way, if there is one, has returned."""
    import uvicorn

    host = f"[{flags.host}]" if ":" in flags.host else flags.host
    where = f"http://{host}:{listener.getsockname()[1]}"
    ready, ending, faults = threading.Event(), threading.Event(), []

    def warm() -> None:
        try:
            warm_up(model, max_batch=flags.max_batch, ending=ending)
        except Exception as error:  # of another thread: raised again below
            faults.append(error)
            server.should_exit = True
        else:
            if not ending.is_set():
                ready.set()
                print(f"serving {name} on {where}", flush=True)

    @contextlib.asynccontextmanager
    async def lifespan(_):
        warming = asyncio.create_task(asyncio.to_thread(warm))
        refusing = asyncio.create_task(refuse_late())
        yield
        refusing.cancel()
        ending.set()
        await warming

    async def refuse_late() -> None:
        while not server.should_exit:
            await asyncio.sleep(0.1)
        await asyncio.sleep(GRACE - LAST_WORD)
        batcher.give_up()

    batcher = Batcher(encoder(model), max_batch=flags.max_batch, max_queue=flags.max_queue)
    try:
        app = application(model, batcher, name=name, flags=flags, is_ready=ready.is_set, lifespan=lifespan)
        config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=GRACE)
        server = uvicorn.Server(config)
        for caught in (signal.SIGTERM, signal.SIGINT):  # uvicorn ends in order, then raises again what it has caught
            signal.signal(caught, lambda *_: None)
        server.run(sockets=[listener])
    finally:
        ending.set()
        batcher.close()
    if faults:
        raise faults[0]


def encoder(model: Model) -> Callable:
    """(texts, (task, dim)) -> (vectors, tokens read of each), for a Batcher."""

    def encode(texts: list[str], key: tuple[str | None, int | None]) -> tuple[np.ndarray, np.ndarray]:
        task, dim = key
        prompt = "" if task is None else model.prompts[task]
        ids, _ = model.tokenizer.encode(texts, prompt=prompt, max_length=model.encoder.max_seq_length)
        return model.encode(texts, task, dim), np.array([len(one) for one in ids])

    return encode


def shapes(max_seq_length: int, *, num_devices: int, max_batch: int) -> list[tuple[int, int]]:
    """(tokens of a row, rows) of all programs that calls of at most `max_batch` texts can need."""
    longest = max(MIN_ROW, power_of_two(2 * max_seq_length))  # two of the longest texts
    found, row_length, most = [], MIN_ROW, power_of_two(-(-max_batch // 2))  # any two texts share a row
    while row_length <= longest:
        powers = [1 << i for i in range(most.bit_length())]
        rows = {rows_of_call(power, row_length=row_length, num_devices=num_devices) for power in powers}
        found += [(row_length, num_rows) for num_rows in sorted(rows)]
        row_length *= 2
    return found


def filling(row_length: int, num_rows: int, *, max_seq_length: int) -> list[int]:
    """Lengths of texts that `encode` puts into just these rows: two equal ones to a row, or a few where they are short."""
    length = min(row_length // 2, max_seq_length)
    power = 1 << num_rows.bit_length() - 1  # of two, up to num_rows: what is laid out as so many
    return [length] * (row_length // length * power)


def warm_up(model: Model, *, max_batch: int, ending: threading.Event) -> None:
    """Encode texts that fill rows of each shape, so that no user waits for a compilation; says what and how long."""
    wanted = shapes(model.encoder.max_seq_length, num_devices=model.mesh.size, max_batch=max_batch)
    row_lengths = ", ".join(str(length) for length in sorted({length for length, _ in wanted}))
    print(f"warming up: {len(wanted)} shapes, rows of {row_lengths} tokens", flush=True)
    began = said = time.perf_counter()
    for done, (row_length, num_rows) in enumerate(tqdm.tqdm(wanted, unit="shape", disable=not sys.stderr.isatty())):
        if not sys.stderr.isatty() and time.perf_counter() - said > BETWEEN_LINES:
            said = time.perf_counter()
            print(f"warming up: {done} of {len(wanted)} shapes, {said - began:.0f} s", flush=True)
        if ending.is_set():
            return
        lengths = filling(row_length, num_rows, max_seq_length=model.encoder.max_seq_length)
        model.encode(["a " * lengths[0]] * len(lengths), max_length=lengths[0])
    print(f"warmed up in {time.perf_counter() - began:.1f} s", flush=True)


def application(model: Model, batcher: Batcher, *, name: str, flags, is_ready: Callable[[], bool], lifespan=None):
    """The ASGI application. `flags` has task, max_texts and max_bytes; before `is_ready()` embeddings are refused."""
    from starlette.applications import Starlette
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import JSONResponse, PlainTextResponse, Response
    from starlette.routing import Route

    errors: dict[int, int] = {}
    num_requests, created = 0, int(time.time())

    async def embeddings(request):
        nonlocal num_requests
        num_requests += 1
        body = await read_body(request, max_bytes=flags.max_bytes)
        if not is_ready():
            raise Refusal(503, "the model is warming up; GET /health says when it is ready.", code="warming_up")
        asked = protocol.parse(body, model=model, name=name, task=request.headers.get("x-task") or flags.task,
                      max_texts=flags.max_texts)  # fmt: skip
        answer = asyncio.wrap_future(batcher.submit(asked.texts, key=(asked.task, asked.dim)))
        gone = asyncio.create_task(has_gone(request))
        await asyncio.wait({answer, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not answer.done():
            answer.cancel()  # nobody waits for it: the batcher leaves it out
            return Response(status_code=499)
        content = await asyncio.to_thread(protocol.written, *answer.result(), name=name, as_base64=asked.as_base64)
        return Response(content, media_type="application/json")

    async def models(_):
        there = {"id": name, "object": "model", "created": created, "owned_by": "moe_embed"}
        ours = {"dimensions": model.encoder.dim, "max_tokens": model.encoder.max_seq_length, "tasks": [*model.prompts]}
        return JSONResponse(
            dict(object="list", data=[there | ours])
        )  # "data" as a literal is a mesh axis, in this house

    async def health(_):
        ready = is_ready()
        return JSONResponse({"status": "ready" if ready else "warming up"}, status_code=200 if ready else 503)

    async def metrics(_):
        waiting = batcher.num_waiting()
        text = protocol.exposition(batcher.counts, num_requests=num_requests, num_waiting=waiting, errors=errors)
        return PlainTextResponse(text, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def refused(request, error):
        headers = {}
        if isinstance(error, HTTPException):  # the framework's: no such path, or not this method
            headers, what = dict(error.headers or {}), f"{request.method} {request.url.path}"
            error = Refusal(error.status_code, f"{what}: {error.detail}.", code=error.detail.lower().replace(" ", "_"))
        elif isinstance(error, QueueFull):
            error = Refusal(429, f"more than {flags.max_queue} texts would wait; try again later.", code="queue_full")
        elif isinstance(error, Closed):
            error = Refusal(503, "the server is ending.", code="ending")
        elif not isinstance(error, Refusal):  # a fault of ours: its traceback is in the server's log
            error = Refusal(500, "the server failed at this request; its log says why.", code="internal_error")
        errors[error.status] = errors.setdefault(error.status, 0) + 1
        if error.status in (429, 503):
            headers["retry-after"] = "1"
        return JSONResponse(protocol.error_body(error), status_code=error.status, headers=headers)

    async def left(_, error):
        return Response(status_code=499)  # a client that went while it was sending; nobody reads this

    routes = [
        Route("/v1/embeddings", embeddings, methods=["POST"]), Route("/v1/models", models),
        Route("/health", health), Route("/metrics", metrics),
    ]  # fmt: skip
    faults = (Refusal, HTTPException, QueueFull, Closed, Exception)
    handlers = {ClientDisconnect: left} | dict.fromkeys(faults, refused)
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


async def read_body(request, *, max_bytes: int) -> bytes:
    """The body. One that is too large is read to its end all the same, not kept: else the client sees a broken pipe."""
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size <= max_bytes:
            parts.append(part)
    if size > max_bytes:
        raise Refusal(413, f"the request has {size} bytes; {max_bytes} are the limit.", code="request_too_large")
    return b"".join(parts)


async def has_gone(request) -> None:
    """Returns when the client has hung up. For after the body is read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


if __name__ == "__main__":
    verb.run(main)
