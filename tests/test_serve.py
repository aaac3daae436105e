"""The server as clients see it: a real process on a free port, and the application around an encode that waits."""

import argparse
import base64
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

from moe_embed import config as config_lib
from moe_embed import load, serve, sharding
from moe_embed.batcher import Batcher
from moe_embed.config import UserError
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import MIN_ROW, Model, _rows, save
from moe_embed.model import encoder
from tests.bench import serving

TEXTS = [
    f"{word} {'mehr und ' * (i % 9)}{i}" for i, word in enumerate(["Tabelle", "表を挿入する", "rows", "строка"] * 8)
]


def ask(url, body=None, *, path="/v1/embeddings", headers=None):
    """(status, what came back: JSON, or text where it is none) of a POST of `body`, or of a GET."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"} | (headers or {}))
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, read = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, read = error.code, error.read()
    return status, json.loads(read) if read[:1] == b"{" else read.decode()


def vectors(answer) -> np.ndarray:
    assert [item["index"] for item in answer["data"]] == list(range(len(answer["data"])))
    return np.array([item["embedding"] for item in answer["data"]], np.float32)


def until(holds, *, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to it"
        time.sleep(0.01)


@pytest.mark.parametrize("num_devices", [1, 3, 6, 8])
@pytest.mark.parametrize("max_seq_length", [20, 64, 160, 512])
def test_what_is_warmed_is_what_is_needed(max_seq_length, num_devices):
    """Of texts of any lengths. And none of it could be left out: each is met by the texts that warm it."""
    warmed = set(serve.shapes(max_seq_length, num_devices=num_devices, max_batch=256))
    rng, met = np.random.default_rng(0), set()

    def meet(lengths):
        for _, rows, _ in _rows([np.ones(n, np.int32) for n in lengths], num_devices=num_devices):
            num_rows, row_length = rows["tokens_MBL"].shape[1:]
            met.add((row_length, num_rows))

    for _ in range(100):
        meet(rng.integers(3, rng.integers(4, max_seq_length + 2), rng.integers(1, 257)))
    assert met <= warmed
    for row_length, num_rows in warmed:
        met.clear()
        meet(serve.filling(row_length, num_rows, max_seq_length=max_seq_length))
        assert met == {(row_length, num_rows)}
    assert min(length for length, _ in warmed) == MIN_ROW


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--max_texts=0",), "--max_texts=0 lets nothing in"),
        (("--max_queue=9",), "--max_queue=9 has no room for one request of --max_texts=2048"),
        (("--port=70000",), "--port=70000 is no port"),
        (("--host=192.0.2.1", "--port=0"), "cannot listen at --host=192.0.2.1"),
        (("--port=0",), "holds no model"),
    ],
)
def test_faults_of_the_flags(flags, words, tmp_path, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match=re.escape(words)):
        serve.main([f"--model={tmp_path}", *flags])


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(serve.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=re.escape('pip install -e ".[serve]"')):
        serve.main([f"--model={tmp_path}"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    c = config_lib.load("configs/demo.py:tiny")
    shape = dataclasses.replace(c.encoder, max_seq_length=32)  # few shapes to warm
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1])
    params = encoder.init(shape, c.moe, key=jax.random.key(0))
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    prompts = {"query": "search_query: ", "document": "search_document: "}
    path = tmp_path_factory.mktemp("served") / "tiny"
    save(
        Model(shape, c.moe, params, tokenizer_lib.read(c.data.tokenizer), prompts, mesh, "test"), path, made_by="a test"
    )
    return path


@contextlib.contextmanager
def started(folder, *flags, until_line="serving", command=("-m", "moe_embed.serve")):
    """(process, its URL) of a server that has said `until_line`."""
    command = [sys.executable, *command, f"--model={folder}", "--port=0", "--max_batch=16", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        try:
            for line in process.stdout:
                said.append(line)
                if line.startswith(until_line):
                    break
            else:
                raise AssertionError("".join(said))
            yield process, line.split()[-1]
        finally:
            process.kill()


@pytest.fixture(scope="module")
def url(folder):
    with started(folder, "--max_texts=100", "--max_bytes=20000") as (_, where):
        yield where


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, mesh=sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1]))


@pytest.mark.serve
def test_an_answer_is_what_encode_gives(url, model):
    status, answer = ask(url, {"input": TEXTS, "model": "tiny"})
    assert (status, answer["model"]) == (200, "tiny")
    np.testing.assert_allclose(vectors(answer), model.encode(TEXTS), atol=1e-6)
    num_tokens = sum(len(ids) for ids in model.tokenizer.encode(TEXTS, max_length=32)[0])
    assert answer["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    _, packed = ask(url, {"input": TEXTS[0], "encoding_format": "base64", "dimensions": 8})
    read = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(read, model.encode(TEXTS[:1], dim=8)[0], atol=1e-6)


@pytest.mark.serve
def test_the_task_is_the_fields_or_the_headers(url, model):
    query = model.encode(TEXTS[:2], "query")
    for answer in (ask(url, {"input": TEXTS[:2], "task": "query"}), ask(url, {"input": TEXTS[:2]}, headers={"X-Task": "query"}),
                   ask(url, {"input": TEXTS[:2], "task": "query"}, headers={"X-Task": "document"})):  # fmt: skip
        np.testing.assert_allclose(vectors(answer[1]), query, atol=1e-6)
    none = ask(url, {"input": TEXTS[:2], "task": ""}, headers={"X-Task": "query"})[1]
    np.testing.assert_allclose(vectors(none), model.encode(TEXTS[:2]), atol=1e-6)
    assert np.abs(vectors(none) - query).max() > 1e-3


@pytest.mark.serve
def test_company_changes_nobodys_vector_and_a_bad_text_fails_its_own_request_only(url, model):
    expected = {task: model.encode(TEXTS, task) for task in (None, "query")}

    def client(i):
        if i % 8 == 7:
            return ask(url, {"input": [TEXTS[i], " "]})
        return ask(url, {"input": TEXTS[i], "task": "query" if i % 3 == 0 else None})

    for _ in range(3):
        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(client, range(32)))
        for i, (status, answer) in enumerate(answers):
            if i % 8 == 7:
                assert (status, answer["error"]["param"]) == (400, "input")
                continue
            want = expected["query" if i % 3 == 0 else None][i]
            np.testing.assert_allclose(vectors(answer)[0], want, atol=1e-6)
            assert np.abs(vectors(answer)[0] - expected[None if i % 3 == 0 else "query"][i]).max() > 1e-3
    calls = int(re.search(r"encode_texts_count (\d+)", ask(url, path="/metrics")[1])[1])
    texts = int(re.search(r"moe_embed_texts_total (\d+)", ask(url, path="/metrics")[1])[1])
    assert calls < texts  # some went together


@pytest.mark.serve
def test_what_is_not_answered_has_openais_shape(url):
    found = {
        "bad JSON": ask(url, b"{"),
        "empty": ask(url, {"input": []}),
        "many": ask(url, {"input": ["a"] * 101}),
        "large": ask(url, {"input": "a" * 5_000_000}),
        "path": ask(url, path="/v2/nothing"),
        "method": ask(url, path="/v1/embeddings"),
    }
    assert {what: status for what, (status, _) in found.items()} == {
        "bad JSON": 400, "empty": 400, "many": 400, "large": 413, "path": 404, "method": 405,
    }  # fmt: skip
    for _, answer in found.values():
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert ask(url, {"input": "still there"})[0] == 200
    assert 'moe_embed_errors_total{code="413"} 1' in ask(url, path="/metrics")[1]


@pytest.mark.serve
def test_the_model_and_its_health(url):
    there = ask(url, path="/v1/models")[1]
    assert (there["object"], [one["id"] for one in there["data"]]) == ("list", ["tiny"])
    assert ask(url, path="/health") == (200, {"status": "ready"})


@pytest.mark.serve
def test_the_benchmarks_clients_get_what_encode_gives(url, model):
    where = url.removeprefix("http://")
    calls, seconds = serving.counters(where)
    np.testing.assert_allclose(serving.served(where, TEXTS, 8), model.encode(TEXTS), atol=1e-6)
    more_calls, more_seconds = serving.counters(where)
    assert 1 <= more_calls - calls <= len(TEXTS)
    assert more_seconds > seconds


@pytest.mark.serve
def test_sigterm_answers_what_was_asked_and_exits_0(folder, model):
    texts = [f"{text} {i}" for i in range(64) for text in TEXTS]
    with started(folder) as (process, where), concurrent.futures.ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, where, {"input": texts})
        until(lambda: "moe_embed_texts_total 0" not in ask(where, path="/metrics")[1])
        assert not asked.done()
        process.send_signal(signal.SIGTERM)
        status, answer = asked.result(60)
        assert status == 200
        np.testing.assert_allclose(vectors(answer)[-3:], model.encode(texts[-3:]), atol=1e-6)
        assert process.wait(30) == 0
        assert process.stdout.read() == ""
        with pytest.raises(urllib.error.URLError):
            ask(where, path="/health")


SLOW = """
import sys, time
import numpy as np
from moe_embed import serve, verb
def slow(texts, key):
    print("encoding", flush=True)
    time.sleep(6)
    return np.ones((len(texts), 4), np.float32), np.ones(len(texts), int)
