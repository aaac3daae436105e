"""A stand-in for Google Cloud Storage: its JSON API, as far as gcsfs and tensorstore speak it, with buckets in memory.

    with fake_gcs.serve("bucket") as store:
        subprocess.run([...], env=os.environ | store.environment)
        store.buckets["bucket"]["w/metrics.jsonl"].data

Nothing is remembered but objects: there are no folders and no appending, and an object appears whole or not at all.
"""

import contextlib
import dataclasses
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse
from base64 import b64encode
from collections.abc import Callable, Iterator

OFFLINE = {  # what keeps a client from asking the network who it is
    "NO_GCE_CHECK": "true",
    "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token-of-the-tests",
}


@dataclasses.dataclass
class Object:
    """What is stored under a name."""

    data: bytes
    generation: int


class Store:
    """The buckets, name -> object, and what was asked for: (method, name) each, oldest first."""

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, Object]] = {name: {} for name in buckets}
        self.asked: list[tuple[str, str]] = []
        self.refuse: Callable[[str, str], int] = lambda method, name: 0  # an HTTP status to answer with instead
        self.lock = threading.RLock()
        self.generations = itertools.count(1)
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}  # resumable: bucket, name, so far
        self.environment: dict[str, str] = {}

    def put(self, bucket: str, name: str, data: bytes) -> Object:
        """Store an object."""
        with self.lock:
            self.buckets[bucket][name] = Object(bytes(data), next(self.generations))
            return self.buckets[bucket][name]


