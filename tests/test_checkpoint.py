"""What was saved comes back bit for bit, on any mesh; what was damaged is noticed, named and passed over."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_embed import checkpoint, program, sharding
from moe_embed import config as config_lib
from moe_embed.config import UserError

DEMO = pathlib.Path(__file__).resolve().parent.parent / "configs" / "demo.py"
FACTS = {"files": [["a.jsonl", 3, 17]], "seed": 0}


def small_state(step: int, mesh) -> dict:
    """Named arrays laid out as program.build lays them out, full of numbers that depend on the step."""
    rng = np.random.default_rng(step)

    def named():
        w_up_EDF = rng.normal(size=(8, 16, 4)).astype(np.float32)
        return {"moe": {"w_up_EDF": w_up_EDF}, "scale_D": np.full(16, step, np.float32)}

    params, moments = named(), named()
    return {
        "step": jnp.int32(step),
        "params": jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh)),
        "optimizer": {"mu": jax.device_put(moments, sharding.shardings(moments, column="optimizer", mesh=mesh))},
    }


def abstract(state: dict) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a: dict, b: dict) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(config_lib.Mesh(data=4, expert=2))


@pytest.fixture(scope="module")
def saved(mesh, tmp_path_factory):
    """Steps 10 and 20, saved once; tests damage copies."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (10, 20):
        checkpoint.save(folder, small_state(step, mesh), facts=FACTS | {"seed": step}, keep=2)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def newest(folder) -> tuple[int | None, str]:
    said = []
    return checkpoint.newest_verified(folder, say=said.append), "\n".join(said)


def test_round_trip_and_facts(folder, mesh):
    assert checkpoint.steps(folder) == [10, 20]
    assert newest(folder) == (20, "")
    for step in (10, 20):
        state = small_state(step, mesh)
        restored = checkpoint.restore(folder, step, abstract_state=abstract(state))
        assert_same(restored, state)
        assert restored["params"]["moe"]["w_up_EDF"].sharding == state["params"]["moe"]["w_up_EDF"].sharding
        alone = checkpoint.restore_params(folder, step, abstract_params=abstract(state)["params"])
        assert_same(alone, state["params"])
        assert checkpoint.facts(folder, step) == FACTS | {"seed": step}
    with pytest.raises(AssertionError):
        assert_same(restored, small_state(10, mesh))


@pytest.mark.parametrize(("data", "expert"), [(1, 8), (8, 1), (2, 4)])
def test_a_state_moves_to_another_mesh(folder, mesh, data, expert):
    other = sharding.make_mesh(config_lib.Mesh(data=data, expert=expert))
    restored = checkpoint.restore(folder, 20, abstract_state=abstract(small_state(20, other)))
    assert_same(restored, small_state(20, mesh))
    assert restored["params"]["moe"]["w_up_EDF"].sharding.mesh.shape == {"data": data, "expert": expert}
    assert restored["params"]["moe"]["w_up_EDF"].addressable_shards[0].data.shape[0] == 8 // expert


def test_a_real_state_of_a_program_moves_from_eight_devices_to_one(tmp_path):
    config = config_lib.load(f"{DEMO}:tiny")
    config = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, vocab_size=64, dim=16))
    made = program.build(config, sharding.make_mesh(config_lib.Mesh(data=4, expert=2)))
    alone = program.build(config, sharding.make_mesh(config_lib.Mesh(), devices=jax.devices()[:1]))
    rng = np.random.default_rng(0)  # not made.init(): nothing has to be compiled to be saved
    numbers = jax.tree.map(lambda x: (9 * rng.random(x.shape)).astype(x.dtype), made.abstract_state)
    state = jax.tree.map(lambda n, x: jax.device_put(n, x.sharding), numbers, made.abstract_state)
    state["step"] = jnp.int32(0)
    checkpoint.save(tmp_path / "c", state, facts={}, keep=1)
    assert_same(checkpoint.restore(tmp_path / "c", 0, abstract_state=alone.abstract_state), state)
    assert_same(checkpoint.restore(tmp_path / "c", 0, abstract_state=made.abstract_state), state)


