"""--push asks before any work, names every argument as huggingface_hub does, and the token shows nowhere."""

import inspect
import socket
import subprocess
import sys

import pytest

from moe_embed import push
from moe_embed.config import UserError

TOKEN = {"HF_TOKEN": "hf_secret"}


class Stand:
    """HfApi's place: keeps the calls, and binds each to the real signature."""

    calls: list = []  # noqa: RUF012
    fault: Exception | None = None

    def __init__(self, **kwargs):
        self.note("__init__", **kwargs)

    def note(self, name, *args, **kwargs):
        bound = inspect.signature(getattr(Stand.real, name)).bind(self, *args, **kwargs)
        Stand.calls.append((name, {key: value for key, value in bound.arguments.items() if key != "self"}))

    def create_repo(self, *args, **kwargs):
        self.note("create_repo", *args, **kwargs)
        return "address"

    def upload_folder(self, *args, **kwargs):
        self.note("upload_folder", *args, **kwargs)
        if Stand.fault:
            raise Stand.fault


@pytest.fixture
def stand(monkeypatch):
    import huggingface_hub  # with tokenizers, in the core

    monkeypatch.setattr(Stand, "real", huggingface_hub.HfApi, raising=False)
    monkeypatch.setattr(Stand, "calls", [])
    monkeypatch.setattr(Stand, "fault", None)
    monkeypatch.setattr(huggingface_hub, "HfApi", Stand)
    return Stand


def test_the_folder_goes_to_a_private_repository(stand, tmp_path, capfd):
    assert push.push(tmp_path, "a/b", environment=TOKEN) == "address"
    assert [name for name, _ in stand.calls] == ["__init__", "create_repo", "upload_folder"]
    assert stand.calls[0][1] == {"token": "hf_secret"}
    assert stand.calls[1][1] == {"repo_id": "a/b", "private": True, "exist_ok": True}
    assert stand.calls[2][1]["folder_path"] == tmp_path
    push.push(tmp_path, "a/b", public=True, environment=TOKEN)
    assert stand.calls[4][1]["private"] is False
    assert "hf_secret" not in "".join(capfd.readouterr())
    assert not list(tmp_path.iterdir())


def test_an_argument_that_the_package_does_not_know_is_noticed(stand):
    with pytest.raises(TypeError):
        stand(token="x").create_repo("a/b", privat=True)


def test_a_refusal_is_one_sentence_without_the_token(stand, tmp_path):
    for kind in (OSError, RuntimeError):  # the latter is what huggingface_hub says of a file that broke off
        stand.fault = kind("bad hf_secret\nat a server")
        with pytest.raises(UserError, match=r"not pushed to a/b: bad \*\*\* at a server"):
            push.push(tmp_path, "a/b", environment=TOKEN)


@pytest.mark.parametrize(("said", "words"), [("no route", "no route"), ("", "ConnectError")])
def test_whatever_package_sends_its_faults_are_one_sentence(stand, monkeypatch, tmp_path, said, words):
    of_the_sender = type("HTTPError", (Exception,), {})
    refusal = type("HfHubHTTPError", (of_the_sender, OSError), {})  # so in httpx, httpx2 and what comes after them
    monkeypatch.setattr("huggingface_hub.errors.HfHubHTTPError", refusal)
    stand.fault = type("ConnectError", (of_the_sender,), {})(said)
    with pytest.raises(UserError, match=f"the folder is written, but was not pushed to a/b: {words}"):
        push.push(tmp_path, "a/b", environment=TOKEN)
    stand.fault = type("Other", (Exception,), {})("a fault of ours")
    with pytest.raises(type(stand.fault), match="a fault of ours"):
        push.push(tmp_path, "a/b", environment=TOKEN)


def test_a_hub_that_cannot_be_reached_is_one_sentence(monkeypatch, tmp_path):
    """The package itself, whichever version is here, at a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"http://127.0.0.1:{closed.getsockname()[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=r"not pushed to a/b: .*[Cc]onnect"):
        push.push(tmp_path, "a/b", environment=TOKEN)


def test_files_of_an_earlier_export_that_this_one_lacks_go(stand, tmp_path):
    from huggingface_hub.utils import filter_repo_objects

    (tmp_path / "onnx").mkdir()
    for name in ("config.json", "onnx/model.onnx"):
        (tmp_path / name).touch()
    push.push(tmp_path, "a/b", replaces={"config.json", "onnx/model.onnx", "m.gguf", "cal.json"}, environment=TOKEN)
    patterns = stand.calls[2][1]["delete_patterns"]
    there = ["config.json", "onnx/model.onnx", "m.gguf", "cal.json", "of_others/cal.json", "notes.md", "xm.gguf"]
    assert list(filter_repo_objects(there, allow_patterns=patterns)) == ["m.gguf", "cal.json"]
    push.push(tmp_path, "a/b", environment=TOKEN)
    assert not stand.calls[5][1]["delete_patterns"]


def test_what_is_missing_is_said_first(monkeypatch):
    with pytest.raises(UserError, match="--push=b is no OWNER/NAME"):
        push.check("b", TOKEN)
    with pytest.raises(UserError, match="environment variable HF_TOKEN"):
        push.check("a/b", {})
    push.check("a/b", TOKEN)
    monkeypatch.setattr(push.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="--push needs huggingface_hub"):
        push.check("a/b", TOKEN)


def test_the_verb_asks_before_any_work(monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN", raising=False)
    command = [
        sys.executable,
        "-m",
        "moe_embed.export",
        "--model=nowhere",
        f"--output={tmp_path / 'out'}",
        "--push=a/b",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "HF_TOKEN" in done.stderr  # and nothing about the model that is not there
    assert len(done.stderr.splitlines()) == 1
