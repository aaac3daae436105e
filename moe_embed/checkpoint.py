"""Checkpoints that are verified: Orbax behind one thin door, and a digest of every file beside each step.

Orbax restores a file with flipped bits without a word (measured: 160 of 160), and believes an empty step directory. So a
step counts only with its manifest, which is written last, in one move, and carries its own digest; restoring checks every
file and takes the newest step that verifies, naming what it passed over.
"""

import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable

import orbax.checkpoint as ocp

from moe_embed import cluster
from moe_embed.config import UserError

MANIFEST = "digests.json"


def save(folder: pathlib.Path, state: dict, *, facts: dict, keep: int) -> pathlib.Path:
    """Write state {"step", "params"[, "optimizer"]} to folder/<step>, its manifest last; then drop all but `keep` good ones.

    `facts` (plain JSON: the data fingerprint) is kept in the manifest. Returns the step's directory. Of several processes all
    call this, and Orbax writes what each has to one folder; the rest is process 0's, and nobody goes on before it is done.
    """
    step = int(state["step"])
    path = folder.absolute() / str(step)
    cluster.on_first(lambda: _clear(path))
    items = {"params": ocp.args.StandardSave(state["params"])}
    if "optimizer" in state:  # a model folder has none: there is nothing to continue
        items["training"] = ocp.args.StandardSave({"step": state["step"], "optimizer": state["optimizer"]})
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.Composite(**items))
    cluster.on_first(lambda: _finish(path, facts, keep=keep))
    return path


def _clear(path: pathlib.Path) -> None:
    if path.is_dir():  # unverified, or it would have been resumed from
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def _finish(path: pathlib.Path, facts: dict, *, keep: int) -> None:
    """The manifest, of all processes' files; then retention."""
    _write_manifest(path, facts)
    folder = path.parent
    for old in [s for s in steps(folder) if not problem(folder, s)][:-keep]:
        shutil.rmtree(folder / str(old))


def steps(folder: pathlib.Path) -> list[int]:
    """The steps that have a directory, verified or not, oldest first."""
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit()) if folder.is_dir() else []


def problem(folder: pathlib.Path, step: int) -> str:
    """Why a step does not verify, in a few words; "" if it does."""
    path = folder / str(step)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"]
        if manifest["digest"] != _digest_of_files(files, manifest["facts"]):
            return f"digest mismatch in {path / MANIFEST}"
    except FileNotFoundError:
        return f"{path} has no manifest: the save did not finish"
    except NotADirectoryError:
        return f"{path} is no directory"
    except (ValueError, KeyError, TypeError):
        return f"digest mismatch in {path / MANIFEST}"
    present = {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != MANIFEST}
    if present != set(files):
        return f"{path} lacks or has too many files: {', '.join(sorted(present ^ set(files))[:3])}"
    for name, digest in files.items():
        if _digest(path / name) != digest:
            return f"digest mismatch in {path / name}"
    return ""


def newest_verified(folder: pathlib.Path, *, say: Callable[[str], None]) -> int | None:
    """The newest step that verifies, None if there is no step at all. Says what it passed over.

    Raises UserError if there are steps and none verifies: nothing is started afresh in silence. Of several processes the first
    looks, and all are told: they restore one step.
    """
    return cluster.on_first(lambda: _newest_verified(folder, say))


def _newest_verified(folder: pathlib.Path, say: Callable[[str], None]) -> int | None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; checkpoints need a folder there.")
    problems = []
    for step in reversed(steps(folder)):
        what = problem(folder, step)
        if not what:
            return step
        problems.append(what)
        say(f"checkpoint {step} is passed over: {what}.")
    if problems:
        raise UserError(
            f"{folder} has {len(problems)} checkpoints and none verifies ({problems[0]}); delete it to start over."
        )
    return None


def facts(folder: pathlib.Path, step: int) -> dict:
    """What `save` was told to keep beside a step."""
    return json.loads((folder / str(step) / MANIFEST).read_text())["facts"]


def restore(folder: pathlib.Path, step: int, *, abstract_state: dict) -> dict:
    """The whole state of a verified step, laid out as `abstract_state` (program.build) says: any mesh."""
    parts = {"params": abstract_state["params"], "training": {k: abstract_state[k] for k in ("step", "optimizer")}}
    restored = _restore(folder / str(step), {k: ocp.args.StandardRestore(v) for k, v in parts.items()})
    return {"params": restored["params"], **restored["training"]}


def restore_params(folder: pathlib.Path, step: int, *, abstract_params: dict) -> dict:
    """The parameters alone."""
    return _restore(folder / str(step), {"params": ocp.args.StandardRestore(abstract_params)})["params"]


def _restore(path: pathlib.Path, items: dict) -> dict:
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(path.absolute(), args=ocp.args.Composite(**items))
        except ValueError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path} does not hold the arrays that the workdir's config asks for: {reason}") from error


def _write_manifest(path: pathlib.Path, facts: dict) -> None:
    files = {str(p.relative_to(path)): _digest(p) for p in sorted(path.rglob("*")) if p.is_file()}
    manifest = {"files": files, "facts": facts, "digest": _digest_of_files(files, facts)}
    partial = path / (MANIFEST + ".partial")
    with open(partial, "w") as file:
        json.dump(manifest, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path / MANIFEST)


def _digest(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()[:32]


def _digest_of_files(files: dict, facts: dict) -> str:
    return hashlib.blake2b(json.dumps([files, facts], sort_keys=True).encode()).hexdigest()[:32]
