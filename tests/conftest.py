"""Before any test touches jax: eight virtual CPU devices. And what is not run is said, with the reason."""

import importlib.util
import os

os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")

import jax
import pytest

if os.environ["JAX_PLATFORMS"] == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
cache = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/moe_embed/xla-tests"))
jax.config.update("jax_compilation_cache_dir", cache)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

HAS_TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers", "sentence_transformers"))


def pytest_collection_modifyitems(config, items):
    """Without the [torch] extra the parity tests are deselected, and the last lines of the run say so."""
    if HAS_TORCH:
        return
    parity = [item for item in items if item.get_closest_marker("parity")]
    if parity:
        config.hook.pytest_deselected(items=parity)
        items[:] = [item for item in items if item not in parity]
        config.not_run = f"{len(parity)} parity tests: torch, transformers or sentence-transformers is absent"


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "not_run"):
        terminalreporter.write_line(f"NOT RUN: {config.not_run}")


@pytest.fixture
def eight_devices():
    assert jax.device_count() == 8, "tests/conftest.py sets eight virtual devices before jax starts"
    return jax.devices()