def test_a_flipped_bit_in_any_file_is_noticed(folder):
    files = [path for path in sorted((folder / "20").rglob("*")) if path.is_file() and path.stat().st_size]
    assert len(files) > 4
    for path in files:
        good = path.read_bytes()
        for place in {0, len(good) // 2}:
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            step, said = newest(folder)
            assert step == 10
            assert "checkpoint 20 is passed over: digest mismatch in " in said
            assert str(path) in said
        path.write_bytes(good)
        assert newest(folder) == (20, "")


def edit_manifest(folder, **changes):
    path = folder / "20" / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGES = {
    "no manifest": (
        lambda f: (f / "20" / checkpoint.MANIFEST).unlink(),
        "has no manifest: it is unfinished, or none of ours",
    ),
    "empty step": (lambda f: (shutil.rmtree(f / "20"), (f / "20").mkdir()), "has no manifest"),
    "empty manifest": (lambda f: (f / "20" / checkpoint.MANIFEST).write_text(""), "digest mismatch"),
    "list manifest": (lambda f: (f / "20" / checkpoint.MANIFEST).write_text("[]"), "digest mismatch"),
    "facts edited": (lambda f: edit_manifest(f, facts={"seed": 5}), "digest mismatch"),
    "files edited": (lambda f: edit_manifest(f, files={}), "digest mismatch"),
    "digest edited": (lambda f: edit_manifest(f, digest="0" * 32), "digest mismatch"),
    "a copy under another number": (
        lambda f: (shutil.rmtree(f / "20"), shutil.copytree(f / "10", f / "20")),
        "is a copy of step 10",
    ),
    "binary manifest": (lambda f: (f / "20" / checkpoint.MANIFEST).write_bytes(b"\xff\xfe"), "digest mismatch"),
    "extra file": (lambda f: (f / "20" / "extra").touch(), "lacks or has too many files: extra"),
    "part missing": (lambda f: shutil.rmtree(f / "20" / "params"), "lacks or has too many files"),
    "a file in its place": (lambda f: (shutil.rmtree(f / "20"), (f / "20").touch()), "20"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_step_is_passed_over_and_named(folder, kind):
    damage, words = DAMAGES[kind]
    damage(folder)
    step, said = newest(folder)
    assert step == 10
    assert said.startswith("checkpoint 20 is passed over: ")
    assert words in said


def test_strict_restore_passes_over_nothing(folder):
    assert checkpoint.newest_verified(folder, say=print, strict=True) == 20
    (folder / "20" / checkpoint.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"checkpoint 20 does not verify: .*no manifest.*without --strict_restore"):
        checkpoint.newest_verified(folder, say=print, strict=True)


def signed(folder, **changes):
    """The manifest of step 20 as another version would have written it."""
    path = folder / "20" / checkpoint.MANIFEST
    manifest = {name: value for name, value in json.loads(path.read_text()).items() if name != "digest"} | changes
    manifest = {name: value for name, value in manifest.items() if value is not None}
    checkpoint._write_manifest(path.parent, manifest)


def test_a_newer_schema_is_refused_and_none_is_from_before_there_was_one(folder, mesh):
    state = small_state(20, mesh)
    signed(folder, schema=None, step=None, arrays=None)
    assert newest(folder) == (20, "")
    assert_same(checkpoint.restore(folder, 20, abstract_state=abstract(state)), state)
    signed(folder, schema=checkpoint.SCHEMA + 1)
    with pytest.raises(UserError, match=r"20 was written by a newer moe_embed \(schema 2; this one reads 1\)"):
        newest(folder)


def test_other_arrays_are_refused_by_name_and_another_dtype_is_said(folder, mesh, capsys):
    def asked(**changes):
        wanted = abstract(small_state(20, mesh))["params"]
        return wanted | {name: value for name, value in changes.items() if value is not None}

    struct = lambda shape, dtype: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=abstract(small_state(20, mesh))["params"]["scale_D"].sharding
    )
    for changes, words in (
        ({"scale_D": struct((24,), np.float32)}, r"params/scale_D is \[16\], not \[24\]"),
        ({"bias_D": struct((16,), np.float32)}, "params/bias_D is not in it"),
        ({"moe": {}}, "it has params/moe/w_up_EDF, which is not asked for"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.restore_params(folder, 20, abstract_params=asked(**changes))
    assert capsys.readouterr().out == ""
    low = checkpoint.restore_params(folder, 20, abstract_params=asked(scale_D=struct((16,), jnp.bfloat16)))
    assert low["scale_D"].dtype == jnp.bfloat16
    assert "params/scale_D from float32 to bfloat16" in capsys.readouterr().out


def test_what_a_save_that_was_cut_off_left_is_removed_and_nothing_else(folder):
    strays = ("30.saving", "30.deleting", "30.saving.orbax-checkpoint-tmp", "30.orbax-checkpoint-tmp-123")
    others = ("notastep", "40", "x.saving")
    for name in (*strays, *others):
        (folder / name).mkdir()
    checkpoint.clean(folder)
    assert {p.name for p in folder.iterdir()} == {"10", "20", *others}


def test_nothing_is_started_afresh_in_silence(folder, tmp_path):
    for step in (10, 20):
        (folder / str(step) / checkpoint.MANIFEST).unlink()
    with pytest.raises(UserError, match=r"has 2 checkpoints and none verifies \(.*20 has no manifest"):
        newest(folder)
    assert newest(tmp_path / "none") == (None, "")
    (tmp_path / "30.orbax-checkpoint-tmp").mkdir()  # what Orbax leaves of a save that was cut off
    assert newest(tmp_path) == (None, "")


def test_retention_counts_verified_steps_only(folder, mesh):
    (folder / "20" / checkpoint.MANIFEST).unlink()
    checkpoint.save(folder, small_state(30, mesh), facts=FACTS, keep=2)
    assert checkpoint.steps(folder) == [10, 20, 30]  # 20 does not verify: 10 and 30 are the two
    checkpoint.save(folder, small_state(40, mesh), facts=FACTS, keep=1)
    assert [step for step in checkpoint.steps(folder) if not checkpoint.problem(folder, step)] == [40]
    assert newest(folder) == (40, "")


def test_a_step_that_did_not_verify_is_written_again(folder, mesh):
    (folder / "20" / checkpoint.MANIFEST).unlink()
    assert checkpoint.save(folder, small_state(20, mesh), facts=FACTS, keep=2) == folder.absolute() / "20"
    assert newest(folder) == (20, "")
    assert checkpoint.facts(folder, 20) == FACTS
