"""README.md does not drift: each of its commands is in the table below, exists with its flags and files, and runs in a tiny form.

What a command says is checked in every run; the commands are executed in the README's order by `-m readme` (minutes). A command
that the table lacks is a failure: add a row, TINY if it can be run here, else CHECKED with the reason.
"""

import contextlib
import dataclasses
import functools
import gzip
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

import moe_embed
from moe_embed import config as config_lib
from moe_embed.data.sources import read_corpus
from tests import hf_tiny

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PACKAGE = pathlib.Path(moe_embed.__file__).parent
FIRST_WORDS = ("python", "bash", "source", "sbatch", "pip", "import", "from")
PICTURES = ("pairs (", "import_hf -> ", "moe_embed/")  # how the blocks begin that are no commands
SMALL = "--config.data.batch_size=16 --config.data.rows=24"
PAIRS = "moe_embed/sample/pairs/monolingual.jsonl.gz"
HAS_SENTENCE_TRANSFORMERS = importlib.util.find_spec("sentence_transformers") is not None
SECONDS = 300  # for one command, on a machine that does other things too

# A command, or a block of Python, as the README has it but for comments -> how it is run: what is replaced in it and put after it.
TINY: dict[str, tuple[dict[str, str], str]] = {
    "python -m moe_embed.prepare --input='pairs/*.jsonl.gz' --output=DIR": ({}, ""),
    "python -m moe_embed.prepare --input=mine.csv --query=title --document=body --decontaminate=my_beir_folder --output=DIR2": ({}, ""),
    "python -m moe_embed.prepare --describe=DIR": ({}, ""),
    "python -m moe_embed.train --config=configs/demo.py:tiny --config.data.sources=DIR --workdir=W": (
        {"=W": "=runs/prepared"}, f"--config.run.steps=2 {SMALL}"),
    "python -m moe_embed.train --config=configs/finetune_pairs.py --config.data.sources=pairs.csv --init_from=MODEL --workdir=W": (
        {}, "--config.run.steps=2"),
    "python -m moe_embed.export --model=W --output=H": ({}, ""),
    "python -m moe_embed.evaluate --model=H --task=my_beir_folder --output=r.json --dims=64,32 --precisions=int8,binary": (
        {"64,32": "16,8"}, ""),
    "python -m moe_embed.evaluate --compare=r.json,base.json": ({}, ""),
    "python -m moe_embed.evaluate --model=W --task=A,B --output=steps.jsonl --watch": ({}, ""),
    "python -m moe_embed.train --config=configs/demo.py --workdir=runs/mine --config.data.sources=my_pairs.jsonl --config.run.steps=300": (
        {"demo.py": "demo.py:tiny", "steps=300": "steps=2"}, SMALL),
    "python -m moe_embed.evaluate --model=runs/mine --task=my_beir_folder --output=mine.json --baseline=bm25": ({}, ""),
    "python -m moe_embed.evaluate --model=MODEL --task=my_beir_folder --output=base.json": ({}, ""),
    "python -m moe_embed.embed --model=runs/mine --search=my_beir_folder/corpus.jsonl": ({}, ""),
    "python -m moe_embed.export --model=runs/mine --output=my_model": ({}, ""),
    "python -m moe_embed.embed --model=runs/mine --input=texts.jsonl.gz --output=E.npy --task=document": ({}, ""),
    """import moe_embed
model = moe_embed.load("runs/mine")
model.encode(["Wie drucke ich?"], task="query", dim=64)""": ({"dim=64": "dim=16"}, ""),
    "python -m moe_embed.export --model=runs/mine --output=my_model --onnx --gguf --calibrate=workdir --license=apache-2.0": (
        {"--onnx --gguf ": ""}, ""),  # these two: tests/deploy
    "python -m moe_embed.report --workdir=runs/mine --output=report.html": ({}, ""),
    "python -m moe_embed.import_hf --model=multilingual-e5-small --output=runs/e5": ({}, ""),
    "python -m moe_embed.upcycle --model=runs/e5 --output=runs/e5-moe": ({}, ""),
    "python -m moe_embed.mine --model=runs/e5 --pairs=pairs.jsonl --output=mined.jsonl": ({}, ""),
    "python -m moe_embed.train --config=configs/nomic_v2/finetune.py:ours --init_from=runs/e5-moe --workdir=runs/finetuned "
    "--config.data.sources=mined.jsonl --config.loss.dims=384,128": (
        {"384,128": "16,8"},
        "--config.data.query_length=32 --config.data.document_length=32 --config.data.row_length=64 --config.data.rows=32 "
        "--config.data.batch_size=8 --config.data.num_negatives=2 --config.data.by_language=false --config.run.steps=2"),
    "python -m moe_embed.export --model=runs/finetuned --output=finetuned": ({}, ""),
    "python -m moe_embed.worth --config=configs/finetune_pairs.py --config.data.sources=pairs.csv --init_from=DENSE --workdir=W": (
        {"=W": "=runs/worth"}, "--config.run.steps=2"),
}  # fmt: skip
NEEDS_SENTENCE_TRANSFORMERS = {
    """from sentence_transformers import SentenceTransformer
SentenceTransformer("my_model", trust_remote_code=True).encode(["search_query: Wie drucke ich?"])""": ({}, "")
}
CHECKED = {
    "bash launch/demo.sh": "the whole demo; .ci runs the tests of its parts",
    "bash launch/test.sh": "runs this test",
    "bash launch/nomic_v2.sh --tiny": "minutes; makes a .venv",
    "python -m moe_embed.plan --config=configs/nomic_v2/pretrain.py:paper --topology=v5e-8 --output=plan.json": "minutes: tests/aot",
    "bash launch/local_cluster.sh 2 -m moe_embed.train --config=configs/demo.py:tiny --workdir=runs/two": "tests/test_cluster.py",
    "bash launch/tpu_pod.sh --name=t --zone=Z --type=v5e-64 --spot -- -m moe_embed.train --config=F.py --workdir=W": "tests/test_tpu_pod.py",
    "bash launch/gpu_host.sh -- -m moe_embed.train --config=F.py --workdir=W": "wants GPUs: tests/test_launch.py",
    "sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 launch/slurm.sbatch -m moe_embed.train --config=F.py --workdir=W": "wants Slurm",
    "bash launch/supervise.sh COMMAND ...": "tests/test_launch.py",
    "bash launch/gpu_check.sh": "wants a GPU: tests/test_gpu_check.py",
    "python -m moe_embed.train ... --profile=5": "says one flag: tests/test_train.py",
    "source .venv/bin/activate": "venv's own, after launch/test.sh",
    "python -m moe_embed.evaluate --model=W --task=mteb:NanoBEIR,mteb:MIRACLRetrieval/de --output=r.json --mteb_results=DIR": "downloads",
    "bash launch/paper_table.sh W": "downloads: tests/test_paper_table.py",
    "python -m moe_embed.serve --model=my_model --port=8080": "does not end: tests/test_serve.py",
    """import mteb
mteb.evaluate(moe_embed.mteb_model("runs/mine", embed_dim=256), mteb.get_tasks(tasks=["NanoSciFactRetrieval"]))""": "downloads",
}
PROMISED = {  # figures of a table, and a folder, that come from elsewhere
    "configs/demo.py:dense", "F.py",
}  # fmt: skip


