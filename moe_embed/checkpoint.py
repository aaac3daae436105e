"""Checkpoints that are verified: Orbax behind one thin door, and a digest of every file beside each step.

Orbax restores a file with flipped bits without a word (measured: 160 of 160), and believes an empty step directory. So a
step counts only with its manifest, which is written last, in one move, and carries its own digest; restoring checks every
file and takes the newest step that verifies, naming what it passed over. Saving beside the training: saving.py.
"""

import hashlib
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Sequence

import jax
import orbax.checkpoint as ocp
from etils import epath

from moe_embed import bucket, cluster, stored
from moe_embed.config import UserError
from moe_embed.fields import first_line

MANIFEST = "digests.json"
# Of the manifest. Its digest is that of all it says otherwise, in every schema to come: else a newer one could not be told
# from a damaged one. Manifests without a number are from before there was one.
SCHEMA = 1
WRITING = ".saving"  # behind a step's number until it has its manifest
DELETING = ".deleting"  # while it goes: what is half deleted is no step
STRAY = re.compile(r"\d+(\.saving|\.deleting)?(\.orbax-checkpoint-tmp.*)?")  # with one of them: it was cut off
OF_A_PROCESS = re.compile(r"(?:^|/)ocdbt\.process_(\d+)/")  # Orbax's folder for what one process writes


def save(folder: pathlib.Path, state: dict, *, facts: dict, keep: int) -> pathlib.Path:
    """Write state {"step", "params"[, "optimizer"]} to folder/<step>, its manifest last; then `drop` steps before it.

    `facts` (plain JSON: the data fingerprint) is kept in the manifest. Returns the step's directory. Of several processes all
    call this, and Orbax writes what each has to one folder; the rest is process 0's, and nobody goes on before it is done.
    """
    path = prepare(folder, int(state["step"]))
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=to_save(state))
    rows = cluster.gather(digests(path))
    cluster.on_first(lambda: finish(path, rows, arrays=arrays_of(state), facts=facts))
    cluster.on_first(lambda: drop(folder, int(state["step"]), keep=keep))
    return path.with_suffix("")


