"""The rule table is strict: each fault names array, shape, rule and mesh; nothing is replicated in silence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from moe_embed import config as config_lib
from moe_embed import sharding


@pytest.fixture
def mesh(eight_devices):
    return sharding.make_mesh(config_lib.Mesh(data=4, expert=2))


class Gpu:
    """A device as jax describes one of several hosts: each host is a slice."""

    platform, device_kind, coords = "gpu", "NVIDIA H100 80GB HBM3", None

    def __init__(self, number: int, host: int):
        self.id, self.slice_index, self.process_index = number, host, host


@pytest.mark.parametrize(
    ("hosts", "sizes", "by_host"),
    [
        (1, (4, 2), [[0, 0]] * 4),
        (2, (8, 1), [[0]] * 4 + [[1]] * 4),
        (2, (4, 2), [[0, 0]] * 2 + [[1, 1]] * 2),
        (4, (2, 4), [[0, 0, 1, 1], [2, 2, 3, 3]]),  # experts over two hosts
        (2, (1, 8), [[0] * 4 + [1] * 4]),
    ],
)
def test_experts_stay_within_a_host_where_they_can(hosts, sizes, by_host):
    gpus = [Gpu(number, number * hosts // 8) for number in range(8)]
    for devices in (gpus, gpus[::-1]):
        mesh_DE = sharding._arranged(devices, sizes)
        assert sorted(d.id for d in mesh_DE.flat) == list(range(8))
        assert [[d.slice_index for d in row] for row in mesh_DE] == by_host
    uneven = [Gpu(number, int(number > 2)) for number in range(8)]
    assert [d.slice_index for d in sharding._arranged(uneven, (8, 1)).flat] == [0] * 3 + [1] * 5


@pytest.mark.parametrize(
    ("name", "column", "expected"),
    [
        ("w_up_EDF", "parameter", PartitionSpec("expert", None, None)),
        ("w_up_REDF", "optimizer", PartitionSpec(None, "expert", "data", None)),
        ("word_VD", "optimizer", PartitionSpec(None, "data")),
        ("tokens_MBL", "activation", PartitionSpec(None, ("data", "expert"), None)),
        ("document_id_N", "activation", PartitionSpec(("data", "expert"))),
    ],
)
def test_specs_by_hand(name, column, expected):
    assert sharding.spec(name, column=column) == expected


@pytest.mark.parametrize("name", ["kernel", "w_up", "w_up_EDQ", "w_up_Edf", "EDF"])
def test_a_name_without_known_dims_is_refused(name):
    with pytest.raises(ValueError, match=name):
        sharding.spec(name, column="parameter")


def test_two_dims_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="score_BN"):
        sharding.spec("score_BN", column="activation")


def test_wrong_rank_and_indivisible_dims_name_shape_rule_and_mesh(mesh):
    with pytest.raises(ValueError, match=r"w_up_EDF has shape \(8, 16\)"):
        sharding.spec("w_up_EDF", column="parameter", shape=(8, 16), mesh=mesh)
    with pytest.raises(ValueError, match=r"E=3 is not divisible by 2, the size of expert in the mesh .*parameter rule"):
        sharding.spec("w_up_EDF", column="parameter", shape=(3, 16, 4), mesh=mesh)


def test_the_last_name_of_a_path_decides_and_moments_follow(mesh):
    state = {"mu": {"unit": {"moe": {"w_up_EDF": jnp.zeros((8, 16, 4))}}}, "count": jnp.zeros(())}
    specs = sharding.specs(state, column="optimizer", mesh=mesh)
    assert specs["mu"]["unit"]["moe"]["w_up_EDF"] == PartitionSpec("expert", "data", None)
    assert specs["count"] == PartitionSpec()


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_lib.Mesh(data=3), "data=3"),
        (config_lib.Mesh(data=2, expert=2), "4 of 8 devices"),
        (config_lib.Mesh(data=-1, expert=16), "expert=16"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_refused(config, words, eight_devices):
    with pytest.raises(config_lib.UserError, match=words):
        sharding.make_mesh(config)


def test_minus_one_takes_what_is_left(eight_devices):
    assert dict(sharding.make_mesh(config_lib.Mesh(data=-1, expert=2)).shape) == {"data": 4, "expert": 2}


def test_collectives_by_letter(mesh):
    def local(x_ND):
        everything = sharding.gather(x_ND, "N")
        over_experts = sharding.scatter(sharding.gather(x_ND, "E"), "E")  # each of 2 devices adds its copy
        return everything.sum(), over_experts, sharding.reduce(x_ND.sum(), "N"), sharding.index("N")[None]

    rows = sharding.spec("x_ND", column="activation")
    out_specs = (PartitionSpec(), rows, PartitionSpec(), sharding.spec("x_N", column="activation"))
    f = sharding.on_each_device(local, mesh=mesh, in_specs=rows, out_specs=out_specs)
    x = jnp.arange(32.0).reshape(16, 2)
    total, doubled, reduced, index = jax.jit(f)(x)
    assert total == reduced == x.sum()
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(index, np.arange(8))


def test_masters_are_assembled_at_the_door_and_their_gradients_leave_in_parts(mesh):
    """Each device holds D / data of a master and all of it inside; the gradient is the sum over devices, in parts again."""
    rng = np.random.default_rng(0)
    masters = {
        "w_up_EDF": rng.normal(size=(4, 8, 2)).astype(np.float32),
        "b_up_F": rng.normal(size=2).astype(np.float32),
    }
    columns = [sharding.specs(masters, column=column) for column in ("optimizer", "parameter")]
    on = lambda f, out: sharding.on_each_device(f, mesh=mesh, in_specs=(columns[0],), out_specs=out)  # noqa: E731

    assembled = jax.jit(on(sharding.assemble, columns[1]))(masters)
    jax.tree.map(np.testing.assert_array_equal, assembled, masters)

    def local(masters):
        whole = sharding.assemble(masters)
        assert whole["w_up_EDF"].shape == (4 // mesh.shape["expert"], 8, 2)
        weight = 1.0 + sharding.index("N")
        return sharding.reduce(sum((leaf**2).sum() for leaf in whole.values()) * weight, "N")

    gradients = jax.jit(jax.grad(on(local, sharding.EVERYWHERE)))(masters)
    ranks = 1.0 + np.arange(mesh.size).reshape(mesh.shape["data"], mesh.shape["expert"])
    of_expert = np.repeat(ranks.sum(0), 4 // mesh.shape["expert"])  # a device holds its expert part alone
    np.testing.assert_allclose(gradients["w_up_EDF"], 2 * masters["w_up_EDF"] * of_expert[:, None, None], rtol=1e-6)
    np.testing.assert_allclose(gradients["b_up_F"], 2 * masters["b_up_F"] * ranks.sum(), rtol=1e-6)
    assert gradients["w_up_EDF"].addressable_shards[0].data.shape[1] == 8 // mesh.shape["data"]


def test_outside_of_shard_map_collectives_are_the_identity():
    x = jnp.arange(3.0)
    for result in (sharding.gather(x, "N"), sharding.scatter(x, "E"), sharding.reduce(x, "B")):
        assert result is x
    assert sharding.index("N") == 0


def test_put_batch_splits_rows_over_both_axes(mesh):
    batch = sharding.put_batch({"tokens_MBL": np.zeros((3, 16, 4), np.int32)}, mesh=mesh)
    assert {shard.data.shape for shard in batch["tokens_MBL"].addressable_shards} == {(3, 2, 4)}


def test_put_and_fetch_keep_every_row_in_its_place(mesh):
    x_ND = np.arange(32.0, dtype=np.float32).reshape(16, 2)
    put = sharding.put_batch({"x_ND": x_ND}, mesh=mesh)["x_ND"]
    for i, shard in enumerate(sorted(put.addressable_shards, key=lambda shard: shard.index[0].start)):
        np.testing.assert_array_equal(shard.data, x_ND[2 * i : 2 * i + 2])
    np.testing.assert_array_equal(sharding.fetch(put), x_ND)
    assert not np.array_equal(sharding.fetch(put), x_ND[::-1])


def test_parts_of_ones_own_are_the_whole_where_there_is_one_process(mesh):
    batch = {
        "x_ND": np.arange(32.0, dtype=np.float32).reshape(16, 2),
        "tokens_MBL": np.arange(3 * 16 * 4).reshape(3, 16, 4),
    }
    assert sharding.own_parts(mesh) == list(range(8))
    whole, parts = sharding.put_batch(batch, mesh=mesh), sharding.put_parts(batch, mesh=mesh)
    for name, array in batch.items():
        assert parts[name].sharding == whole[name].sharding
        np.testing.assert_array_equal(sharding.fetch(parts[name]), array)
    assert not np.array_equal(sharding.fetch(parts["x_ND"]), batch["x_ND"][::-1])
