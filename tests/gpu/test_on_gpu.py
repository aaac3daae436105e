"""One GPU beside the CPU backend in the same process: kernels, attention, both losses, a train step.

    bash launch/gpu_check.sh           or, to see the tests themselves run where there is none:  pytest -m gpu --stand_in

float32 is under matmul precision 'highest' on both sides.
"""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from moe_embed import config as config_lib
from moe_embed import infonce, program, ring_infonce, sharding
from moe_embed.model import grouped_matmul as gm
from moe_embed.model import layers
from moe_embed.model import triton_grouped_matmul as kernels
from tests import test_infonce, test_ring_infonce, tiny
from tests.test_program import CASES, batches_of, differences
from tests.test_triton_grouped_matmul import example, farthest, loop

pytestmark = pytest.mark.gpu

DTYPES = [np.float32, ml_dtypes.bfloat16]
ROUNDED = {
    np.float32: 1e-5,
    ml_dtypes.bfloat16: 2**-7,
}  # of the largest number; bfloat16 has 8 bits, and rounds in other places


@pytest.fixture(autouse=True)
def highest():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def cpu():
    return jax.devices("cpu")[0]


def on(device, f, *arguments):
    """f(*arguments), compiled for and run on `device`, back as numpy arrays."""
    return jax.device_get(jax.jit(f)(*jax.device_put(arguments, device)))


def share(a, b):
    """The largest difference, as a share of the largest number."""
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    return np.abs(a - b).max() / np.abs(b).max()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("counts", "dims"), [((5, 200, 130), (24, 40)), ((0, 0, 7), (64, 128)), ((300, 0, 140), (384, 768))]
)
def test_kernels_equal_the_loop(gpu, counts, dims, dtype):
    *arrays, tile_expert, num_tiles, row_expert = example(counts, dims=dims, dtype=dtype)
    interpret = gpu.platform == "cpu"

    def run(x, dy, w, tile_expert, num_tiles):
        times = functools.partial(
            kernels.rows_times_experts, tile_expert=tile_expert, num_tiles=num_tiles, interpret=interpret
        )
        gradients = kernels.expert_gradients(
            x, dy, tile_expert, num_tiles, num_experts=len(counts), interpret=interpret
        )
        return times(x, w, transposed=False), times(dy, w, transposed=True), gradients

    got, again = (on(gpu, run, *arrays, tile_expert, num_tiles) for _ in range(2))
    assert farthest(got, loop(*arrays, row_expert), row_expert) < ROUNDED[dtype]
    used = num_tiles * gm.TILE
    for a, b, rows in zip(got, again, (used, used, None), strict=True):
        np.testing.assert_array_equal(a[:rows], b[:rows])  # bitwise, from run to run
    arrays[2] = arrays[2] * np.asarray(1.1, dtype)
    assert farthest(on(gpu, run, *arrays, tile_expert, num_tiles), got, row_expert) > 10 * ROUNDED[dtype]


