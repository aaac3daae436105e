"""Before any test touches jax: eight virtual CPU devices. And what is not run is said, with the reason."""

import importlib.util
import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
    # Threads of XLA's CPU client. A device that waits in a collective holds one; with as many as cores, eight virtual
    # devices can all be waiting for a ninth thing to run.
    os.environ.setdefault("NPROC", "32")
    jax.config.update("jax_num_cpu_devices", 8)
cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moe_embed/xla-tests"))
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "sentence_transformers"))
collect_ignore = [] if HAS_TORCH else ["parity"]


def pytest_terminal_summary(terminalreporter):
    """Without the [torch] extra the last lines of a run say what that costs."""
    if not HAS_TORCH:
        terminalreporter.write_line(
            "NOT RUN: tests/parity, because torch, transformers or sentence-transformers is absent"
        )


@pytest.fixture
def eight_devices():
    assert jax.device_count() == 8, "tests/conftest.py sets eight virtual devices before jax starts"
    return jax.devices()
