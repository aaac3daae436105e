"""Fault 24: files that somebody made up are refused in a sentence, in bounded memory, and nothing of them is run."""

import ast
import gzip
import json
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest
from array_record.python import array_record_module

from moe_embed import (
    calibrate,
    checkpoint,
    held_out,
    hf_folder,
    metrics,
    prepare,
    results,
    vector_file,
    worth,
)
from moe_embed.config import UserError
from moe_embed.data import inputs, origin, prepared, sources, tables
from moe_embed.data import tokenizer as tokenizer_lib
from tests.faults import runs
from tests.hf_tiny import BERT, DENSE, MOE, NOMIC, XLM_R, word_pieces, write_folder
from tests.test_fuzz_data import broken
from tests.test_layering import TREES

load = sys.modules["moe_embed.load"]  # the name in the package is its function
pytestmark = pytest.mark.faults
SAMPLE = runs.ROOT / "moe_embed/sample"
TASK = SAMPLE / "tasks/xling-libreoffice-help-de-en"
UNPICKLES = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "imp")
UNPACKS = ("extractall", "extract", "unpack_archive")


def runs_or_unpacks(tree: ast.AST):
    """What of a syntax tree could run what a file holds, or write where an archive says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            yield from (node for name in names if name.split(".")[0] in UNPICKLES)
        if not isinstance(node, ast.Call):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        true = lambda key, named=named: key in named and getattr(named[key], "value", True)  # noqa: E731
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        of = (
            node.func.value.id if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) else ""
        )
        bare = isinstance(node.func, ast.Name) and name in ("eval", "exec", "compile", "__import__")
        shell = true("shell") or (of, name) in (("os", "system"), ("os", "popen"), ("subprocess", "getoutput"))
        loads = (of, name) in (
            ("yaml", "load"),
            ("yaml", "unsafe_load"),
            ("torch", "load"),
            ("np", "load"),
            ("numpy", "load"),
        )
        unpacks = (name in UNPACKS and "filter" not in named) or (name == "extractall" and of == "zipfile")
        if bare or shell or loads or unpacks or true("allow_pickle") or true("trust_remote_code"):
            yield node


def test_nothing_in_the_package_runs_what_it_reads():
    found = [
        f"{name}:{node.lineno} {ast.unparse(node)}" for name, tree in TREES.items() for node in runs_or_unpacks(tree)
    ]
    ours = ("torch_files/check_export.py", "torch_files/to_onnx.py")  # of the folder that was written a moment before
    assert not [line for line in found if not (line.startswith(ours) and "trust_remote_code" in line)]


@pytest.mark.parametrize("line", [
    "import pickle", "from marshal import loads", "def f():\n import joblib.x", "eval(a)", "exec(a)", "np.load(a)",
    "numpy.lib.format.read_array(a, allow_pickle=True)", "g(allow_pickle=b)", "yaml.load(a)", "subprocess.run(a, shell=True)",
    "os.system(a)", "tarfile.open(a).extractall(b)", "t.extract(a)", "shutil.unpack_archive(a)", "torch.load(a)",
])  # fmt: skip
def test_what_could_is_seen(line):
    assert list(runs_or_unpacks(ast.parse(line)))
    assert not list(
        runs_or_unpacks(
            ast.parse("a.load(b)\nnp.lib.format.open_memmap(a)\nt.extractall(b, filter='data')\nimport json")
        )
    )


# --- what expands

BLOCK = b"a" * 2**20
READERS = {
    "pairs.jsonl.gz": ('{"query": "', "sources.read_source(path)"),
    "pairs.csv.gz": ('query,document\n"', "sources.read_source(path)"),
    "pairs.tsv.gz": ("query\tdocument\n", "sources.read_source(path)"),
    "quoted.csv.gz": ('query,document\n"', "sources.read_source(path)"),
    "texts.jsonl.gz": ('{"text": "', "list(sources.read_texts(path))"),
    "stream.jsonl.gz": ('{"text": "', "list(sources.read_texts('standard input', stream=gzip.open(path)))"),
    "corpus.jsonl.gz": ('{"_id": "a", "text": "', "sources.read_corpus(path)"),
    "mined.jsonl.gz": ('{"query": "', "list(pairs.read_rows(path))"),
    "counted.jsonl.gz": ('{"text": "', "list(vocabulary.read_texts(path))"),
}
CHILD = """
import gzip, resource, sys
from moe_embed.config import UserError
from moe_embed.data import pairs, sources, tables, vocabulary
import pyarrow, csv

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def now():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def measured(call, path):
    import os
    child = os.fork()  # its peak is its own
    if child:
        return os.waitpid(child, 0)
    before = now()
    try:
        eval(call)
        said = "nothing"
    except UserError as error:
        said = str(error).replace(chr(10), "|")
    print(peak() - before, tables.LONGEST, said, flush=True)
    os._exit(0)