def test_a_row_is_bitwise_the_same_beside_other_rows(gpu):
    x, _, w, tile_expert, num_tiles, _ = example((64, 200, 130), dims=(768, 384), dtype=ml_dtypes.bfloat16)
    other = np.concatenate([x[:1], np.roll(x[1:], 5, axis=0)])
    a, b = (on(gpu, gm.grouped_matmul, rows, w, tile_expert, num_tiles) for rows in (x, other))
    np.testing.assert_array_equal(a[0], b[0])
    assert not np.array_equal(a[1], b[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_grouped_matmul_and_its_gradients(gpu, cpu, dtype):
    x, dy, w, tile_expert, num_tiles, row_expert = example((700, 0, 130), dims=(128, 256), dtype=dtype)

    def run(x, dy, w, *tiles):
        y, pull = jax.vjp(lambda x, w: gm.grouped_matmul(x, w, *tiles), x, w)
        return y, *pull(dy)

    got, expected = (on(device, run, x, dy, w, tile_expert, num_tiles) for device in (gpu, cpu))
    assert farthest(got, expected, row_expert) < ROUNDED[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("length", "heads", "dim"), [(128, 2, 64), (512, 12, 768)])
def test_attention_over_packed_segments(gpu, cpu, length, heads, dim, dtype):
    """Values and all gradients; padding at a row's end, a row of one text, an empty row."""
    c = config_lib.Encoder(vocab_size=64, num_layers=1, dim=dim, num_heads=heads, ffn_dim=dim, max_seq_length=length)
    graph, state = nnx.split(layers.Attention(c, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    x, cotangent = (rng.normal(size=(4, length, dim)).astype(dtype) for _ in range(2))
    segments = np.zeros((4, length), np.int32)
    segments[0, :7], segments[0, 7:100], segments[1, :], segments[2, : length // 3] = 1, 2, 1, 1
    cotangent *= (segments > 0)[..., None].astype(dtype)  # what padding attends to is nobody's business
    positions = np.tile(np.arange(length, dtype=np.int32), (4, 1))

    def run(state, x, segments, cotangent):
        angles = layers.rotary_angles(positions, head_dim=dim // heads, base=10_000.0)
        y, pull = jax.vjp(lambda state, x: nnx.merge(graph, state)(x, segments, angles), state, x)
        return y * (segments > 0)[..., None], pull(cotangent)

    arguments = jax.device_get(state), x, segments, cotangent
    expected = on(cpu, run, *arguments)
    for a, b in zip(jax.tree.leaves(on(gpu, run, *arguments)), jax.tree.leaves(expected), strict=True):
        assert share(a, b) < (
            1e-5 if dtype == np.float32 else 2**-5
        )  # bfloat16: weights and scores are rounded in another order
    segments[0, 5:7] = 2
    assert share(on(gpu, run, *arguments)[0], expected[0]) > 2**-5


@pytest.mark.parametrize("form", ["gathered", "ring"])
@pytest.mark.parametrize("terms", ["plain", "all"])
def test_losses_and_their_gradients(gpu, cpu, form, terms):
    loss = ring_infonce.ring_infonce if form == "ring" else infonce.infonce
    f = test_ring_infonce.graded(test_ring_infonce.of(loss, test_ring_infonce.TERMS[terms]))
    arguments = test_ring_infonce.example(2)
    expected = on(cpu, f, *arguments)
    got = on(gpu, f, *arguments)
    np.testing.assert_allclose(got[0][0], expected[0][0], rtol=1e-5)
    assert max(share(a, b) for a, b in zip(got[1], expected[1], strict=True)) < 1e-5
    other = on(gpu, f, *test_ring_infonce.example(2, seed=1))
    assert abs(other[0][0] - got[0][0]) > 1e-3


def test_the_loss_on_the_gpu_equals_the_loop(gpu):
    q, d, ids = test_infonce.example(2, duplicates=True)
    value, _ = on(gpu, lambda q, d, ids: test_infonce.run(q, d, ids, temperature=0.1), q, d, ids)
    np.testing.assert_allclose(value, test_infonce.loop(q, d, ids, temperature=0.1, h=2)[0], rtol=1e-5)


def config(case: str, *, dtype: str = "float32") -> config_lib.Config:
    """tests/tiny.py's with heads that a flash kernel takes, by the cases of test_program."""
    changes = dict(CASES[case])
    encoder = {"dim": 64, "ffn_dim": 96, "dtype": dtype} | changes.pop("encoder", {})
    if "num_positions" in encoder:
        encoder["num_positions"] = 66
    data = {"row_length": 64} | changes.pop("data", {})
    return tiny.config(encoder=encoder, data=data, **changes)


@functools.cache
def built(c: config_lib.Config, device) -> program.Program:
    mesh = sharding.make_mesh(config_lib.Mesh(), devices=[device])
    return program.build(c, mesh, num_ids=tiny.FakeTokenizer.num_ids)


def arguments_on(device, c: config_lib.Config, params):
    mesh = built(c, device).mesh
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=mesh))
    return params, sharding.put_batch(batches_of(c).batch_at(0).arrays, mesh=mesh)


def loss_and_gradients(c: config_lib.Config, device, params):
    (loss, _), gradients = built(c, device).loss_and_gradients(*arguments_on(device, c, params))
    return float(loss), jax.device_get(gradients)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_are_those_of_the_cpu(gpu, cpu, case):
    c = config(case)
    loss, gradients = loss_and_gradients(c, gpu, tiny.params(c))
    expected_loss, expected = loss_and_gradients(c, cpu, tiny.params(c))
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    wrong, zero = differences(gradients, expected)
    assert not wrong
    assert not zero
    other_loss, other = loss_and_gradients(c, gpu, tiny.params(c, seed=1))
    assert other_loss != pytest.approx(expected_loss, rel=1e-5)
    assert differences(other, expected)[0]


def test_a_train_step_moves_the_parameters_as_on_the_cpu(gpu, cpu):
    c = config("plain")
    after = []
    for device in (gpu, cpu):
        params, batch = arguments_on(device, c, tiny.params(c))
        state = built(c, device).init(params)
        for _ in range(2):  # the first step of the warm-up has a learning rate of 0
            state, metrics = built(c, device).step(state, batch)
        after.append(jax.device_get(state["params"]))
    moved = float(metrics["learning_rate"])
    # Adam divides by the root of the squared gradient: where that is near zero, rounding decides the sign of a whole step.
    for a, b, old in zip(*map(jax.tree.leaves, (*after, tiny.params(c))), strict=True):
        assert np.abs(a - b).mean() < 1e-3 * moved
        assert np.abs(a - old).max() > 0.1 * moved


def test_bfloat16_is_close_to_float32(gpu):
    """On a CPU the two losses were 1.2 % apart and the cosine of the two gradients 0.981: experts flip at near ties."""
    c, low = config("plain"), config("plain", dtype="bfloat16")
    loss, gradients = loss_and_gradients(low, gpu, tiny.params(c))
    expected_loss, expected = loss_and_gradients(c, gpu, tiny.params(c))
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])  # noqa: E731
    a, b = flat(gradients), flat(expected)
    assert loss == pytest.approx(expected_loss, rel=0.03)
    assert a @ b > 0.96 * np.linalg.norm(a) * np.linalg.norm(b)
    assert np.linalg.norm(a - b) > 1e-4 * np.linalg.norm(b)  # else one of them was not in its dtype


def test_the_same_step_twice_is_bitwise_the_same(gpu):
    """All but the gradient of the table of pieces: on a GPU a scatter-add has no fixed order."""
    c = config("finetuning")
    first, second = (loss_and_gradients(c, gpu, tiny.params(c)) for _ in range(2))
    for _, gradients in (first, second):
        gradients["embedding"].pop("word_VD")
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_kernel_is_what_runs(gpu):
    """On a GPU the mixture's program holds the Triton kernels; on the CPU that stands in it holds none."""
    x, _, w, tile_expert, num_tiles, _ = example((5, 200, 130), dims=(64, 96))
    arguments = jax.device_put((x, w, tile_expert, num_tiles), gpu)
    text = jax.jit(gm.grouped_matmul).lower(*arguments).as_text()
    assert ("xla.gpu.triton" in text) == (gpu.platform != "cpu")
    assert jnp.isfinite(gm.grouped_matmul(*arguments)[: int(num_tiles) * gm.TILE]).all()
