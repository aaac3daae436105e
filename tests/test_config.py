"""The door: every fault of a config is one sentence with its key and what would work, and all come at once."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from moe_embed import config as config_lib
from moe_embed.config import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
TINY = f"{ROOT / 'configs' / 'demo.py'}:tiny"


def tree(**changes) -> dict:
    """The tiny demo as a nested dict; `run__steps=3` sets config.run.steps."""
    nested = config_lib.to_dict(config_lib.load(TINY))
    for name, value in changes.items():
        section, key = name.split("__")
        nested[section][key] = value
    return nested


def faults(nested: dict) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        config_lib.from_dict(nested)
    return caught.value.args


def overridden(*overrides: str) -> config_lib.Config:
    return config_lib.load(TINY, [f"--config.{override}" for override in overrides])


@pytest.mark.parametrize("variant", ["", ":tiny"])
def test_round_trip_through_json(variant):
    config = config_lib.load(TINY.removesuffix(":tiny") + variant)
    again = config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(config))))
    assert again == config
    assert hash(again) == hash(config)  # program.build caches by it
    other = config_lib.to_dict(config)
    other["run"]["seed"] += 1
    assert config_lib.from_dict(other) != config


PRESETS = {  # arXiv 2502.07972, Table 2 and section 4, and the public code's yaml files: what must not drift
    "mlm:paper": {"run.steps": 10_000, "data.batch_size": 4096, "data.row_length": 2048, "optim.learning_rate": 4e-4,
                  "optim.warmup_steps": 500, "optim.clip_norm": 1.0, "loss.mask_fraction": 0.3, "data.smoothing": 0.3},
    "mlm:contrastors": {"run.steps": 25_000, "optim.warmup_steps": 1000, "optim.clip_norm": float("inf"),
                        "encoder.rotary_base": 1e5},
    "mlm:ours": {"run.steps": 10_000, "loss.objective": "mlm", "moe.num_experts": 0},
    "pretrain:paper": {"data.batch_size": 16_384, "optim.learning_rate": 8e-5, "optim.schedule": "cosine",
                       "loss.temperature": 0.02, "loss.bidirectional": False, "loss.mask_duplicates": False,
                       "loss.balance_coefficient": 0.125, "data.query_length": 32, "data.document_length": 256,
                       "moe.num_experts": 8, "moe.top_k": 2, "moe.every": 2, "encoder.vocab_size": 250_048},
    "pretrain:contrastors": {"optim.schedule": "inverse_sqrt", "run.steps": 195_312, "loss.bidirectional": False},
    "pretrain:ours": {"loss.bidirectional": True, "loss.mask_duplicates": True, "loss.balance_coefficient": 0.01},
    "finetune:paper": {"data.batch_size": 256, "data.num_negatives": 10, "optim.learning_rate": 2e-5, "loss.dims": (768, 256),
                       "data.query_length": 512, "data.document_length": 512, "loss.bidirectional": False},
    "finetune:contrastors": {"loss.dims": (), "data.query_length": 32, "data.document_length": 256},
    "finetune:ours": {"loss.bidirectional": True, "loss.false_negative_margin": 0.1, "loss.mask_duplicates": True},
}  # fmt: skip


@pytest.mark.parametrize("name", [*PRESETS, "mlm:tiny", "pretrain:tiny", "finetune:tiny"])
def test_presets_say_what_the_paper_and_the_public_code_say(name):
    stage, variant = name.split(":")
    config = config_lib.load(f"{ROOT / 'configs' / 'nomic_v2' / stage}.py:{variant}", ["--config.data.sources=a.jsonl"])
    expected = PRESETS[name] if name in PRESETS else {"encoder.dim": 128}
    assert {key: getattr(getattr(config, key.split(".")[0]), key.split(".")[1]) for key in expected} == expected


def test_a_config_is_frozen():
    config = config_lib.load(TINY)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.steps = 3


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("optim__learning_rate", "fast", "a number"),
        ("optim__learning_rate", True, "a number"),
        ("optim__learning_rate", None, "a number"),
        ("run__steps", 1.5, "an integer"),
        ("run__steps", 20.0, "an integer"),
        ("run__steps", True, "an integer"),
        ("loss__bidirectional", 1, "true or false"),
        ("loss__bidirectional", "yes", "true or false"),
        ("encoder__dtype", 32, "a string"),
        ("encoder__dtype", "float16", "one of float32, bfloat16"),
        ("optim__schedule", "cosin", "one of cosine, linear, inverse_sqrt, constant"),
        ("data__sources", "a.jsonl", "a list of"),
        ("data__sources", (1,), "a list of"),
        ("data__weights", ("x",), "a list of"),
        ("data__weights", (True,), "a list of"),
        ("encoder__position", "rotatory", "one of rotary, learned"),
        ("loss__objective", "clm", "one of contrastive, mlm"),
        ("loss__distill", "logits", "one of '', scores, embeddings"),
        ("loss__dims", 32, "a list of integers"),
        ("loss__dims", (1.5,), "a list of integers"),
        ("loss__dim_weights", ("x",), "a list of numbers"),
        ("optim__freeze_embedding", "no", "true or false"),
    ],
)
def test_a_wrong_value_is_named_with_what_would_work(name, value, wanted):
    (sentence,) = faults(tree(**{name: value}))
    assert sentence.startswith(f"config.{name.replace('__', '.')} is {value!r}; it must be {wanted}")
    assert sentence.endswith(".")


def test_integers_are_numbers():
    config = config_lib.from_dict(tree(optim__learning_rate=1, data__weights=[1, 2, 1]))
    assert config.optim.learning_rate == 1.0
    assert isinstance(config.optim.learning_rate, float)
    assert config.data.weights == (1.0, 2.0, 1.0)
    assert all(isinstance(weight, float) for weight in config.data.weights)


def test_unknown_and_missing_names():
    nested = tree(optim__learning_rat=1.0)
    del nested["run"]["steps"]
    nested["optm"] = {}
    nested["encoder"]["zzz"] = 1
    sentences = faults(nested)
    assert len(sentences) == 4  # together, none hides another
    text = "\n".join(sentences)
    assert "config.optim.learning_rat is not a key; did you mean learning_rate?" in text
    assert "config.optm is not a section; did you mean optim?" in text
    assert "config.run.steps is missing; it must be an integer." in text
    assert "config.encoder.zzz is not a key; known: vocab_size, num_layers" in text
    assert str(UserError(*sentences)) == text


def test_a_missing_section_names_its_required_keys():
    nested = tree()
    del nested["optim"]
    assert faults(nested) == ("config.optim.learning_rate is missing; it must be a number.",)


def test_a_section_that_is_no_section():
    (sentence,) = faults(tree() | {"moe": 3})
    assert "config.moe" in sentence


LEARNED = {"encoder__position": "learned", "encoder__num_positions": 130, "encoder__position_offset": 2}
MLM = {"loss__objective": "mlm", "run__eval_every": 0}
CONTRADICTIONS = [
    ({"encoder__num_layers": 3}, "config.moe.every=2"),
    ({"encoder__num_heads": 32}, "config.encoder.num_heads=32"),
    ({"encoder__num_heads": 0}, "config.encoder.num_heads=0"),
    ({"moe__top_k": 9}, "config.moe.top_k=9"),
    ({"moe__top_k": 0}, "config.moe.top_k=0"),
    ({"moe__every": 0}, "config.moe.every=0"),
    ({"data__row_length": 63}, "config.data.row_length=63"),
    ({"data__query_length": 2}, "config.data.query_length"),
    ({"encoder__max_seq_length": 2}, "config.encoder.max_seq_length"),
    ({"data__weights": (1.0,)}, "config.data.weights has 1 numbers for 3 sources"),
    ({"data__weights": (1.0, -1.0, 1.0)}, "config.data.weights"),
    ({"data__weights": (0.0, 0.0, 0.0)}, "config.data.weights"),
    ({"data__sources": (), "data__weights": ()}, "config.data.sources is empty"),
    ({"loss__temperature": 0.0}, "config.loss.temperature=0.0"),
    ({"mesh__data": -1, "mesh__expert": -1}, "config.mesh"),
    ({"mesh__data": 0}, "config.mesh"),
    ({"data__batch_size": -1}, "config.data.batch_size=-1 must not be negative."),
    ({"run__steps": -1}, "config.run.steps=-1 must not be negative."),
    ({"optim__learning_rate": -1.0}, "config.optim.learning_rate"),
    ({"optim__warmup_steps": -1}, "config.optim.warmup_steps"),
    ({"data__num_negatives": -1}, "config.data.num_negatives"),
    ({"run__eval_every": -1}, "config.run.eval_every"),
    ({"run__seed": -1}, "config.run.seed"),
    ({"run__seed": 2**63}, "does not fit 63 bits"),
    ({"encoder__num_positions": 130}, 'belong to config.encoder.position="learned"'),
    ({"encoder__position_offset": 2}, 'belong to config.encoder.position="learned"'),
    (LEARNED | {"encoder__num_positions": 129}, "num_positions=129 - position_offset=2"),
    (LEARNED | {"encoder__num_positions": 0, "encoder__position_offset": 0}, "are fewer than the 128 tokens"),
    (LEARNED | {"data__query_length": 200, "data__row_length": 256}, "are fewer than the 200 tokens"),
    (LEARNED | MLM | {"data__row_length": 256}, "are fewer than the 256 tokens"),  # a text may fill a row
    ({"loss__dims": (32, 64)}, "config.loss.dims=(32, 64)"),
    ({"loss__dims": (32, 0)}, "config.loss.dims=(32, 0)"),
    ({"loss__dims": (32, 32)}, "config.loss.dims=(32, 32)"),
    ({"loss__dims": (32, 8), "loss__dim_weights": (1.0,)}, "config.loss.dim_weights=(1.0,)"),
    ({"loss__dims": (32, 8), "loss__dim_weights": (1.0, 0.0)}, "config.loss.dim_weights=(1.0, 0.0)"),
    ({"loss__dim_weights": (1.0,)}, "config.loss.dim_weights=(1.0,)"),
    ({"loss__distill": "scores"}, "it needs config.data.num_negatives of 1 or more"),
    ({"loss__distill": "embeddings"}, "set both or neither"),
    ({"data__teacher": "big"}, "set both or neither"),
    ({"loss__form": "ring", "loss__distill": "scores", "data__num_negatives": 1}, "has no distillation (scores)"),
    ({"loss__distill": "scores", "data__num_negatives": 1, "data__teacher": "big"}, "set both or neither"),
    ({"loss__distill_temperature": 0.0}, "config.loss.distill_temperature=0.0"),
    ({"loss__distill_weight": -1.0}, "config.loss.distill_weight"),
    ({"loss__false_negative_margin": -0.1}, "config.loss.false_negative_margin"),
    ({"loss__mask_fraction": 0.0}, "config.loss.mask_fraction=0.0"),
    ({"loss__mask_fraction": 1.0}, "config.loss.mask_fraction=1.0"),
    (MLM | {"run__eval_every": 5}, "config.loss.objective=mlm reads texts"),
    (MLM | {"data__num_negatives": 1}, "config.loss.objective=mlm reads texts"),
    (MLM | {"loss__dims": (8,)}, "config.loss.objective=mlm reads texts"),
    ({"data__smoothing": -0.1}, "config.data.smoothing"),
    ({"optim__beta1": 1.0}, "config.optim.beta1=1.0"),
    ({"optim__beta2": -0.1}, "config.optim.beta2=-0.1"),
    ({"optim__epsilon": 0.0}, "config.optim.epsilon=0.0"),
    ({"encoder__rotary_base": 0.0}, "config.encoder.rotary_base=0.0"),
    ({"encoder__norm_epsilon": -1.0}, "config.encoder.norm_epsilon=-1.0"),
]
FITS = [
    LEARNED, MLM, LEARNED | MLM, MLM | {"data__row_length": 32}, {"loss__dims": (8, 32), "loss__dim_weights": (2, 1)}, {"loss__dims": [16]},
    {"loss__distill": "scores", "data__num_negatives": 1}, {"loss__distill": "embeddings", "data__teacher": "big"},
    {"loss__false_negative_margin": 0}, {"data__smoothing": 0}, {"run__seed": 2**63 - 1},
]  # fmt: skip


@pytest.mark.parametrize(("changes", "named"), CONTRADICTIONS, ids=[named for _, named in CONTRADICTIONS])
def test_a_contradiction_is_named(changes, named):
    sentences = faults(tree(**changes))
    assert any(named in sentence for sentence in sentences)


@pytest.mark.parametrize("changes", FITS, ids=[" ".join(changes) for changes in FITS])
def test_what_fits_together_is_taken(changes):
    config = config_lib.to_dict(config_lib.from_dict(tree(**changes)))
    for name, value in changes.items():
        section, key = name.split("__")
        assert config[section][key] == (tuple(value) if isinstance(value, list) else value)


def test_one_section_alone():
    values = config_lib.to_dict(config_lib.load(TINY))["encoder"]
    assert config_lib.section("encoder", values) == config_lib.load(TINY).encoder
    assert config_lib.section("moe", {}) == config_lib.Moe()
    with pytest.raises(UserError) as caught:
        config_lib.section("encoder", values | {"dim": "32", "positions": "learned", "dtype": "float16"})
    assert sorted(caught.value.args) == [
        "config.encoder.dim is '32'; it must be an integer.",
        "config.encoder.dtype is 'float16'; it must be one of float32, bfloat16.",
        "config.encoder.positions is not a key; did you mean position?",
    ]
    with pytest.raises(UserError, match=r"config\.optim\.learning_rate is missing"):
        config_lib.section("optim", {})


def test_overrides_of_lists_of_integers():
    assert overridden("loss.dims=32,8").loss.dims == (32, 8)
    assert overridden("loss.dims=16").loss.dims == (16,)
    assert overridden("loss.dims=()").loss.dims == ()
    with pytest.raises(UserError, match="a list of integers"):
        overridden("loss.dims=32,x")


def test_contradictions_come_together():
    assert len(faults(tree(moe__top_k=9, loss__temperature=-1.0, run__steps=-1))) == 3
    assert config_lib.from_dict(tree(moe__num_experts=0, encoder__num_layers=3))  # dense: any depth


def test_overrides_are_parsed_by_the_type_of_their_key():
    config = overridden("run.steps=7", "optim.learning_rate=1e-3", "optim.clip_norm=2", "loss.bidirectional=false",
                        "run.recompute=True", "encoder.dtype=bfloat16", "data.query_prompt=a: b=c", "mesh.data=-1",
                        "data.dev=a/b,c", "data.weights=0.5,1,2")  # fmt: skip
    assert (config.run.steps, config.optim.learning_rate, config.optim.clip_norm) == (7, 1e-3, 2.0)
    assert (config.loss.bidirectional, config.run.recompute, config.encoder.dtype) == (False, True, "bfloat16")
    assert (config.data.query_prompt, config.mesh.data) == ("a: b=c", -1)
    assert (config.data.dev, config.data.weights) == (("a/b", "c"), (0.5, 1.0, 2.0))
    one = overridden("data.sources=x/y.jsonl", "data.weights=3", "data.dev=", "data.document=5")
    assert (one.data.sources, one.data.weights, one.data.dev) == (("x/y.jsonl",), (3.0,), ())
    assert one.data.document == "5"
    assert overridden("data.sources=('a','b')", "data.weights=()").data.sources == ("a", "b")


def test_faulty_overrides_are_reported_together_with_the_rest():
    overrides = ["--config.optim.learning_rat=1", "--config.optm.learning_rate=1", "--config.run.steps=x",
                 "--config.run.seed", "--steps=3", "stray", "--config.a.b.c=1"]  # fmt: skip
    with pytest.raises(UserError) as caught:
        config_lib.load(TINY, overrides)
    sentences = caught.value.args
    text = "\n".join(sentences)
    assert len(sentences) == 7
    assert "learning_rat is not a key; did you mean learning_rate?" in text
    assert "config.optm is not a section; did you mean optim?" in text
    assert "config.run.steps is 'x'; it must be an integer." in text
    for stray in ("--config.run.seed", "--steps=3", "stray", "--config.a.b.c=1"):
        assert f"{stray} is not an override; write --config.section.key=value." in sentences


def test_a_missing_file_an_unknown_variant_and_a_file_without_get_config(tmp_path):
    (tmp_path / "c.py").write_text("x = 1\n")
    for spec, named in (("no/such.py:tiny", "no/such.py"), (TINY.replace("tiny", "nano"), "tiny"),
                        (str(tmp_path / "c.py"), "get_config")):  # fmt: skip
        with pytest.raises(UserError, match=named):
            config_lib.load(spec)


def test_the_process_exits_2_with_the_sentence_alone(tmp_path):
    arguments = [f"--config={TINY}", "--config.optim.learning_rat=1", "--workdir=w"]
    done = subprocess.run([sys.executable, "-m", "moe_embed.train", *arguments], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120)  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: config.optim.learning_rat is not a key; did you mean learning_rate?\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (
            "configs/finetune_pair.py",
            r"configs/finetune_pair\.py does not exist; did you mean configs/finetune_pairs\.py",
        ),
        ("configs/demo:tiny", r"configs/demo does not exist; did you mean configs/demo\.py\?"),
        ("finetune_pairs.py", r"finetune_pairs\.py does not exist; did you mean configs/finetune_pairs\.py\?"),
        ("nomic_v2/finetun.py", r"does not exist; did you mean .*configs/nomic_v2/finetune\.py"),
        ("configs/zzz.py", r"configs/zzz\.py does not exist; there are configs/demo\.py, configs/finetune_pairs\.py\."),
        ("configs", "configs is a folder; there are "),
        ("README.md", "README.md is no Python file; "),
    ],
)
def test_a_path_of_no_config_is_said_with_those_nearby(spec, said):
    with pytest.raises(UserError, match=f"^--config={spec}: .*{said}") as caught:
        config_lib.load(spec)
    assert len(caught.value.args) == 1


def test_a_misspelt_key_is_named_with_the_right_one():
    with pytest.raises(UserError, match=r"config\.data\.qury is not a key; did you mean query\?"):
        config_lib.load("configs/demo.py:tiny", ["--config.data.qury=title"])


def test_rows_left_to_the_data_are_not_mlms():
    open_ = ["--config.data.rows=0", "--config.data.row_length=0"]
    assert config_lib.load("configs/demo.py:tiny", open_).data.row_length == 0
    with pytest.raises(UserError, match=r"config\.data\.rows=0 must be positive\.\nconfig\.data\.row_length=0 must be"):
        config_lib.load("configs/nomic_v2/mlm.py:tiny", [*open_, "--config.data.sources=x"])
    with pytest.raises(UserError, match=r"config\.data\.rows=-1 must not be negative"):
        config_lib.load("configs/demo.py:tiny", ["--config.data.rows=-1"])
