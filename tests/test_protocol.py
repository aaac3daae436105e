"""Bodies in, answers out: what is read, what is refused in OpenAI's words, and that the numbers survive both forms."""

import base64
import json
import types

import numpy as np
import pytest

from moe_embed import protocol
from moe_embed.batcher import SIZES, Counts
from moe_embed.protocol import Asked, Refusal

MODEL = types.SimpleNamespace(encoder=types.SimpleNamespace(dim=32), prompts={"query": "q: ", "document": "d: "})


def parsed(body, *, task=None) -> Asked:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return protocol.parse(body, model=MODEL, name="demo", task=task, max_texts=3)


def test_what_a_request_may_leave_out_and_what_it_may_say():
    assert parsed({"input": "a"}) == Asked(["a"], None, None, False)
    nulls = dict.fromkeys(("model", "encoding_format", "dimensions", "user", "task"))
    assert parsed({"input": ["a", "b"]} | nulls, task="query") == Asked(["a", "b"], "query", None, False)
    all_said = {
        "input": ["a"],
        "model": "demo",
        "encoding_format": "base64",
        "dimensions": 32,
        "user": "u",
        "task": "document",
    }
    assert parsed(all_said, task="query") == Asked(["a"], "document", 32, True)
    assert parsed({"input": "a", "task": ""}, task="query").task is None  # none, where the server has a default


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        (b"{", 400, None, "no JSON"),
        (b"\xff", 400, None, "no JSON"),
        (b"[" * 100_000, 400, None, "no JSON"),
        ([1], 400, None, "no JSON object"),
        ({"model": "demo"}, 400, "input", "no list of texts"),
        ({"input": []}, 400, "input", "none in it"),
        ({"input": ""}, 400, "input", "text 0 of input is empty"),
        ({"input": ["a", " \n"]}, 400, "input", "text 1 of input is empty"),
        ({"input": ["a", None]}, 400, "input", "text 1 of input is empty or no text: None"),
        ({"input": ["\ud800"]}, 400, "input", "text 0"),
        ({"input": ["a"] * 4}, 400, "input", "4 texts; 3 are the limit"),
        ({"input": [1, 2]}, 400, "input", "token ids"),
        ({"input": [[1, 2], [3]]}, 400, "input", "token ids"),
        ({"input": "a", "dimensions": 33}, 400, "dimensions", "from 1 to 32"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions", "from 1 to 32"),
        ({"input": "a", "dimensions": True}, 400, "dimensions", "True"),
        ({"input": "a", "dimensions": "8"}, 400, "dimensions", "'8'"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "'int8'"),
        ({"input": "a", "task": "passage"}, 400, "task", "query, document"),
        ({"input": "a", "task": ["query"]}, 400, "task", "unknown task"),
        ({"input": "a", "model": "other"}, 404, "model", "this server has 'demo'"),
        ({"input": "a", "prompt": "x"}, 400, "prompt", "unknown field 'prompt'"),
        (b'{"\\ud800": 1}', 400, "\\ud800", "unknown field"),
    ],
)
def test_refusals_say_what_and_where(body, status, param, words):
    with pytest.raises(Refusal) as caught:
        parsed(body)
    error = protocol.error_body(caught.value)["error"]
    assert (caught.value.status, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}
    assert json.dumps(error, ensure_ascii=False).encode()  # as starlette writes it


def test_a_default_task_that_a_client_names_wrongly_is_refused_too():
    with pytest.raises(Refusal, match="unknown task 'passage'"):
        parsed({"input": "a"}, task="passage")


def test_errors_have_openais_types():
    kinds = {status: protocol.error_body(Refusal(status, "x"))["error"]["type"] for status in (404, 413, 429, 500, 503)}
    assert kinds == {404: "invalid_request_error", 413: "invalid_request_error", 429: "rate_limit_error",
                     500: "server_error", 503: "server_error"}  # fmt: skip


def test_an_answer_is_openais_and_exact_in_both_forms():
    vectors = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    read = {
        form: json.loads(protocol.written(vectors, np.array([3, 4, 5]), name="demo", as_base64=form == "base64"))
        for form in ("float", "base64")
    }
    for answer in read.values():
        assert list(answer) == ["object", "data", "model", "usage"]
        assert (answer["object"], answer["model"]) == ("list", "demo")
        assert answer["usage"] == {"prompt_tokens": 12, "total_tokens": 12}
        assert [(item["object"], item["index"]) for item in answer["data"]] == [("embedding", i) for i in range(3)]
    floats = np.array([item["embedding"] for item in read["float"]["data"]])
    packed = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in read["base64"]["data"]]
    np.testing.assert_array_equal(floats.astype(np.float32), vectors)
    np.testing.assert_array_equal(packed, vectors)
    assert not np.array_equal(np.float32(np.round(floats, 6)), vectors)  # fewer digits would be noticed


def test_the_counters_are_prometheus_text():
    counts = Counts(texts=7, tokens=70, calls=2, failed_calls=3, seconds=0.5)
    counts.by_size[0] = counts.by_size[3] = 1
    text = protocol.exposition(counts, num_requests=5, num_waiting=4, errors={503: 1, 400: 2})
    lines = text.splitlines()
    for line in ("moe_embed_requests_total 5", "moe_embed_texts_total 7", "moe_embed_tokens_total 70",
                 'moe_embed_errors_total{code="400"} 2', 'moe_embed_errors_total{code="503"} 1',
                 "moe_embed_failed_calls_total 3", "moe_embed_queue_texts 4", "moe_embed_encode_seconds_total 0.5", "moe_embed_encode_texts_count 2",
                 'moe_embed_encode_texts_bucket{le="4"} 1', 'moe_embed_encode_texts_bucket{le="8"} 2',
                 'moe_embed_encode_texts_bucket{le="+Inf"} 2', "moe_embed_encode_texts_sum 7"):  # fmt: skip
        assert line in lines
    assert text.endswith("\n")
    assert len([line for line in lines if "_bucket" in line]) == len(SIZES) + 1