def blocks(text: str) -> list[list[str]]:
    """Indented blocks: lines without the indentation."""
    found, last_blank = [], True
    for line in text.splitlines():
        if line.startswith("    ") and line.strip():
            found[-1].append(line[4:].rstrip()) if not last_blank else found.append([line[4:].rstrip()])
            last_blank = False
        else:
            last_blank = True
    return found


def commands(text: str) -> list[str]:
    """Each command of the blocks, without its comment, on one line; a block of Python is one command."""
    found = []
    for lines in blocks(text):
        if lines[0].strip().startswith(PICTURES):
            continue
        lines = [re.sub(r"\s+#\s.*", "", line) for line in lines]
        if lines[0].startswith(("import ", "from ")):
            found.append("\n".join(lines))
        else:
            found += re.sub(r" \\\n\s*", " ", "\n".join(lines)).splitlines()
    return found


def in_sentences(text: str) -> list[str]:
    """Commands between backticks, without the words that set a variable."""
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^    .*$", "", text, flags=re.MULTILINE))
    spans = [re.sub(r"^([A-Z_]+=\S+ )+", "", span) for span in spans]
    return [span for span in spans if span.startswith(("python -m ", "bash "))]


def test_what_reads_the_readme_reads_it():
    text = "A `python -m x --y` and `X=1 bash z`, `word`.\n\n    bash a  # why\n    python b \\\n        --c\n\n    import d\n    d.e()   # f\n\n    pairs (x)\n"
    assert commands(text) == ["bash a", "python b --c", "import d\nd.e()"]
    assert in_sentences(text) == ["python -m x --y", "bash z"]


def test_the_table_has_each_command_and_no_other():
    table = [*TINY, *NEEDS_SENTENCE_TRANSFORMERS, *CHECKED]
    assert len(set(table)) == len(table)
    absent = [command for command in commands(README) if command not in table]
    assert not absent, "README.md's commands that this file's tables lack (see its docstring)"
    assert not set(table) - set(commands(README)), "rows of this file's tables that README.md no longer has"
    assert all(command.startswith(FIRST_WORDS) for command in table)