serve.encoder, serve.GRACE, serve.LAST_WORD = lambda model: slow, 2.0, 1.0
verb.run(serve.main)
"""


@pytest.mark.serve
def test_who_would_be_cut_off_is_told_that_the_server_ends(folder):
    command = ("-c", SLOW)
    with started(folder, command=command) as (process, where), concurrent.futures.ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ask, where, {"input": "a"})]
        assert process.stdout.readline() == "encoding\n"
        asked.append(pool.submit(ask, where, {"input": "b"}))  # waits for its turn
        until(lambda: "moe_embed_queue_texts 1" in ask(where, path="/metrics")[1])
        process.send_signal(signal.SIGTERM)
        for status, answer in (one.result(5) for one in asked):
            assert (status, answer["error"]["code"]) == (503, "ending")
        assert process.wait(30) == 0
        assert process.stdout.read() == ""  # no traceback


@pytest.mark.serve
def test_ctrl_c_while_it_warms_up_exits_0(folder):
    with started(folder, until_line="warming up") as (process, _):
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stdout.read() == ""


@pytest.mark.serve
def test_a_port_in_use_is_a_sentence_and_exit_2(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run([sys.executable, "-m", "moe_embed.serve", f"--model={tmp_path}", f"--port={port}"],
                              capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 2
    assert f"cannot listen at --host=127.0.0.1 --port={port}" in done.stderr
    assert "in use" in done.stderr
    assert "Traceback" not in done.stderr


class Held:
    """An `encode` that waits in each call until `open` is set, and fails on the text "boom"."""

    def __init__(self):
        self.calls, self.open = [], threading.Event()

    def __call__(self, texts, key):
        self.calls.append(texts)
        assert self.open.wait(20)
        if "boom" in texts:
            raise RuntimeError("boom")
        return np.ones((len(texts), 4), np.float32), np.ones(len(texts), int)


@pytest.fixture
def held():
    """(the encode, the URL, an event: is it warm) of the application in this process, with room for 4 texts to wait."""
    import uvicorn

    encode, ready = Held(), threading.Event()
    ready.set()
    fake = types.SimpleNamespace(encoder=types.SimpleNamespace(dim=4, max_seq_length=8), prompts={})
    flags = argparse.Namespace(task=None, max_texts=4, max_bytes=1000, max_queue=4)
    batcher = Batcher(encode, max_batch=4, max_queue=4)
    listener = serve.listen("127.0.0.1", 0)
    app = serve.application(fake, batcher, name="m", flags=flags, is_ready=ready.is_set)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", ws="none"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield encode, f"http://127.0.0.1:{listener.getsockname()[1]}", ready
    encode.open.set()
    server.should_exit = True
    thread.join(20)
    batcher.close()


def test_a_long_warm_up_says_how_far_it_is(monkeypatch, capsys):
    """A line now and then; a bar is for a terminal."""
    shape = types.SimpleNamespace(max_seq_length=32)
    model = types.SimpleNamespace(encoder=shape, mesh=types.SimpleNamespace(size=1), encode=lambda *a, **k: None)
    wanted = len(serve.shapes(32, num_devices=1, max_batch=16))
    assert wanted > 3
    for between, lines in ((-1.0, wanted), (1000.0, 0)):
        monkeypatch.setattr(serve, "BETWEEN_LINES", between)
        serve.warm_up(model, max_batch=16, ending=threading.Event())
        out, err = capsys.readouterr()
        assert out.startswith(f"warming up: {wanted} shapes, rows of ")
        assert len(re.findall(rf" of {wanted} shapes, \d+ s\n", out)) == lines
        assert err == ""


@pytest.mark.serve
def test_before_it_is_warm_it_says_so(held):
    encode, where, ready = held
    ready.clear()
    assert ask(where, path="/health")[0] == 503
    status, answer = ask(where, {"input": "a"})
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (503, "server_error", "warming_up")
    assert encode.calls == []


@pytest.mark.serve
def test_a_full_queue_is_429(held):
    encode, where, _ = held
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask, where, {"input": "a"})
        until(lambda: encode.calls)
        second = pool.submit(ask, where, {"input": ["b"] * 4})
        until(lambda: "moe_embed_queue_texts 4" in ask(where, path="/metrics")[1])
        status, answer = ask(where, {"input": "c"})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        encode.open.set()
        assert first.result(20)[0] == second.result(20)[0] == 200
    assert ask(where, {"input": "c"})[0] == 200


@pytest.mark.serve
def test_whoever_hangs_up_is_not_encoded(held):
    encode, where, _ = held
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        first = pool.submit(ask, where, {"input": "a"})
        until(lambda: encode.calls)
        connection = http.client.HTTPConnection(where.removeprefix("http://"))
        connection.request("POST", "/v1/embeddings", json.dumps({"input": ["gone", "gone"]}))
        until(lambda: "moe_embed_queue_texts 2" in ask(where, path="/metrics")[1])
        connection.close()
        until(lambda: "moe_embed_queue_texts 0" in ask(where, path="/metrics")[1])
        encode.open.set()
        assert first.result(20)[0] == 200
    assert ask(where, {"input": "b"})[0] == 200
    assert encode.calls == [["a"], ["b"]]


@pytest.mark.serve
def test_a_fault_of_ours_is_500_without_its_insides(held):
    encode, where, _ = held
    encode.open.set()
    status, answer = ask(where, {"input": "boom"})
    assert (status, answer["error"]["type"]) == (500, "server_error")
    assert "boom" not in answer["error"]["message"]
    assert ask(where, {"input": "a"})[0] == 200
