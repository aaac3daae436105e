"""The seam: `build(config, mesh)` is the only place where model, loss, optimiser and shardings meet.

The train loop, the planner, `embed` and the tests all run what is built here.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moe_embed import config as config_lib
from moe_embed import objectives, optim, sharding
from moe_embed.model import encoder, layers


@dataclasses.dataclass(frozen=True)
class Program:
    """Everything a run executes on its mesh."""

    config: config_lib.Config  # with loss.form decided
    mesh: jax.sharding.Mesh
    abstract_state: dict  # of jax.ShapeDtypeStruct with shardings: what a checkpoint is restored into
    init: Callable[..., dict]  # state {"step", "params", "optimizer"}: fresh from run.seed, or (params) from those
    step: Callable[[dict, dict], tuple[dict, dict]]  # (state, batch) -> (state, metrics); the state is donated
    loss_and_gradients: Callable[[dict, dict], tuple]  # (params, batch) -> ((loss, metrics), gradients), for tests
    assemble: Callable[[dict], dict]  # a state's params -> laid out as build_embed's function takes them


def build(config: config_lib.Config, mesh: jax.sharding.Mesh, *, num_ids: int | None = None) -> Program:
    """Config and mesh -> Program. Nothing is compiled yet. UserError if the mesh does not divide the batch or a dim.

    `num_ids`: how many rows of the vocabulary are real, for the objective mlm (None: all).
    """
    if not (config.data.batch_size and config.run.steps):
        raise config_lib.UserError(
            f"config.data.batch_size={config.data.batch_size} and config.run.steps={config.run.steps}: train sets what is 0 "
            "by the number of pairs; here nothing is read, give both."
        )
    config = objectives.with_form(config, num_devices=mesh.size)
    with_head = config.loss.objective == "mlm"
    objective = functools.partial(objectives.mlm, num_ids=num_ids) if with_head else objectives.contrastive
    if config.data.batch_size % mesh.size:
        below = config.data.batch_size // mesh.size * mesh.size
        raise config_lib.UserError(
            f"config.data.batch_size={config.data.batch_size} is not divisible by the mesh's {mesh.size} devices "
            f"({' x '.join(f'{axis}={size}' for axis, size in mesh.shape.items())}); nearest: "
            f"{', '.join(str(n) for n in (below, below + mesh.size) if n)}."
        )
    optimizer = optim.make(config.optim, steps=config.run.steps)

    def init(params: dict | None = None) -> dict:
        if params is None:
            key = jax.random.key(config.run.seed)
            params = encoder.init(config.encoder, config.moe, key=key, with_head=with_head)
        return {"step": jnp.zeros((), jnp.int32), "params": params, "optimizer": optimizer.init(params)}

    abstract = jax.eval_shape(init)
    try:
        shardings = {
            "step": sharding.shardings(abstract["step"], column="parameter", mesh=mesh),
            "params": sharding.shardings(abstract["params"], column="optimizer", mesh=mesh),
            "optimizer": sharding.shardings(abstract["optimizer"], column="optimizer", mesh=mesh),
        }
    except ValueError as error:
        raise config_lib.UserError(str(error)) from error
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    param_specs = sharding.specs(abstract["params"], column="optimizer")

    def local_loss(params: dict, batch: dict):
        params = optim.freeze(params) if config.optim.freeze_embedding else params
        return objective(sharding.assemble(params), batch, config=config)

    def loss_and_gradients(params: dict, batch: dict):
        in_specs = param_specs, sharding.specs(batch, column="activation")
        loss = sharding.on_each_device(local_loss, mesh=mesh, in_specs=in_specs, out_specs=sharding.EVERYWHERE)
        return jax.value_and_grad(loss, has_aux=True)(params, batch)

    def step(state: dict, batch: dict):
        (loss, metrics), gradients = loss_and_gradients(state["params"], batch)
        updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["params"])
        norm = optax.global_norm(gradients)  # of all devices' gradients: one bad number anywhere shows
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params = optim.keep_if(finite, optax.apply_updates(state["params"], updates), state["params"])
        optimizer_state = optim.keep_if(finite, optimizer_state, state["optimizer"])
        metrics |= {
            "loss": loss,
            "gradient_norm": norm,
            "skipped": 1.0 - finite,
            "learning_rate": optim.schedule(config.optim, steps=config.run.steps)(state["step"]),
        }
        return {"step": state["step"] + 1, "params": params, "optimizer": optimizer_state}, metrics

    return Program(
        config=config,
        mesh=mesh,
        abstract_state=abstract,
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)),
        loss_and_gradients=jax.jit(loss_and_gradients),
        assemble=jax.jit(
            lambda params: params, out_shardings=sharding.shardings(abstract["params"], column="parameter", mesh=mesh)
        ),
    )


def count_parameters(params: dict, config: config_lib.Config) -> tuple[int, int]:
    """All parameters, and those that take part for one token: without the experts it does not visit."""
    total = active = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total += leaf.size
        is_expert = "E" in sharding.letters(path[-1].key) and "F" in sharding.letters(path[-1].key)
        active += leaf.size * config.moe.top_k // config.moe.num_experts if is_expert else leaf.size
    return total, active


@functools.cache
def build_embed(c: config_lib.Encoder, moe: config_lib.Moe, mesh: jax.sharding.Mesh, *, num_segments: int) -> Callable:
    """(lay_out's params, rows) -> (pooled_MBSD float32 not normalised, RouterSums [R, E] global or None), for `mesh`.

    `rows` holds tokens_MBL, segments_MBL and positions_MBL. Needs no optimiser and no data config: an exported folder
    has neither.
    """
    if _by_units(mesh):
        return _embed_by_units(c, moe, num_segments=num_segments)

    def local(params: dict, rows: dict):
        pooled_MBSD, sums, _ = objectives.encode(params, rows, c=c, moe=moe, num_segments=num_segments, recompute=False)
        return pooled_MBSD, sharding.reduce(sums, "B") if sums is not None else None

    @jax.jit
    def embed(params: dict, rows: dict):
        specs = sharding.specs(params, column="parameter"), sharding.specs(rows, column="activation")
        out_specs = sharding.spec("pooled_MBSD", column="activation"), sharding.EVERYWHERE
        return sharding.on_each_device(local, mesh=mesh, in_specs=specs, out_specs=out_specs)(params, rows)

    return embed


def lay_out(params: dict, mesh: jax.sharding.Mesh) -> dict:
    """A model's params as build_embed's function takes them: on one CPU device `unit` is a list of repeats, views of them.

    XLA:CPU copies what a scan slices: for a single query, all experts of all layers (a third of its time, measured).
    """
    if not _by_units(mesh):
        return params
    unit, device = jax.tree.map(np.asarray, params["unit"]), mesh.devices.item()
    num_repeats = len(jax.tree.leaves(unit)[0])
    units = [jax.device_put(encoder.one_of(unit, r), device, may_alias=True) for r in range(num_repeats)]
    return params | {"unit": units}


def _by_units(mesh: jax.sharding.Mesh) -> bool:
    return mesh.size == 1 and mesh.devices.item().platform == "cpu"


def _embed_by_units(c: config_lib.Encoder, moe: config_lib.Moe, *, num_segments: int) -> Callable:
    """build_embed's function without the scan: a unit is compiled once and called for each repeat, on its own arrays."""
    enter = jax.jit(functools.partial(encoder.enter, c=c))
    run_unit = jax.jit(functools.partial(encoder.run_unit, c=c, moe=moe))
    pool = jax.jit(functools.partial(layers.mean_pool, num_segments=num_segments))

    def of_rows(params: dict, tokens_BL, segments_BL, positions_BL):
        x_BLD, angles = enter(params["embedding"], tokens_BL, positions_BL)
        sums = []
        for unit in params["unit"]:
            x_BLD, of_unit = run_unit(unit, x_BLD, segments_BL, angles)
            sums.append(of_unit)
        return pool(x_BLD, segments_BL), jax.tree.map(lambda *of_units: jnp.stack(of_units), *sums)

    def embed(params: dict, rows: dict):
        found = [of_rows(params, *of) for of in zip(*(rows[name] for name in objectives.ROWS), strict=True)]
        pooled, sums = zip(*found, strict=True)
        return jnp.stack(pooled), jax.tree.map(lambda *of_rows: sum(of_rows), *sums)

    return embed