@functools.cache
def help_of(verb: str) -> str:
    """What `python -m <verb> --help` says; a program without a parser is read instead."""
    if verb.startswith("tests."):
        return (ROOT / f"{verb.replace('.', '/')}.py").read_text("utf-8")
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        importlib.import_module(verb).main(["--help"])
    assert said.getvalue(), verb
    return said.getvalue()


def faults(command: str) -> list[str]:
    """What of a shell command does not exist: files of this repository, verbs, flags, fields of a config."""
    words, found, text, program = shlex.split(command), [], "", ""
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        if word == "-m" and words[i + 1].startswith(("moe_embed.", "tests.")):
            program = words[i + 1]
            text = help_of(program) if (ROOT / f"{program.replace('.', '/')}.py").is_file() else ""
            found += [] if text else [f"no module {program}"]
        elif re.match(r"(launch|configs|tests|moe_embed)/", word):
            found += [] if (ROOT / word).exists() else [f"no {word}"]
            text = (ROOT / word).read_text("utf-8") if (ROOT / word).is_file() else text
            program = program or word
        elif word == "sbatch":
            program, text = word, (ROOT / "tests/launch_help/sbatch.txt").read_text("utf-8")
        elif flag.startswith("--config."):
            section, _, key = flag.removeprefix("--config.").partition(".")
            fields = (
                {field.name for field in dataclasses.fields(config_lib.SECTIONS[section])}
                if section in config_lib.SECTIONS
                else ()
            )
            found += [] if key in fields else [f"no field {flag}"]
        elif flag == "--config" and value not in PROMISED:
            path, _, variant = value.partition(":")
            get = (ROOT / path).read_text("utf-8") if (ROOT / path).is_file() else ""
            found += [] if get and variant in get else [f"no {value}"]
        elif re.match(r"--[a-z]", flag):
            found += [] if re.search(rf"{flag}(?![\w-])", text) else [f"{program} has no {flag}"]
    return found


@pytest.mark.parametrize("command", [c for c in commands(README) if not c.startswith(("import ", "from "))])
def test_a_command_is_of_things_that_exist(command):
    assert not faults(command)


@pytest.mark.parametrize("command", sorted(set(in_sentences(README))))
def test_a_command_in_a_sentence_is_of_things_that_exist(command):
    assert not [
        fault for fault in faults(command) if "launch/test.sh has no" not in fault
    ]  # its arguments are pytest's


def test_what_does_not_exist_is_found():
    assert faults("python -m moe_embed.trian --config=configs/demo.py") == ["no module moe_embed.trian"]
    assert faults("python -m moe_embed.train --work_dir=W") == ["moe_embed.train has no --work_dir"]
    assert faults("python -m moe_embed.train --work=W") == ["moe_embed.train has no --work"]
    assert faults("python -m moe_embed.train --config=configs/demo.py:huge") == ["no configs/demo.py:huge"]
    assert faults("python -m moe_embed.train --config.run.step=1") == ["no field --config.run.step"]
    assert faults("bash launch/no.sh") == ["no launch/no.sh"]


@pytest.mark.parametrize(
    "script", sorted({word for c in commands(README) for word in c.split() if word.startswith("launch/")})
)
def test_a_script_is_bash(script):
    assert not subprocess.run(["bash", "-n", script], cwd=ROOT, capture_output=True, text=True, check=False).stderr


def tour() -> str:
    return README.split("## A tour of the files")[1].split("## Tests")[0]


