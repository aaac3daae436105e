"""OpenAI's protocol for embeddings: bodies of requests, answers and errors, and Prometheus's text. No server in here."""

import base64
import dataclasses
import json
from collections.abc import Mapping

import numpy as np

from moe_embed.batcher import SIZES, Counts
from moe_embed.data import tables
from moe_embed.load import Model

FIELDS = ("input", "model", "encoding_format", "dimensions", "user", "task")
TYPES = {429: "rate_limit_error"}  # OpenAI's words; other 4xx are "invalid_request_error", 5xx "server_error"


class Refusal(Exception):
    """A request that is not answered: an HTTP status and OpenAI's words for why."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


@dataclasses.dataclass(frozen=True)
class Asked:
    """A request for embeddings that can be answered."""

    texts: list[str]
    task: str | None
    dim: int | None
    as_base64: bool


def parse(body: bytes, *, model: Model, name: str, task: str | None, max_texts: int) -> Asked:
    """A body -> what it asks for. `task` is that of a request that names none. Raises Refusal with OpenAI's param."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}.", code="invalid_json") from error
    if not isinstance(fields, dict):
        raise Refusal(400, 'the body is no JSON object; send {"input": ..., "model": ...}.', code="invalid_json")
    if unknown := sorted(set(fields) - set(FIELDS)):
        raise Refusal(
            400,
            f"unknown field {unknown[0]!r:.80}; there are {', '.join(FIELDS)}.",
            param=unknown[0][:80].encode("utf-8", "backslashreplace").decode(),
        )  # half a pair of UTF-16 is no text
    # null is the same as nothing
    asked_model, style, dim = fields.get("model"), fields.get("encoding_format"), fields.get("dimensions")
    if asked_model is not None and asked_model != name:
        raise Refusal(404, f"there is no model {asked_model!r:.80}; this server has {name!r}.", param="model",
                      code="model_not_found")  # fmt: skip
    texts = _texts(fields.get("input"), max_texts=max_texts)
    if style not in (None, "float", "base64"):
        raise Refusal(400, f"encoding_format {style!r:.80} is neither float nor base64.", param="encoding_format")
    top = model.encoder.dim
    if dim is not None and (not isinstance(dim, int) or isinstance(dim, bool) or not 1 <= dim <= top):
        raise Refusal(400, f"dimensions {dim!r:.80} is no whole number from 1 to {top}.", param="dimensions")
    task = task if fields.get("task") is None else fields["task"]
    if task is not None and (not isinstance(task, str) or (task and task not in model.prompts)):
        has = ", ".join(model.prompts) or "none"
        raise Refusal(400, f'unknown task {task!r:.80}; the model has {has}, and "" is no prompt.', param="task")
    return Asked(texts, task or None, dim, style == "base64")


def _texts(given, *, max_texts: int) -> list[str]:
    refuse = lambda message: Refusal(400, message, param="input", code="invalid_input")  # noqa: E731
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts:
        raise refuse("input is no text and no list of texts, or there is none in it.")
    if len(texts) > max_texts:
        raise refuse(f"input has {len(texts)} texts; {max_texts} are the limit of a request.")
    if any(isinstance(one, int | list) for one in texts):
        raise refuse("input holds token ids, which another tokenizer may have made; send texts.")
    for i, text in enumerate(texts):
        if not tables.is_text(text):
            raise refuse(f"text {i} of input is empty or no text: {text!r:.60}.")
    return texts


def written(vector_ND: np.ndarray, tokens_N: np.ndarray, *, name: str, as_base64: bool) -> bytes:
    """OpenAI's answer. An item at a time: json holds all other threads while it writes one."""

    def item(i: int) -> str:
        row_D = vector_ND[i].astype("<f4")
        embedding = base64.b64encode(row_D.tobytes()).decode() if as_base64 else row_D.tolist()
        return json.dumps({"object": "embedding", "index": i, "embedding": embedding})

    total = int(tokens_N.sum())
    end = json.dumps({"model": name, "usage": {"prompt_tokens": total, "total_tokens": total}})
    return f'{{"object": "list", "data": [{", ".join(map(item, range(len(vector_ND))))}], {end[1:]}'.encode()


def error_body(error: Refusal) -> dict:
    """OpenAI's shape of an error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = TYPES[error.status] if error.status in TYPES else kind
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def exposition(counts: Counts, *, num_requests: int, num_waiting: int, errors: Mapping[int, int]) -> str:
    """The counters in Prometheus's text format; each name begins with moe_embed_."""
    lines = []

    def say(metric: str, kind: str, meaning: str, values: Mapping[str, float]) -> None:
        lines.extend((f"# HELP moe_embed_{metric} {meaning}", f"# TYPE moe_embed_{metric} {kind}"))
        lines.extend(f"moe_embed_{metric}{label} {value}" for label, value in values.items())

    say("requests_total", "counter", "Requests for embeddings.", {"": num_requests})
    say("texts_total", "counter", "Texts encoded.", {"": counts.texts})
    say("tokens_total", "counter", "Tokens encoded, prompts and ends included.", {"": counts.tokens})
    by_code = {f'{{code="{status}"}}': count for status, count in sorted(errors.items())}
    say("errors_total", "counter", "Answers that are errors, by HTTP status, on any path.", by_code)
    say("queue_texts", "gauge", "Texts that wait.", {"": num_waiting})
    say("encode_seconds_total", "counter", "Seconds spent in encoding.", {"": counts.seconds})
    say(
        "failed_calls_total",
        "counter",
        "Calls of encode that failed; they are in no other figure.",
        {"": counts.failed_calls},
    )
    up_to = np.cumsum(counts.by_size).tolist()
    ends = [*(str(size) for size in SIZES), "+Inf"]
    values = {f'_bucket{{le="{end}"}}': count for end, count in zip(ends, up_to, strict=True)}
    values |= {"_sum": counts.texts, "_count": up_to[-1]}
    say("encode_texts", "histogram", "Texts of a call of encode.", values)
    return "\n".join(lines) + "\n"
