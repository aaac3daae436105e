"""The house rules, read from the sources with ast: who imports whom, what lives where, and what never occurs."""

import ast
import graphlib
import pathlib
import re

import pytest

import moe_embed
from moe_embed import sharding
from moe_embed.__main__ import VERBS

PACKAGE = pathlib.Path(moe_embed.__file__).parent
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text("utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(text) for name, text in FILES.items()}
OURS = [name for name in TREES if not name.startswith(("torch_files/", "sample/"))]  # what `import` can find

LAYERS = (
    {"config", "verb", "metrics", "job", "cluster", "agreement", "fields", "watchdog", "preemption", "stored", "bucket", "batcher"},
    {"data", "data.sources", "data.pairs", "data.tables", "data.tally", "data.inputs", "data.prepared", "data.hygiene", "data.spool", "data.tokenizer", "data.mixture", "data.packing", "data.batches", "data.sizes", "data.loading", "data.mlm_batches", "data.origin", "data.corpus", "data.vocabulary"},
    {"sharding"},
    {"model", "model.capability", "model.attention", "model.layers", "model.grouped_matmul", "model.triton_grouped_matmul", "model.moe", "model.mlm_head",
     "model.encoder"},
    {"infonce", "ring_infonce", "objectives", "optim", "program", "checkpoint", "retrieval", "results", "results_table", "significance", "bm25", "quantize", "hf_layout", "bias_fold", "hf_config", "hf_folder",
     "tokenizer_json", "model_card", "load", "protocol", "mteb_model", "same_run", "held_out", "hlo", "hlo_count",
     "topology", "estimate", "ahead", "bars", "data_card", "named_tasks", "mteb_results", "watch", "saving", "beginning", "health", "card_facts", "calibrate", "gguf_file", "push", "vector_file", "run_data", "trackers", "page", "charts", "heat_map", "geometry", "expert_maps", "run_texts", "report_sections", "retrieval_section", "model_sections"},
    {""},  # moe_embed/__init__.py: the public names
    {"__main__", *VERBS},
)  # fmt: skip
LEVEL = {module: level for level, modules in enumerate(LAYERS) for module in modules}
FENCES = {
    "flax": {"model/layers.py", "model/moe.py", "model/encoder.py", "load.py"},  # load.write_description: its version
    "orbax": {"checkpoint.py", "saving.py", "load.py"},  # the same
    "sentencepiece": {"data/tokenizer.py", "data/vocabulary.py", "tokenizer_json.py", "gguf_file.py", "sample/make.py"},
    "tokenizers": {"data/tokenizer.py", "tokenizer_json.py"},
    "ml_collections": {"config.py"},
    "torch": {"torch_files/modeling_moe_embed.py", "torch_files/check_export.py", "torch_files/to_onnx.py"},
    "transformers": {"torch_files/modeling_moe_embed.py", "torch_files/check_export.py", "torch_files/to_onnx.py"},
    "onnxruntime": {"torch_files/to_onnx.py"},
    "sentence_transformers": {"torch_files/check_export.py"},
    "safetensors": {"hf_folder.py", "export.py"},
    "gguf": {"gguf_file.py"},
    "llama_cpp": {"gguf_file.py"},
    "huggingface_hub": {"push.py"},
    "tensorboardX": {"trackers.py"},
    "wandb": {"trackers.py"},
    "pytrec_eval": {"retrieval.py"},
    "bm25s": {"bm25.py"},
    "starlette": {"serve.py"},
    "uvicorn": {"serve.py"},
    "mteb": {"mteb_model.py", "mteb_benchmark.py", "named_tasks.py"},
    "array_record": {"data/prepared.py", "data/spool.py"},
    "tensorflow_datasets": {"data/inputs.py", "data/prepared.py", "data/spool.py"},
    "datasets": {"data/inputs.py"},
    "fsspec": {"bucket.py"},
    "pickle": set(),
}
NO_TEST = {
    "__init__.py": "the legend, and names that are tested where they are defined",
    "data/__init__.py": "a docstring",
    "model/__init__.py": "a docstring",
    "torch_files/modeling_moe_embed.py": "runs beside torch: tests/parity",
    "torch_files/check_export.py": "runs beside torch: tests/parity",
    "torch_files/to_onnx.py": "runs beside torch and ONNX Runtime: tests/deploy",
    "sample/make.py": "made the sample once, from files that do not ship",
}


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("__init__").rstrip("/").replace("/", ".")


def imports(tree: ast.AST):
    """(line, dotted name) of every import, at any depth; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def imported_modules(name: str):
    """(line, module of ours) imported by a file; "" is the package itself."""
    for line, dotted in imports(TREES[name]):
        parts = dotted.split(".")
        if parts[0] == "moe_embed":
            inner = parts[1:]
            while inner and ".".join(inner) not in LEVEL:  # moe_embed.config.UserError -> config
                inner.pop()
            yield line, ".".join(inner)


def calls(tree: ast.AST):
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_every_module_has_a_level():
    assert {module_of(name) for name in OURS} == set(LEVEL)


def test_imports_point_down_and_the_same_level_is_acyclic():
    wrong, graph = [], {}
    for name in OURS:
        module = module_of(name)
        graph[module] = set()
        for line, other in imported_modules(name):
            graph[module].add(other)
            if LEVEL[other] > LEVEL[module]:
                wrong.append(f"{name}:{line} imports {other or 'moe_embed'}, which is above it")
            if LEVEL[module] == LEVEL[other] == len(LAYERS) - 1:
                wrong.append(f"{name}:{line} is a verb and imports the verb {other}")
            if module.startswith("model") and other.startswith("data"):
                wrong.append(f"{name}:{line} is a model file and imports {other}")
    assert not wrong
    assert graph[""] == {"config", "load", "mteb_model"}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a cycle


def test_the_import_reader_sees_what_it_should():
    found = {other for _, other in imported_modules("train.py")}
    assert {"config", "checkpoint", "data.batches", "load", "metrics"} <= found
    deep = ast.parse("def f():\n import a.b as c\n from d import e")
    assert [dotted for _, dotted in imports(deep)] == ["a.b", "d.e"]


def test_the_host_wing_and_the_ground_do_without_jax():
    wrong = [
        f"{name}:{line}"
        for name in OURS if name.startswith("data/") or name == "metrics.py"
        for line, dotted in imports(TREES[name]) if dotted.split(".")[0] in ("jax", "flax", "optax", "orbax")
    ]  # fmt: skip
    assert not wrong
    at_the_top = [node for node in TREES["config.py"].body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not [alias.name for node in at_the_top for alias in node.names if alias.name.startswith("jax")]


@pytest.mark.parametrize("package", FENCES)
def test_a_package_stays_behind_its_fence(package):
    found = {name for name, tree in TREES.items() for _, dotted in imports(tree) if dotted.split(".")[0] == package}
    assert found <= FENCES[package]
    assert bool(found) == bool(FENCES[package])  # else the fence guards nothing


def test_only_sharding_names_mesh_axes_and_partitions():
    wrong = []
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            literal = isinstance(node, ast.Constant) and node.value in sharding.AXES
            if literal and name not in ("sharding.py", "config.py"):
                wrong.append(f"{name}:{node.lineno} has the literal {node.value!r}")
            word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
            if word in ("PartitionSpec", "NamedSharding") and name != "sharding.py":
                wrong.append(f"{name}:{node.lineno} uses {word}")
    assert not wrong


@pytest.mark.parametrize("name", TREES)
def test_a_module_fits_in_one_sitting_and_says_what_it_is(name):
    assert len(FILES[name].splitlines()) <= 400
    assert ast.get_docstring(TREES[name])


@pytest.mark.parametrize("name", [name for name in TREES if name not in NO_TEST])
def test_a_module_has_its_test_file(name):
    assert (pathlib.Path(__file__).parent / f"test_{pathlib.Path(name).stem}.py").is_file()


def test_the_exceptions_exist():
    assert set(NO_TEST) <= set(TREES)


def test_no_get_with_a_default_and_none_on_a_config():
    wrong = []
    for name, tree in TREES.items():
        for call in calls(tree):
            if not (isinstance(call.func, ast.Attribute) and call.func.attr == "get") or name == "config.py":
                continue
            of_config = isinstance(call.func.value, ast.Name) and call.func.value.id in ("config", "c", "cfg")
            if len(call.args) > 1 or any(keyword.arg == "default" for keyword in call.keywords) or of_config:
                wrong.append(f"{name}:{call.lineno} {ast.unparse(call)}")
    assert not wrong


@pytest.mark.parametrize("name", OURS)  # torch's forward() and the sample's script speak for themselves
def test_public_functions_and_classes_have_docstrings(name):
    def public(body):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                yield node
                if isinstance(node, ast.ClassDef):
                    yield from public(node.body)

    assert not [f"{name}:{node.lineno} {node.name}" for node in public(TREES[name].body)
                if node.name != "main" and not ast.get_docstring(node)]  # fmt: skip


def test_the_letters_of_the_rules_are_the_letters_of_the_legend():
    legend = set(re.findall(r"(?:^|  )([A-Z])  \S", moe_embed.__doc__, flags=re.MULTILINE))
    assert len(legend) > 15
    assert legend == set(sharding.Rules.__dataclass_fields__)