def describe(bucket: str, name: str, item: Object) -> dict:
    """An object's metadata, as the API has them."""
    return {
        "kind": "storage#object", "bucket": bucket, "name": name, "id": f"{bucket}/{name}/{item.generation}",
        "size": str(len(item.data)), "generation": str(item.generation), "metageneration": "1",
        "timeCreated": "2026-01-01T00:00:00.000Z", "updated": "2026-01-01T00:00:00.000Z",
        "md5Hash": b64encode(hashlib.md5(item.data).digest()).decode(), "etag": str(item.generation),
        "contentType": "application/octet-stream", "storageClass": "STANDARD",
    }  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement
    wbufsize = -1
    store: Store

    def answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        if isinstance(body, dict):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def fail(self, status: int, message: str) -> None:
        self.answer(status, {"error": {"code": status, "message": message}}, Content_Type="application/json")

    def handle_any(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        asks = {k: v[-1] for k, v in urllib.parse.parse_qs(url.query, keep_blank_values=True).items()}
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        found = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?(/compose)?", url.path)
        if not found:
            return self.fail(400, f"invalid: {url.path} is nothing this stand-in knows")
        kind, bucket, name = found[1] or "", found[2], urllib.parse.unquote(found[3] or "")
        if kind == "upload/":
            name = asks["name"] if "name" in asks else json.loads(_parts(body)[0])["name"] if body else ""
        with self.store.lock:
            self.store.asked.append((self.command, name or url.path))
            if status := self.store.refuse(self.command, name):
                return self.fail(status, "refused by the test")
            if bucket not in self.store.buckets:
                return self.fail(404, "The specified bucket does not exist.")
            if kind == "upload/":
                return self.upload(bucket, name, asks, body)
            if not name:
                return self.listing(bucket, asks) if url.path.endswith("/o") else self.answer(200, {"name": bucket})
            return self.one(bucket, name, asks)

    do_GET = do_POST = do_PUT = do_DELETE = handle_any

    def upload(self, bucket: str, name: str, asks: dict, body: bytes) -> None:
        if "upload_id" in asks:
            if self.command == "DELETE":
                del self.store.uploads[asks["upload_id"]]
                return self.answer(499)
            bucket, name, so_far = self.store.uploads[asks["upload_id"]]
            so_far += body
            _, _, total = self.headers["Content-Range"].removeprefix("bytes ").partition("/")
            if total == "*" or int(total) > len(so_far):
                return self.answer(308, Range=f"bytes=0-{len(so_far) - 1}")
            body = so_far
        elif asks["uploadType"] == "resumable":
            key = str(next(self.store.generations))
            self.store.uploads[key] = bucket, name, bytearray()
            host = f"http://{self.headers['Host']}"
            return self.answer(200, Location=f"{host}/upload/storage/v1/b/{bucket}/o?name=x&upload_id={key}")
        elif asks["uploadType"] == "multipart":
            body = _parts(body)[1]
        if not self.may(bucket, name, asks):
            return self.fail(412, "conditionNotMet")
        item = self.store.put(bucket, name, body)
        self.answer(200, describe(bucket, name, item), Content_Type="application/json")

    def may(self, bucket: str, name: str, asks: dict) -> bool:
        """Whether the generation is the one that is asked for (0: there is none)."""
        objects = self.store.buckets[bucket]
        now = objects[name].generation if name in objects else 0
        return "ifGenerationMatch" not in asks or int(asks["ifGenerationMatch"]) == now

    def one(self, bucket: str, name: str, asks: dict) -> None:
        objects = self.store.buckets[bucket]
        if not self.may(bucket, name, asks):
            return self.fail(412, "conditionNotMet")
        if name not in objects:
            return self.fail(404, f"No such object: {bucket}/{name}")
        item = objects[name]
        if self.command == "DELETE":
            del objects[name]
            return self.answer(204)
        if "ifGenerationNotMatch" in asks and int(asks["ifGenerationNotMatch"]) == item.generation:
            return self.answer(304)
        if "alt" not in asks or asks["alt"] != "media":
            return self.answer(200, describe(bucket, name, item), Content_Type="application/json")
        headers = {"x_goog_generation": str(item.generation), "ETag": str(item.generation)}
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers["Range"] or "")
        if not wanted:
            return self.answer(200, item.data, **headers)
        size = len(item.data)
        if wanted[1]:
            start, end = int(wanted[1]), min(int(wanted[2] or size - 1) + 1, size)
        else:
            start, end = max(size - int(wanted[2]), 0), size
        if start >= size:
            return self.answer(416, Content_Range=f"bytes */{size}")
        self.answer(206, item.data[start:end], Content_Range=f"bytes {start}-{end - 1}/{size}", **headers)

    def listing(self, bucket: str, asks: dict) -> None:
        asks = {"prefix": "", "delimiter": "", "startOffset": "", "endOffset": "", "pageToken": ""} | asks
        items, prefixes = [], set()
        for name, item in sorted(self.store.buckets[bucket].items()):
            if not name.startswith(asks["prefix"]) or name < asks["startOffset"] or name <= asks["pageToken"]:
                continue
            if asks["endOffset"] and name >= asks["endOffset"]:
                continue
            rest = name[len(asks["prefix"]) :]
            if asks["delimiter"] and asks["delimiter"] in rest:
                prefixes.add(asks["prefix"] + rest.partition(asks["delimiter"])[0] + asks["delimiter"])
                continue
            items.append(describe(bucket, name, item))
        answer = {"kind": "storage#objects", "items": items[:PAGE], "prefixes": sorted(prefixes)}
        if len(items) > PAGE:
            answer["nextPageToken"] = items[PAGE - 1]["name"]
        self.answer(200, answer, Content_Type="application/json")

    def log_message(self, *_) -> None:
        """Nothing: stderr is the test's."""


PAGE = 7  # objects a page of a listing, so that there is a second one


def _parts(body: bytes) -> list[bytes]:
    """The two parts of multipart/related: metadata and data."""
    mark = re.match(rb"--[^\r\n]+", body)
    if not mark:
        return [body]
    inner = body[mark.end() : body.rindex(b"\n" + mark[0])]
    head, _, data = inner.partition(b"\n" + mark[0])
    return [re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1].rstrip(b"\r") if part is head else
            re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in (head, data)]  # fmt: skip


@contextlib.contextmanager
def serve(*buckets: str) -> Iterator[Store]:
    """The stand-in, for as long as the block runs; `environment` leads gcsfs and tensorstore to it."""
    store = Store(*buckets)
    handler = type("Bound", (Handler,), {"store": store})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # a client that was killed
    url = f"http://127.0.0.1:{server.server_port}"
    store.environment = OFFLINE | {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