measured("bytearray(b'a') * (2 * tables.LONGEST + 2**20)", "")
for path, call in zip(sys.argv[1::2], sys.argv[2::2]):
    measured(call, path)
"""


def test_a_line_of_a_gigabyte_in_a_megabyte_takes_no_more_than_a_line_may(tmp_path):
    packed, arguments = gzip.compress(BLOCK, 9), []
    lines_of_it = gzip.compress(BLOCK[:-1] + b"\n", 9)
    for name, (start, call) in READERS.items():
        (tmp_path / name).write_bytes(
            gzip.compress(start.encode()) + (lines_of_it if name.startswith("quoted") else packed) * 1024
        )
        assert (tmp_path / name).stat().st_size < 2**30 / 900
        arguments += [str(tmp_path / name), call]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments],
        env=runs.environ(),
        cwd=runs.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split(" ", 2) for line in done.stdout.splitlines()]
    assert len(lines) == len(READERS) + 1, done.stdout + done.stderr
    assert int(lines[0][0]) > 2 * tables.LONGEST  # what is held is noticed
    for grown, longest, said in lines[1:]:
        assert int(grown) < 2 * int(longest), said
        assert "longer than" in said or "row of more than" in said


# --- JSON that is none of ours

DEEP = b"[" * 100_000, b'{"a":' * 100_000, b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}"
VALUES = (
    b"",
    b"{",
    b"\xff\xfe{}",
    b"[]",
    b"{}",
    b"7",
    b"null",
    b'"a"',
    b"NaN",
    b"[[1]]",
    b"9" * 5000,
    b'{"a": 1e999}',
    *DEEP,
)


def read_metrics(folder):
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'\n{"step": 1}\n')  # else the last line, which may be cut short
    metrics.read(folder / "metrics.jsonl")


def read_checkpoint(folder):
    (folder / "9").mkdir()
    (folder / "m").rename(folder / "9" / checkpoint.MANIFEST)
    checkpoint.newest_verified(folder, say=lambda _: None)


def read_progress(folder):
    vector_file._rows_done(folder / "x", folder / "x.progress.json", {"model": "m"})


JSON = [
    ("workdir.json", load.read_description),
    ("m", read_checkpoint),
    (prepared.MANIFEST, lambda folder: sources.read_sources(str(folder))),
    (origin.NAME, origin.of_folder),
    (held_out.FILE, lambda folder: held_out.conclude(folder, {"a": 0.5}, steps=9, warmup_steps=0)),
    (held_out.FILE, held_out.read),
    ("worth.json", worth.read),
    (calibrate.FILE, calibrate.read),
    ("r.json", lambda folder: results.read(folder / "r.json", "--show")),
    ("config.json", hf_folder.read_folder),
    ("x.progress.json", read_progress),
    ("counts.json", lambda folder: list(inputs.rows(str(folder / "a.jsonl")))),
    ("metrics.jsonl", read_metrics),
]
SAYS_NOTHING = (  # and nothing has to be said there
    (origin.NAME, b"{}"), ("counts.json", b"{}"), ("counts.json", DEEP[2]), ("counts.json", b'{"a": 1e999}'),
)  # fmt: skip


@pytest.mark.parametrize(("name", "read"), JSON)
def test_json_that_is_none_of_ours_is_a_sentence(tmp_path, name, read):
    for i, data in enumerate((*VALUES, b'{"a.jsonl": 1e999}')):
        folder = tmp_path / str(i)
        folder.mkdir()
        (folder / "a.jsonl").write_text('{"query": "q", "document": "d"}\n')
        (folder / name).write_bytes(data)
        if (name, data) in SAYS_NOTHING:
            read(folder)
            continue
        with pytest.raises(UserError) as fault:
            read(folder)
        assert "\n" not in str(fault.value).strip(), (data[:20], fault.value)


def mutations(value, rng):
    """A copy of a JSON value in which one node, anywhere, is another."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        if isinstance(copy, dict) and rng.random() < 0.1:
            del copy[key]
        else:
            copy[key] = mutations(copy[key], rng)
        return copy
    return rng.choice(
        (None, 0, -1, 7, 10**9, 10**30, 0.5, float("inf"), float("nan"), "x", "", [], {}, [None], {"a": None}, True)
    )


