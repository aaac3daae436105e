"""Before any test touches jax: eight virtual CPU devices. And what is not run is said, with the reason."""

import importlib.util
import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import pytest

from tests import browser

if os.environ["JAX_PLATFORMS"] == "cpu":
    # Threads of XLA's CPU client. A device that waits in a collective holds one; with as many as cores, eight virtual
    # devices can all be waiting for a ninth thing to run.
    os.environ.setdefault("NPROC", "32")
    jax.config.update("jax_num_cpu_devices", 8)
cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moe_embed/xla-tests"))
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "sentence_transformers"))
HAS_SERVER = all(importlib.util.find_spec(name) for name in ("starlette", "uvicorn"))
HAS_GCSFS = importlib.util.find_spec("gcsfs") is not None
HAS_BROWSER = browser.find() is not None
HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
NEED_TORCH = ("parity", "bench/torch_peers.py", "bench/gpu_torch.py")  # at their import
collect_ignore = [*(NEED_TORCH if not HAS_TORCH else ()), *(("aot",) if not HAS_LIBTPU else ())]


def pytest_addoption(parser):
    parser.addoption("--released", metavar="DIR", help="a copy of nomic-ai/nomic-embed-text-v2-moe, for -m released")
    parser.addoption(
        "--stand_in", action="store_true", help="for -m gpu: a CPU device as the GPU, to see the tests run"
    )


@pytest.hookimpl(trylast=True)  # after -m has selected
def pytest_collection_modifyitems(config, items):
    """Tests of what may be absent run where it is there. Asked for by name without it, they are an error, not a skip."""
    needs = {
        "released": (
            lambda: config.getoption("--released") is not None,
            "-m released reads the released model: add --released=DIR, a copy of nomic-embed-text-v2-moe.",
        ),
        "gpu": (
            lambda: config.getoption("--stand_in") or _has_gpu(),
            f"-m gpu needs a GPU, and JAX_PLATFORMS={os.environ['JAX_PLATFORMS']} gives jax none; on a machine with one run "
            "bash launch/gpu_check.sh, which sets JAX_PLATFORMS=cuda,cpu.",
        ),
        "serve": (
            lambda: HAS_SERVER,
            '-m serve starts servers, and starlette or uvicorn is absent: pip install -e ".[serve]".',
        ),
        "gcs": (lambda: HAS_GCSFS, '-m gcs writes to gs://, and gcsfs is absent: pip install -e ".[gcs]".'),
        "deploy": (
            lambda: HAS_TORCH and all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
            '-m deploy opens exports in sentence-transformers, transformers and ONNX Runtime: pip install -e ".[deploy]" '
            "(on Python 3.11 without a GPU, torch==2.13.0 first).",
        ),
        "report": (
            lambda: HAS_BROWSER,
            "-m report opens reports in a browser, and there is none: put chromium on PATH, or name one, CHROME=/path/to/chromium.",
        ),
        "notebooks": (
            lambda: all(map(importlib.util.find_spec, ("nbclient", "ipykernel"))),
            '-m notebooks executes colab/ by nbclient: pip install -e ".[notebooks]".',
        ),
        "mteb": (
            lambda: importlib.util.find_spec("mteb") is not None,
            '-m mteb needs mteb: pip install -e ".[mteb]" (on Python 3.11 without a GPU, torch==2.13.0 first).',
        ),
    }
    for marker, (is_there, sentence) in needs.items():
        marked = [item for item in items if item.get_closest_marker(marker)]
        if not marked or is_there():
            continue
        if marker in config.option.markexpr:
            raise pytest.UsageError(sentence)
        items[:] = [item for item in items if item not in marked]
        config.hook.pytest_deselected(items=marked)


def _has_gpu() -> bool:
    try:
        return bool(jax.devices("gpu"))
    except RuntimeError:  # jax's word for a platform that it does not have, or that does not start
        return False


def pytest_terminal_summary(terminalreporter):
    """Without the [torch], the [tpu], the [serve] or the [gcs] extra, or a browser, the last lines of a run say what that costs."""
    if not HAS_LIBTPU:
        terminalreporter.write_line("NOT RUN: tests/aot, because libtpu is absent (the tpu extra)")
    if not HAS_TORCH:
        terminalreporter.write_line(
            "NOT RUN: tests/parity, because torch, transformers or sentence-transformers is absent"
        )
    if not HAS_SERVER:
        terminalreporter.write_line("NOT RUN: -m serve, because starlette or uvicorn is absent (the serve extra)")
    if not HAS_GCSFS:
        terminalreporter.write_line("NOT RUN: -m gcs, because gcsfs is absent (the gcs extra)")
    if not HAS_BROWSER:
        terminalreporter.write_line("NOT RUN: -m report, because no browser is on PATH or named by CHROME")


@pytest.fixture(autouse=True, scope="module")
def _let_go():
    """What a file has compiled is not kept for the next ones: at its end one process held 7.8 GB."""
    yield
    jax.clear_caches()


@pytest.fixture
def eight_devices():
    assert jax.device_count() == 8, "tests/conftest.py sets eight virtual devices before jax starts"
    return jax.devices()


@pytest.fixture(scope="session")
def gpu(request):
    """The device that tests of marker `gpu` compare with the CPU."""
    return jax.devices("cpu")[-1] if request.config.getoption("--stand_in") else jax.devices("gpu")[0]
