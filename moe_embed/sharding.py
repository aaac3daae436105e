"""The mesh, the one typed rule table, and collectives spelled by letter.

The only file that names a mesh axis. An array's name ends in its dims (`w_up_EDF`, `x_BLD`); a rule per letter says
over which mesh axes that dim is split, as an activation, as a parameter and as optimiser state. Whatever the table
does not know is an error that names parameter, shape, rule and mesh: nothing is ever replicated in silence.
"""

import collections
import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moe_embed import config as config_lib

AXES = ("data", "expert")
Column = Literal["activation", "parameter", "optimizer"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """Mesh axes that split a dim, by what kind of array it stands in.

    `optimizer` is what a run keeps between steps: master parameters and moments. `parameter` is what a device computes with.
    """

    activation: tuple[str, ...] = ()
    parameter: tuple[str, ...] = ()
    optimizer: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
    """One field per letter of the legend (moe_embed/__init__.py)."""

    B: Rule = Rule(activation=AXES)
    N: Rule = Rule(activation=AXES)
    E: Rule = Rule(activation=("expert",), parameter=("expert",), optimizer=("expert",))
    D: Rule = Rule(optimizer=("data",))  # ZeRO (arXiv 1910.02054)
    A: Rule = Rule()
    C: Rule = Rule()
    F: Rule = Rule()
    G: Rule = Rule()
    H: Rule = Rule()
    J: Rule = Rule()
    K: Rule = Rule()
    L: Rule = Rule()
    M: Rule = Rule()
    P: Rule = Rule()
    R: Rule = Rule()
    S: Rule = Rule()
    T: Rule = Rule()
    U: Rule = Rule()
    V: Rule = Rule()
    X: Rule = Rule()
    Y: Rule = Rule()
    Z: Rule = Rule()


RULES = Rules()
EVERYWHERE = PartitionSpec()  # one value, the same on every device: losses and metrics


def make_mesh(config: config_lib.Mesh, *, devices=None) -> jax.sharding.Mesh:
    """A mesh (data, expert) over `devices` (all of them by default); -1 takes what is left. UserError if it does not fit."""
    devices = jax.devices() if devices is None else list(devices)
    arranged = _arranged(devices, _sizes(config, len(devices)))
    # Auto axis types: Explicit, the default, refuses gathers, sorts and cumsums over a sharded dim.
    return jax.sharding.Mesh(arranged, AXES, axis_types=(AxisType.Auto,) * 2)


def _arranged(devices: list, sizes: tuple[int, int]) -> np.ndarray:
    """The devices as an array [data, expert] in which neighbours are near each other, and slices stand along data.

    A slice is what a fast network joins: a TPU slice, or a host of GPUs. jax.make_mesh refuses several of them, and on TPUs
    other than v5e sizes that are no whole axes of the slice.
    """
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    data, expert = sizes
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    if data % len(slices) == 0 and len(set(slices.values())) == 1:
        within = data // len(slices), expert
        return mesh_utils.create_hybrid_device_mesh(within, (len(slices), 1), devices, allow_split_physical_axes=True)
    in_order = sorted(
        devices, key=lambda device: (device.slice_index, device.id)
    )  # experts over several slices, or uneven ones
    return np.array(in_order).reshape(sizes)


def imagine_mesh(config: config_lib.Mesh, *, num_devices: int) -> jax.sharding.AbstractMesh:
    """The mesh that `make_mesh` would make of so many devices, without any: shardings can be read off, nothing can run."""
    return jax.sharding.AbstractMesh(_sizes(config, num_devices), AXES, axis_types=(AxisType.Auto,) * 2)


def _sizes(config: config_lib.Mesh, num_devices: int) -> tuple[int, ...]:
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if num_devices % fixed:
        raise config_lib.UserError(
            f"config.mesh is data={config.data} x expert={config.expert}, which does not divide the "
            f"{num_devices} devices; choose sizes whose product is {num_devices}, or -1 for one of them."
        )
    sizes = {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}
    count = math.prod(sizes.values())
    if count != num_devices:
        raise config_lib.UserError(
            f"config.mesh uses {count} of {num_devices} devices (data={sizes['data']} x expert={sizes['expert']}); "
            f"set config.mesh.data=-1 to use them all, or hide the others."
        )
    return tuple(sizes.values())


def letters(name: str) -> str:
    """The dims at the end of an array's name: "w_up_EDF" -> "EDF"; "loss" (a scalar) -> "". ValueError if unknown."""
    _, underscore, dims = name.rpartition("_")
    if not underscore or not dims.isupper():
        raise ValueError(f"the array {name!r} must end in its dims, as in w_up_EDF")
    unknown = [letter for letter in dims if not hasattr(RULES, letter)]
    if unknown:
        raise ValueError(f"the array {name!r} ends in {dims}, but {unknown[0]} is no letter of the legend")
    return dims


def spec(name: str, *, column: Column, shape: tuple[int, ...] | None = None, mesh=None) -> PartitionSpec:
    """The partition of the array called `name`. With `shape` and `mesh`, also checks rank and divisibility.

    ValueError names array, shape, rule and mesh for an unknown letter, a wrong rank, two letters on one mesh axis, or
    a dim that its mesh axes do not divide.
    """
    dims = letters(name)
    entries = [getattr(getattr(RULES, letter), column) for letter in dims]
    used = [axis for entry in entries for axis in entry]
    if len(set(used)) != len(used):
        raise ValueError(f"{name}: two of its dims are split over one mesh axis ({column} rules {entries})")
    if shape is not None:
        if len(shape) != len(dims):
            raise ValueError(f"{name} has shape {shape}, but its name says {len(dims)} dims")
        for letter, size, entry in zip(dims, shape, entries, strict=True):
            parts = math.prod(mesh.shape[axis] for axis in entry)
            if size % parts:
                raise ValueError(
                    f"{name} has shape {shape}: dim {letter}={size} is not divisible by {parts}, the size of "
                    f"{' x '.join(entry)} in the mesh {dict(mesh.shape)} ({column} rule)"
                )
    return PartitionSpec(*(entry or None for entry in entries))


def specs(tree, *, column: Column, mesh=None):
    """A PartitionSpec for each array of a nested dict, from the last name on its path; scalars are whole everywhere.

    With `mesh`, checked against the arrays' shapes.
    """

    def of(path, leaf):
        if leaf.ndim == 0:
            return PartitionSpec()
        return spec(_last_name(path), column=column, shape=leaf.shape if mesh else None, mesh=mesh)

    return jax.tree.map_with_path(of, tree)


def shardings(tree, *, column: Column, mesh):
    """A NamedSharding for each array of a nested dict of named arrays (optimiser states hold such dicts)."""
    partition = specs(tree, column=column, mesh=mesh)
    return jax.tree.map(lambda s: NamedSharding(mesh, s), partition, is_leaf=lambda s: isinstance(s, PartitionSpec))


def put_batch(batch: dict[str, np.ndarray], *, mesh) -> dict[str, jax.Array]:
    """A global batch (named host arrays, the same on every process) -> global arrays split over the mesh.

    Each process puts the parts of its own devices. What is in them does not depend on how many processes there are.
    """

    def put(name: str, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, spec(name, column="activation"))
        return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])

    return {name: put(name, array) for name, array in batch.items()}