def test_a_description_that_was_changed_is_a_sentence_or_a_model(tmp_path):
    write_folder(tmp_path / "f", NOMIC, MOE)
    load.save(load.load(tmp_path / "f"), tmp_path / "m", made_by="a test")
    path = tmp_path / "m" / "workdir.json"
    good, outcomes, begun = json.loads(path.read_text()), {"read": 0, "refused": 0}, time.monotonic()
    for seed in range(100):
        path.write_text(json.dumps(mutations(good, random.Random(seed))))
        try:
            load.load(tmp_path / "m")
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 40, outcomes
    assert time.monotonic() - begun < 60


# --- made up with the right digest


def manifest(root, **changes):
    """A prepared data set of one shard whose manifest says `changes`."""
    root.mkdir()
    (root.parent / "p.jsonl").write_text('{"query": "q", "document": "d"}\n')
    prepare.main([f"--input={root.parent / 'p.jsonl'}", f"--output={root}", "--processes=1"])
    whole = json.loads((root / prepared.MANIFEST).read_text())
    whole.pop("digest")
    for key, value in changes.items():
        if key in ("shards", "sources", "card"):
            whole[key] = value
        else:
            whole["shards"][0][key] = value
    prepared.write_manifest(root, whole)
    return root


@pytest.mark.parametrize("changes", [
    {"file": "../p.jsonl"}, {"file": "/etc/hostname"}, {"file": ".."}, {"file": 7}, {"file": "a/b"}, {"records": -1}, {"records": 2},
    {"records": 10**30}, {"records": "1"}, {"bytes": None}, {"sha256": 7}, {"shards": []}, {"shards": {}}, {"shards": 7}, {"shards": [[]]},
    {"sources": []}, {"sources": [{"name": "a", "languages": [["de", -1]]}]}, {"sources": [{"name": 7, "languages": []}]},
    {"sources": [{"name": "a", "languages": 7}]}, {"sources": [{"name": "a", "languages": [["de", 10**18]]}]}, {"card": 7},
], ids=str)  # fmt: skip
def test_a_manifest_that_was_made_up(tmp_path, changes):
    root = manifest(tmp_path / "out", **changes)
    with pytest.raises(UserError, match="no manifest that prepare wrote"):
        sources.read_sources(str(root))


def test_a_card_that_was_made_up(tmp_path):
    root = manifest(tmp_path / "out", card={"inputs": 7})
    with pytest.raises(UserError, match="no card that prepare wrote"):
        prepare.main([f"--describe={root}"])