def test_the_tour_names_every_module_and_no_other():
    """A module is NAME.py or in the line of verbs; of data/ and model/ a word of that folder's entry."""
    text = tour().split("    configs/ ")[0]
    verbs = re.search(r"^      (train [a-z_0-9 ]+)\(\.py each\)", text, flags=re.MULTILINE)[1].split()
    named = {name for name in re.findall(r"(\w+)\.py", text)} | set(verbs)
    there = {
        folder: {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__"}
        for folder in ("", "data", "model")
    }
    assert not " ".join(sorted(there[""] - named)), "modules that the tour does not name"
    assert not " ".join(sorted(named - there[""])), "names in the tour that are no module"
    for folder in ("data", "model"):
        entry = re.search(rf"^      {folder}/ .*\n(?:        .*\n)*", text, flags=re.MULTILINE)[0]
        assert not " ".join(sorted(there[folder] - set(re.findall(r"\w+", entry)))), (
            f"modules of {folder}/ that the tour does not name"
        )


def test_the_rest_of_the_tour_is_there():
    rest = tour().split("moe_embed/\n")[1]
    rest = rest[rest.index("    configs/ ") :].split("\n\n")[0]
    scripts = {path.name for path in (ROOT / "launch").iterdir()}
    assert not " ".join(sorted(name for name in scripts if name not in rest)), "scripts that the tour does not name"
    folder, absent = "", []
    for line in rest.splitlines():
        entry = re.match(r"    (\w+/)", line)
        folder = entry[1] if entry else folder
        names = re.findall(
            r"\b\w+\.(?:py|sh|sbatch|ipynb)\b|\b\w+/\w+\.py\b|(?<= )\w+/(?= )",
            line.replace("`", "").removeprefix(f"    {folder}"),
        )
        absent += [f"{folder}{name}" for name in names if not list((ROOT / folder).rglob(name.rstrip("/")))]
    assert not absent


def test_files_named_in_sentences_exist():
    named = set(re.findall(r"`((?:tests|configs|launch|moe_embed|colab)/[\w./-]+)`", README))
    assert named
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> pathlib.Path:
    """A folder with all that the README's commands take for given."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "launch", "moe_embed"):
        (folder / name).symlink_to(ROOT / name)
    with gzip.open(ROOT / PAIRS, "rt", encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["lang"] == "en"][:150]
    as_jsonl = lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)  # noqa: E731
    plain = [{"query": row["query"], "document": row["document"]} for row in rows]
    for name in ("my_pairs.jsonl", "pairs.jsonl"):
        (folder / name).write_text(as_jsonl(plain), "utf-8")
    for name, columns in (("pairs.csv", "query,document"), ("mine.csv", "title,body")):
        lines = [columns] + ['"' + '","'.join(text.replace('"', '""') for text in row.values()) + '"' for row in plain]
        (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "pairs").mkdir()
    with gzip.open(folder / "pairs" / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(as_jsonl(rows))
    task = ROOT / "moe_embed/sample/tasks/libreoffice-help-ja"
    for name in ("my_beir_folder", "A", "B"):
        shutil.copytree(task, folder / name)
    texts = list(read_corpus(str(task / "corpus.jsonl")).values())[:20]
    with gzip.open(folder / "texts.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(as_jsonl([{"text": text} for text in texts]))
    small = dataclasses.replace(hf_tiny.XLM_R, num_layers=2, dim=16, ffn_dim=32, num_positions=66, max_seq_length=64)
    hf_tiny.write_folder(folder / "multilingual-e5-small", small, hf_tiny.DENSE)
    tiny = f"python -m moe_embed.train --config=configs/demo.py:tiny --config.run.steps=2 {SMALL} --config.data.sources=my_pairs.jsonl"
    execute(folder, f"{tiny} --workdir=MODEL")
    execute(folder, f"{tiny} --workdir=DENSE --config.moe.num_experts=0")
    return folder


def execute(folder: pathlib.Path, command: str) -> str:
    """What a shell command, or Python, printed; it must end with 0."""
    environ = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "HF_HUB_OFFLINE": "1"}
    run = ["bash", "-c", command] if command.startswith("python ") else [sys.executable, "-c", command]
    given = {"cwd": folder, "env": environ, "capture_output": True, "text": True, "input": "Wie drucke ich?\n\n"}
    done = subprocess.run(run, timeout=SECONDS, check=False, **given)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


LEAVES = {  # what a reader finds after a command, beside its exit status
    "--output=DIR": "DIR/dataset_info.json", "--workdir=W": "W/workdir.json", "--output=H": "H/model.safetensors",
    "--output=r.json": "r.json", "--output=steps.jsonl": "steps.jsonl", "--output=my_model": "my_model/config.json",
    "--output=E.npy": "E.npy", "--output=report.html": "report.html", "--output=mined.jsonl": "mined.jsonl", "--output=runs/e5-moe": "runs/e5-moe/workdir.json",
}  # fmt: skip


@pytest.mark.readme
@pytest.mark.parametrize("number", range(len(TINY) + HAS_SENTENCE_TRANSFORMERS * len(NEEDS_SENTENCE_TRANSFORMERS)))
def test_the_commands_run_in_the_readmes_order(number, world):
    table = TINY | (NEEDS_SENTENCE_TRANSFORMERS if HAS_SENTENCE_TRANSFORMERS else {})
    command = [command for command in dict.fromkeys(commands(README)) if command in table][number]
    replaced, added = table[command]
    run = command
    for old, new in replaced.items():
        assert old in run, f"{old} is not in {command}"
        run = run.replace(old, new)
    execute(world, f"{run} {added}".strip())
    for flag, path in LEAVES.items():
        if f"{flag} " in f"{run} ":
            assert (world / path).exists(), (command, path)


@pytest.mark.readme
def test_a_command_that_fails_is_noticed(world):
    with pytest.raises(AssertionError, match="no_such_model"):
        execute(world, "python -m moe_embed.export --model=no_such_model --output=x")