def own_parts(mesh) -> list[int]:
    """Which parts of a batch are this process's, of as many as the mesh has devices: those of its own devices."""
    return [i for i, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]


def put_parts(batch: dict[str, np.ndarray], *, mesh) -> dict[str, jax.Array]:
    """`put_batch` where a process has made its `own_parts` alone, side by side along B or N in that order."""
    own = own_parts(mesh)

    def put(name: str, array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, spec(name, column="activation"))
        split = next(i for i, entry in enumerate(sharding.spec) if entry)
        size = array.shape[split] // len(own)  # along the dim that is split, of one part
        shape = (*array.shape[:split], size * mesh.size, *array.shape[split + 1 :])

        def of(place: tuple[slice, ...]) -> np.ndarray:
            part = own.index((place[split].start or 0) // size)
            return array[(slice(None),) * split + (slice(part * size, (part + 1) * size),)]

        return jax.make_array_from_callback(shape, sharding, of)

    return {name: put(name, array) for name, array in batch.items()}


def fetch(x: jax.Array) -> np.ndarray:
    """A whole array on the host, of every process: what others hold is gathered, so all must ask for it in step."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return multihost_utils.process_allgather(x, tiled=True)


def _last_name(path) -> str:
    names = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
    if not names:
        raise ValueError(f"the array at {jax.tree_util.keystr(path)} has no name to read its dims from")
    return names[-1]


def on_each_device(f, *, mesh, in_specs, out_specs):
    """shard_map over both axes: `f` sees this device's parts, and talks through the collectives below.

    Take gradients outside of it. Those of an argument that is whole everywhere are then partial sums inside, and summed over
    devices once, at its door: after every loop, not in it. That, and the results that are said to be the same everywhere, is
    what `check_vma` would track by types; it is off because the kernels that come with jax (megablox, splash, flash attention)
    do not carry such types, and the tests compare meshes instead.
    """
    return jax.shard_map(f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


# Inside shard_map arrays are local, and collectives are asked for by letter. Outside of one (a notebook, one device)
# there is nothing to talk to and each of these is the identity.


def _axes(letter: str) -> tuple[str, ...]:
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in getattr(RULES, letter).activation if axis in manual)


def _split(letter: str) -> tuple[str, ...]:
    sizes = jax.sharding.get_abstract_mesh().shape
    return tuple(axis for axis in _axes(letter) if sizes[axis] > 1)


def gather(x: jax.Array, letter: str) -> jax.Array:
    """Concatenate every device's rows along dim 0, over the mesh axes that split `letter`."""
    axes = _split(letter)
    return jax.lax.all_gather(x, axes, tiled=True) if axes else x


def scatter(x: jax.Array, letter: str) -> jax.Array:
    """Sum over devices, each keeping its own rows of dim 0: the inverse of `gather` for partial results."""
    axes = _split(letter)
    return jax.lax.psum_scatter(x, axes, tiled=True) if axes else x


def reduce(tree, letter: str):
    """Sum over the devices that split `letter`."""
    axes = _axes(letter)
    return jax.lax.psum(tree, axes) if axes else tree


def size(letter: str) -> int:
    """Over how many devices `letter` is split."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes[axis] for axis in _axes(letter))


def pass_on(tree, letter: str):
    """Every device's arrays to the next one of those that split `letter`, the last one's to the first."""
    axes = _split(letter)
    if not axes:
        return tree
    count = size(letter)
    send = lambda x: jax.lax.ppermute(x, axes, [(i, (i + 1) % count) for i in range(count)])  # noqa: E731

    def together(*leaves):
        """In one collective, as bytes: XLA's CPU client may start independent ones in another order on each device."""
        as_bytes = [jax.lax.bitcast_convert_type(leaf, jnp.uint8) for leaf in leaves]
        sent = send(jnp.concatenate([x.reshape(-1) for x in as_bytes]))
        parts = jnp.split(sent, np.cumsum([x.size for x in as_bytes])[:-1])
        return [jax.lax.bitcast_convert_type(part.reshape(x.shape), leaf.dtype)
                for part, x, leaf in zip(parts, as_bytes, leaves, strict=True)]  # fmt: skip

    leaves, structure = jax.tree.flatten(tree)
    apart = lambda *leaves: [send(leaf) for leaf in leaves]  # noqa: E731
    return jax.tree.unflatten(structure, jax.lax.platform_dependent(*leaves, cpu=together, default=apart))


def index(letter: str):
    """Which part of `letter` this device holds, counted from 0."""
    axes = _axes(letter)
    return jax.lax.axis_index(axes) if axes else 0


def assemble(masters: dict) -> dict:
    """This device's part of the master parameters (column "optimizer") -> what the encoder takes (column "parameter").

    Called once, before any loop. Its transpose sums the gradients over devices and leaves each with its own part: half the
    bytes of a sum that all keep, and the optimiser needs no more (ZeRO, arXiv 1910.02054).
    """

    def whole(path, leaf):
        for dim, letter in enumerate(letters(_last_name(path))):
            rule, sizes = getattr(RULES, letter), jax.sharding.get_abstract_mesh().shape
            axes = tuple(axis for axis in rule.optimizer if axis not in rule.parameter and sizes[axis] > 1)
            leaf = jax.lax.all_gather(leaf, axes, axis=dim, tiled=True) if axes else leaf
        return leaf

    return jax.tree.map_with_path(whole, masters)