@pytest.mark.parametrize("record", [b"", b"\xff" * 20, b"\x0a\x02ab", b"a query"], ids=str)
def test_records_that_are_no_pairs(tmp_path, record):
    root = manifest(tmp_path / "out")
    whole = prepared.read_manifest(root)
    shard = root / whole["shards"][0]["file"]
    writer = array_record_module.ArrayRecordWriter(str(shard), prepared.WRITER)
    writer.write(record)
    writer.close()
    whole["shards"][0]["bytes"] = shard.stat().st_size
    prepared.write_manifest(root, whole)
    with pytest.raises(UserError, match=r"record 0 is no pair that prepare wrote|is damaged"):
        list(sources.read_sources(str(root))[0].pairs)


@pytest.mark.parametrize("changes", [
    {"files": {"../../secret": "0" * 32}}, {"files": {"/etc/hostname": "0" * 32}}, {"files": 7}, {"files": ["a"]}, {"files": {"a": 7}},
    {"facts": []}, {"arrays": {"a": 7}}, {"arrays": []}, {"schema": "1"}, {"step": "9"}, {"step": 8},
], ids=str)  # fmt: skip
def test_a_checkpoint_that_was_made_up_does_not_verify(tmp_path, changes):
    (tmp_path / "secret").write_text("s")
    step = tmp_path / "checkpoints" / "9"
    step.mkdir(parents=True)
    good = {"schema": 1, "step": 9, "facts": {}, "arrays": {}, "files": {}}
    for value, verifies in ((good, True), (good | changes, False)):
        (step / checkpoint.MANIFEST).write_text(json.dumps(value | {"digest": checkpoint._digest_of(value)}))
        assert (checkpoint.problem(step.parent, 9) == "") is verifies


# --- folders in Hugging Face layout


@pytest.mark.parametrize("kind", ["nomic", "bert", "xlm-roberta", "moe_embed"])
def test_absurd_sizes_are_refused_before_anything_is_allocated(tmp_path, kind):
    encoder, moe = {
        "nomic": (NOMIC, MOE),
        "bert": (BERT, DENSE),
        "xlm-roberta": (XLM_R, DENSE),
        "moe_embed": (XLM_R, MOE),
    }[kind]
    write_folder(tmp_path / "f", encoder, moe)
    path = tmp_path / "f" / "config.json"
    good = json.loads(path.read_text())
    begun, read, longest = time.monotonic(), 0, 0
    for key in [key for key, value in good.items() if isinstance(value, int | float)]:
        for value in (
            10**9,
            2**31 - 1,
            10**30,
            10**400,
            -1,
            0,
            0.5,
            float("nan"),
            float("inf"),
            "8",
            None,
            [],
            {},
            True,
        ):
            path.write_text(json.dumps(good | {key: value}))
            try:
                hf_folder.read_folder(tmp_path / "f")
                read += 1
            except UserError as error:
                longest = max(longest, *map(len, error.args), 0)
    assert longest < 600
    assert read > 20  # what changes no number is not looked at
    assert time.monotonic() - begun < 60


def test_a_path_out_of_the_folder_is_not_followed(tmp_path):
    write_folder(tmp_path / "f", BERT, DENSE)
    (tmp_path / "config.json").write_text('{"pooling_mode": "mean"}')
    for place in ("..", "/", str(tmp_path), "1_Pooling/../.."):
        kinds = (("Transformer", ""), ("Pooling", place))
        (tmp_path / "f" / "modules.json").write_text(
            json.dumps([{"type": f"a.{kind}", "path": path} for kind, path in kinds])
        )
        with pytest.raises(UserError, match="which is not in"):
            hf_folder.read_folder(tmp_path / "f")