def prepare(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where to write a step; an earlier try is removed."""
    if bucket.is_remote(folder):  # nothing can be renamed there: the step is written in its place, under a mark
        path = folder / str(step)
        cluster.on_first(lambda: _remove_marked(path))
    else:
        path = folder.absolute() / f"{step}{WRITING}"
        cluster.on_first(lambda: bucket.remove(path))
    return path


def to_save(state: dict) -> ocp.args.Composite:
    """What Orbax is told of a state. A model folder has no optimiser: there is nothing to continue."""
    return ocp.args.Composite(**{name: ocp.args.StandardSave(item) for name, item in _items(state).items()})


def arrays_of(state: dict) -> dict[str, list]:
    """Name -> [dtype, shape] of all that is saved of a state."""
    return _arrays(_items(state))


def _arrays(items: dict) -> dict[str, list]:
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")  # noqa: E731
    return {name(p): [str(x.dtype), list(x.shape)] for p, x in jax.tree_util.tree_leaves_with_path(items)}


def num_bytes(state: dict) -> int:
    """What a step of this state takes on disk, but for Orbax's index and our manifest."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(_items(state)))


def digests(path: pathlib.Path) -> dict[str, str]:
    """Of the files of a step that this process wrote, as they are read back: the page cache may still hold them; a bucket is asked."""
    me = jax.process_index()
    writer = lambda name: int(found[1]) if (found := OF_A_PROCESS.search(name)) else 0  # noqa: E731
    return {name: _digest(path / name) for name in bucket.names(path) if writer(name) == me}


def finish(path: pathlib.Path, rows: Sequence[dict], *, arrays: dict, facts: dict) -> None:
    """Process 0's: all processes' digests become the manifest, and with it what was written takes its place as a step."""
    files = {name: digest for row in rows for name, digest in row.items()}
    final = path.with_suffix("")
    _write_manifest(path, {"schema": SCHEMA, "step": int(final.name), "facts": facts, "arrays": arrays, "files": files})
    if bucket.is_remote(path):
        bucket.remove(_mark(path))
    else:
        bucket.remove(final)  # it does not verify, or the run would have begun with it
        path.rename(final)


def drop(folder: pathlib.Path, step: int, *, keep: int) -> None:
    """Of the steps up to `step`, which was just written, the newest `keep` that verify stay.

    Those after it were passed over when the run began, or it would have begun with them, and count for nothing.
    """
    contents = not bucket.is_remote(folder)  # gigabytes over the network at each save, of objects that nothing changes
    for old in [s for s in steps(folder) if s <= step and not problem(folder, s, contents=contents)][:-keep]:
        _delete(folder / str(old))


def _delete(path: pathlib.Path) -> None:
    """Delete a step such that no part of it is ever one."""
    if bucket.is_remote(path):
        _remove_marked(path)
        bucket.remove(_mark(path))
    else:
        bucket.remove(path.rename(path.with_name(path.name + DELETING)))


def _mark(path: epath.Path) -> epath.Path:
    return path.with_name(path.name + WRITING)


def _remove_marked(path: epath.Path) -> None:
    """Of a step in a bucket, first its manifest and then the rest; a mark beside it says that this is meant."""
    bucket.write(_mark(path), b"")
    bucket.remove(path, first=MANIFEST)


def clean(folder: pathlib.Path) -> None:
    """Remove what saves and deletions that were cut off left: nothing ever reads it."""
    if bucket.is_remote(folder):
        finished = steps(folder)
        for name in bucket.names(folder):
            if (step := name.removesuffix(WRITING)).isdigit() and name != step:
                if int(step) not in finished:
                    bucket.remove(folder / step)
                bucket.remove(folder / name)
        return
    for path in folder.iterdir() if folder.is_dir() else ():
        if STRAY.fullmatch(path.name) and not path.name.isdigit():
            shutil.rmtree(path)


def _items(state: dict) -> dict:
    items = {"params": state["params"]}
    if "optimizer" in state:
        items["training"] = {"step": state["step"], "optimizer": state["optimizer"]}
    return items


def steps(folder: pathlib.Path) -> list[int]:
    """The steps that have a directory, verified or not, oldest first; in a bucket no marked ones without a manifest."""
    if bucket.is_remote(folder):
        there = set(bucket.names(folder))
        found = {name.partition("/")[0] for name in there if "/" in name}
        marked = {step for step in found if step + WRITING in there and f"{step}/{MANIFEST}" not in there}
        return sorted(int(step) for step in found - marked if step.isdigit())
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def problem(folder: pathlib.Path, step: int, *, contents: bool = True) -> str:
    """Why a step does not verify, in a few words; "" if it does. Without `contents` its files are not read, only counted."""
    path = folder / str(step)
    try:
        manifest = stored.read_json(path / MANIFEST)
        files = manifest["files"]
        if manifest["digest"] != _digest_of(manifest):
            return f"digest mismatch in {path / MANIFEST}"
    except FileNotFoundError:
        return f"{path} has no manifest: it is unfinished, or none of ours"
    except NotADirectoryError:
        return f"{path} is no directory"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"digest mismatch in {path / MANIFEST}"
    if "schema" in manifest and isinstance(manifest["schema"], int) and manifest["schema"] > SCHEMA:
        raise UserError(
            f"{path} was written by a newer moe_embed (schema {manifest['schema']}; this one reads {SCHEMA}); install that one."
        )
    if not _is_ours(manifest):
        return f"{path / MANIFEST} is none of ours"
    if "step" in manifest and manifest["step"] != step:
        return f"{path} is a copy of step {manifest['step']}"
    present = {name for name in bucket.names(path) if name.rpartition("/")[2] != MANIFEST}
    if bucket.is_remote(path):  # more may lie there: what a save that failed still had under way. Nothing refers to it
        present &= set(files)
    if present != set(files):
        return f"{path} lacks or has too many files: {', '.join(sorted(present ^ set(files))[:3])}"
    for name, digest in files.items() if contents else ():
        if _digest(path / name) != digest:
            return f"digest mismatch in {path / name}"
    return ""


def files_of(folder: pathlib.Path, step: int) -> list[str]:
    """The files that make a step, its manifest among them; none where that cannot be read."""
    try:
        return [MANIFEST, *stored.read_json(folder / str(step) / MANIFEST)["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _is_ours(manifest: dict) -> bool:
    """Whether a manifest's parts are of the kinds that are read here: a digest can be right in what somebody else made up."""
    arrays = manifest["arrays"] if "arrays" in manifest else {}
    return (
        all(isinstance(part, dict) for part in (manifest["files"], manifest["facts"], arrays))
        and all(isinstance(digest, str) for digest in manifest["files"].values())
        and all(isinstance(array, list) and len(array) == 2 for array in arrays.values())
        and all(isinstance(manifest[key], int) for key in ("schema", "step") if key in manifest)
    )


def newest_verified(folder: pathlib.Path, *, say: Callable[[str], None], strict: bool = False) -> int | None:
    """The newest step that verifies, None if there is no step at all. Says what it passed over; `strict` passes over nothing.

    Raises UserError if there are steps and none verifies: nothing is started afresh in silence. Of several processes the first
    looks, and all are told: they restore one step.
    """
    return cluster.on_first(lambda: _newest_verified(folder, say, strict))


def _newest_verified(folder: pathlib.Path, say: Callable[[str], None], strict: bool) -> int | None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; checkpoints need a folder there.")
    problems = []
    for step in reversed(steps(folder)):
        what = problem(folder, step)
        if not what:
            return step
        if strict:
            raise UserError(
                f"checkpoint {step} does not verify: {what}; without --strict_restore an older one is taken."
            )
        problems.append(what)
        say(f"checkpoint {step} is passed over: {what}.")
    if problems:
        raise UserError(
            f"{folder} has {len(problems)} checkpoints and none verifies ({problems[0]}); delete it to start over."
        )
    return None


def facts(folder: pathlib.Path, step: int) -> dict:
    """What `save` was told to keep beside a step."""
    return stored.read_json(folder / str(step) / MANIFEST)["facts"]


def restore(folder: pathlib.Path, step: int, *, abstract_state: dict) -> dict:
    """The whole state of a verified step, laid out as `abstract_state` (program.build) says: any mesh."""
    restored = _restore(folder / str(step), _items(abstract_state))
    return {"params": restored["params"], **restored["training"]}


def restore_params(folder: pathlib.Path, step: int, *, abstract_params: dict) -> dict:
    """The parameters alone."""
    return _restore(folder / str(step), {"params": abstract_params})["params"]


def _restore(path: pathlib.Path, wanted: dict) -> dict:
    _compare(path, wanted)
    items = {name: ocp.args.StandardRestore(item) for name, item in wanted.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(
                path if bucket.is_remote(path) else path.absolute(), args=ocp.args.Composite(**items)
            )
        except ValueError as error:
            raise UserError(
                f"{path} does not hold the arrays that the workdir's config asks for: {first_line(error)}"
            ) from error


def _compare(path: pathlib.Path, wanted: dict) -> None:
    """UserError where a step has other arrays than are wanted; a change of dtype, which Orbax makes in silence, is said."""
    manifest = stored.read_json(path / MANIFEST)
    if "arrays" not in manifest:  # from before there was a schema: Orbax compares shapes
        return
    saved = {name: array for name, array in manifest["arrays"].items() if name.split("/")[0] in wanted}
    asked = _arrays(wanted)
    faults = [f"{name} is not in it" for name in asked if name not in saved]
    faults += [f"it has {name}, which is not asked for" for name in saved if name not in asked]
    both = [name for name in asked if name in saved]
    faults += [f"{n} is {saved[n][1]}, not {asked[n][1]}" for n in both if saved[n][1] != asked[n][1]]
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise UserError(
            f"{path} does not hold the arrays that the workdir's config asks for: {'; '.join(faults[:3])}{more}."
        )
    if changed := [n for n in both if saved[n][0] != asked[n][0]]:
        first = changed[0]
        print(
            f"note        {len(changed)} arrays of {path} change dtype: {first} from {saved[first][0]} to {asked[first][0]}"
        )


def _write_manifest(path: pathlib.Path, manifest: dict) -> None:
    stored.write_json(path / MANIFEST, manifest | {"digest": _digest_of(manifest)})


def _digest(path: pathlib.Path) -> str:
    with bucket.errors_of(path), path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _digest_of(manifest: dict) -> str:
    says = {name: value for name, value in manifest.items() if name != "digest"}
    if "schema" not in manifest:
        says = [manifest["files"], manifest["facts"]]
    return hashlib.blake2b(json.dumps(says, sort_keys=True).encode()).hexdigest()[:32]