def tensors(header, data=bytes(16), *, size=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def one(dtype="F32", shape=(2, 2), offsets=(0, 16)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


MADE_UP = {
    "header of 2**63": tensors(b"{}", size=2**63), "header of 1 GB": tensors(b"{}", size=2**30), "header of 0": tensors(b"", size=0),
    "header longer than the file": tensors(b"{}", b"", size=3), "no JSON": tensors(b"{a}"), "a list": tensors([]), "deep": tensors(b"[" * 100_000),
    "not UTF-8": tensors(b'{"\xff": 1}'), "overlap": tensors({"a": one(), "b": one()}), "half an overlap": tensors({"a": one(), "b": one(offsets=(8, 24))}, bytes(24)),
    "a hole": tensors({"a": one(), "b": one(offsets=(20, 36))}, bytes(36)), "trailing bytes": tensors({"a": one()}, bytes(17)),
    "cut short": tensors({"a": one()}, bytes(15)), "shape larger than data": tensors({"a": one(shape=(2, 3))}),
    "shape smaller than data": tensors({"a": one(shape=(1,))}), "shape that overflows": tensors({"a": one(shape=(2**62, 2**62))}),
    "a negative shape": tensors({"a": one(shape=(-2, -2))}), "another dtype": tensors({"a": one(dtype="F64")}), "no dtype": tensors({"a": one(dtype="O")}),
    "offsets backwards": tensors({"a": one(offsets=(16, 0))}), "negative offsets": tensors({"a": one(offsets=(-16, 0))}),
    "fractions": tensors({"a": one(offsets=(0.0, 16.0))}), "three offsets": tensors({"a": one(offsets=(0, 16, 16))}),
    "no entry": tensors({"a": 7}), "metadata of numbers": tensors({"__metadata__": {"a": 1}, "a": one()}), "no tensors, but data": tensors({}),
}  # fmt: skip


@pytest.mark.parametrize("kind", MADE_UP)
def test_tensors_that_were_made_up(tmp_path, kind):
    path = tmp_path / "model.safetensors"
    path.write_bytes(tensors({"a": one()}))
    assert hf_folder.read_safetensors(path)["a"].shape == (2, 2)
    path.write_bytes(MADE_UP[kind])
    with pytest.raises(UserError, match=r"model\.safetensors") as fault:
        hf_folder.read_safetensors(path)
    assert "\n" not in str(fault.value)


# --- tokenizers, tasks, vectors

TOKENIZERS = """
import pathlib, random, sys
from moe_embed.config import UserError
from moe_embed.data import tokenizer
path, count, read, refused = pathlib.Path(sys.argv[1]), int(sys.argv[2]), 0, 0
good = path.read_bytes()
for seed in range(count):
    rng = random.Random(seed)
    place = rng.randrange(len(good))
    cut = seed % 2 == 0
    path.write_bytes(good[:place] if cut else good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1:])
    try:
        one = tokenizer.read(path)
    except UserError as error:
        refused += 1
        continue
    assert not cut, place
    read += 1
    ids, _ = one.encode(["ab \\u00e9 1", "\\u202e"], max_length=9)
    assert all(0 <= i < one.num_ids for some in ids for i in some)
print(read, refused)
"""


@pytest.mark.parametrize("name", ["t.model", "t.json"])
def test_no_cut_tokenizer_is_read_and_a_flipped_bit_ends_nothing(tmp_path, name):
    (tmp_path / name).write_bytes((SAMPLE / "tokenizer.model").read_bytes() if name == "t.model" else word_pieces())
    command = [sys.executable, "-c", TOKENIZERS, str(tmp_path / name), "40"]
    done = subprocess.run(command, env=runs.environ(), cwd=runs.ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused = map(int, done.stdout.split()[-2:])
    assert refused >= 20
    assert read + refused == 40


def test_a_huge_tokenizer_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_lib, "MOST", 1000)
    for name in ("t.model", "t.json"):
        (tmp_path / name).write_bytes(bytes(1001))
        with pytest.raises(UserError, match=f"{name} cannot be read: it is larger than 1,000 bytes"):
            tokenizer_lib.read(tmp_path / name)


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_broken_task_is_a_sentence_or_a_task(tmp_path, on_disk):
    names = ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
    lines = {name: (TASK / name).read_bytes().splitlines(keepends=True)[:12] for name in names}
    (tmp_path / "qrels").mkdir()
    outcomes = {"read": 0, "refused": 0}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        for i, name in enumerate(names):
            good = b"".join(lines[name])
            (tmp_path / name).write_bytes(broken(good, rng) if seed % 3 == i else good)
        try:
            task = sources.read_task(str(tmp_path), on_disk=on_disk)
            list(task.corpus.values())
            outcomes["read"] += 1
        except UserError as error:
            outcomes["refused"] += str(tmp_path) in str(error)
    assert outcomes["refused"] > 20, outcomes
    assert sum(outcomes.values()) == 60  # each with its place


def test_pickled_vectors_are_refused_everywhere(tmp_path):
    class Evil:
        def __reduce__(self):
            return (pathlib.Path.touch, (tmp_path / "ran",))

    evil = np.array([Evil()], object)
    (tmp_path / "a.jsonl").write_text('{"query": "q", "document": "d"}\n')
    for side in sources.SIDES:
        np.save(tmp_path / f"a.jsonl.big.{side}.npy", evil, allow_pickle=True)
    with pytest.raises(UserError, match=r"query\.npy cannot be read"):
        sources.read_source(str(tmp_path / "a.jsonl"), teacher="big")
    assert not (tmp_path / "ran").exists()
    np.load(tmp_path / "a.jsonl.big.query.npy", allow_pickle=True)
    assert (tmp_path / "ran").exists()  # so it would have been


# --- the verbs


def test_the_verbs_end_in_sentences_and_write_nothing_elsewhere(tmp_path):
    there, target = tmp_path / "there", tmp_path / "target"
    for folder in (there, target, there / "model", there / "task" / "qrels"):
        folder.mkdir(parents=True)
    root = manifest(there / "prepared", file="../p.jsonl")
    (there / "deep.json").write_bytes(DEEP[0])
    (there / "model" / "config.json").write_bytes(DEEP[1])
    (there / "workdir").mkdir()
    (there / "workdir" / "workdir.json").write_bytes(DEEP[0])
    (there / "texts.jsonl").write_bytes(b'{"text": "a"}\n' + DEEP[0] + b"\n")
    (there / "t.model").write_bytes(b"garbage")
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        (there / "task" / name).write_bytes(b"\x80\x04K\x01.")
    before = {path: path.stat().st_mtime_ns for path in there.rglob("*")}
    texts, deep = there / "texts.jsonl", there / "deep.json"
    commands = [
        ["embed", f"--model={there / 'model'}", f"--input={texts}", f"--output={target / 'a.npy'}"],
        ["embed", f"--model={there / 'workdir'}", f"--search={texts}"],
        ["evaluate", f"--show={deep}"],
        ["evaluate", f"--compare={deep},{deep}"],
        ["evaluate", f"--model={there / 'model'}", f"--task={there / 'task'}", f"--output={target / 'r.json'}"],
        ["export", f"--model={there / 'workdir'}", f"--output={target / 'e'}"],
        ["import_hf", f"--model={there / 'model'}", f"--output={target / 'i'}"],
        ["prepare", f"--describe={root}"],
        ["prepare", f"--input={texts}", f"--output={target / 'p'}", "--processes=1"],
        ["mine", f"--model={there / 'workdir'}", f"--pairs={texts}", f"--output={target / 'm.jsonl'}"],
        ["train", "--config=configs/demo.py:tiny", f"--config.data.sources={root}", f"--workdir={target / 'w'}"],
        [
            "train",
            "--config=configs/demo.py:tiny",
            f"--config.data.tokenizer={there / 't.model'}",
            f"--workdir={target / 'v'}",
        ],
    ]
    runs.all_refused(commands)
    assert {path: path.stat().st_mtime_ns for path in there.rglob("*")} == before
    assert not [
        path for path in target.rglob("*") if path.is_file() and path.suffix in (".npy", ".jsonl", ".safetensors")
    ]
