"""Any --model -> a Model: parameters, tokenizer, prompts, and `encode`. What embed, evaluate, export and notebooks use.

A model is a workdir (its newest verified step), a model folder (a workdir with step 0 and no optimiser, as import_hf,
upcycle and soup write it) or a folder in Hugging Face layout, as export writes it.
"""

import dataclasses
import functools
import hashlib
import itertools
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
import tqdm

from moe_embed import bucket, checkpoint, hf_folder, program, sharding, stored
from moe_embed import config as config_lib
from moe_embed.config import UserError
from moe_embed.data import packing, tables
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.model import encoder as encoder_lib

# {"config", "prompts", "versions"}; in a model folder "encoder", "moe", "head" for "config"
DESCRIPTION = "workdir.json"
TEXTS_PER_ROW = 16
ROW_TOKENS = 4096  # tokens a device encodes at once
MIN_ROW = 32
CHUNK = 8_192  # texts a device is given at once: so many are tokenised and sorted by length together
SPARE = 128  # tokens of padding in rows that only fill up a power of two; on two cores as long as another call takes


@dataclasses.dataclass(frozen=True)
class Model:
    """An encoder ready to use. `params` are named arrays on `mesh`."""

    encoder: config_lib.Encoder
    moe: config_lib.Moe
    params: dict
    tokenizer: tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer
    prompts: dict[str, str]
    mesh: jax.sharding.Mesh
    origin: str

    def encode(
        self,
        texts: Sequence[str],
        task: str | None = None,
        dim: int | None = None,
        max_length: int | None = None,
        *,
        progress: bool = False,
    ) -> np.ndarray:
        """Texts -> float32 [N, dim], unit norm, row i for text i.

        Args:
          task: the name of a prompt to put in front ("query", "document", ...); None for no prompt.
          dim: keep the first `dim` numbers and normalise again (Matryoshka, arXiv 2205.13147); None keeps all.
          max_length: tokens read of a text; None is the model's own `max_seq_length`.

        Raises UserError for an unknown task, an empty text, or a dim the model does not have.
        """
        return self.encode_with_sums(texts, task, dim, max_length, progress=progress)[0]

    def encode_with_sums(self, texts, task=None, dim=None, max_length=None, *, progress=False):
        """`encode`, and how often each expert was chosen over all texts: float32 [R, E] (None for a dense model)."""
        prompt, dim, cap = self.options(task, dim, max_length)
        texts, choices_RE = list(_checked(texts)), None
        out_ND, done = np.zeros((len(texts), dim), np.float32), 0
        with tqdm.tqdm(total=len(texts), unit="text", disable=not progress, dynamic_ncols=True) as bar:
            for x_ND, chosen_RE in self._encode_chunks(texts, prompt, dim, cap, bar):
                out_ND[done : done + len(x_ND)] = x_ND
                done += len(x_ND)
                if chosen_RE is not None:
                    choices_RE = chosen_RE + (0 if choices_RE is None else choices_RE)
        return out_ND, choices_RE

    def encode_stream(
        self,
        texts: Iterable[str],
        task: str | None = None,
        dim: int | None = None,
        max_length: int | None = None,
        *,
        bar: tqdm.tqdm,
    ) -> Iterator[np.ndarray]:
        """`encode`, bit for bit, of texts as they come: float32 [n, dim] for each CHUNK of texts a device, in order.

        Only one chunk is in memory. `bar` is told of every text.
        """
        for x_ND, _ in self._encode_chunks(_checked(texts), *self.options(task, dim, max_length), bar):
            yield x_ND

    def _encode_chunks(self, texts, prompt: str, dim: int, cap: int, bar: tqdm.tqdm):
        """(float32 [n, dim], how often each expert was chosen [R, E]) for each chunk of checked texts."""
        embed = program.build_embed(self.encoder, self.moe, self.mesh, num_segments=TEXTS_PER_ROW)
        texts = iter(texts)
        while some := list(itertools.islice(texts, CHUNK * self.mesh.size)):
            ids = self.tokenizer.encode(some, prompt=prompt, max_length=cap)[0]
            out_ND, choices_RE = np.zeros((len(ids), dim), np.float32), None
            for members, rows, packed in _rows(ids, num_devices=self.mesh.size):
                pooled_MBSD, sums = embed(self._laid_out, sharding.put_batch(rows, mesh=self.mesh))
                vector_ND = sharding.fetch(pooled_MBSD)[0, packed.row_N, packed.segment_N, :dim]
                out_ND[members] = vector_ND / np.maximum(np.linalg.norm(vector_ND, axis=-1, keepdims=True), 1e-12)
                if sums is not None:
                    choices_RE = np.asarray(sums.choices_E) + (0 if choices_RE is None else choices_RE)
                bar.update(len(members))
            yield out_ND, choices_RE

    @functools.cached_property
    def _laid_out(self) -> dict:
        return program.lay_out(self.params, self.mesh)

    def prompt(self, name: str) -> str | None:
        """`name` if the model has a prompt of that name, else None: what to give `encode` as its task."""
        return name if name in self.prompts else None

    @functools.cached_property
    def digest(self) -> str:
        """Of everything a vector depends on: parameters, shape, prompts, tokenizer."""
        total = hashlib.blake2b(repr((self.encoder, self.moe, self.prompts)).encode(), digest_size=16)
        total.update(self.tokenizer.model_bytes)
        for path, leaf in jax.tree_util.tree_leaves_with_path(self.params):
            total.update(jax.tree_util.keystr(path).encode() + np.asarray(leaf).tobytes())
        return total.hexdigest()

    def options(self, task: str | None, dim: int | None, max_length: int | None) -> tuple[str, int, int]:
        """What encode's options come to: (prompt, dim, tokens read of a text). UserError for one the model does not have."""
        dim = self.encoder.dim if dim is None else dim
        if not 1 <= dim <= self.encoder.dim:
            raise UserError(f"dim={dim} is not between 1 and the model's {self.encoder.dim}.")
        if task is not None and task not in self.prompts:
            raise UserError(f"{self.origin} has no prompt {task!r}; it has {', '.join(self.prompts) or 'none'}.")
        cap = self.encoder.max_seq_length if max_length is None else min(max_length, self.encoder.max_seq_length)
        if cap < 3:
            raise UserError(f"max_length={max_length} leaves no room for a text between <s> and </s>; give 3 or more.")
        return "" if task is None else self.prompts[task], dim, cap


def _checked(texts: Iterable[str]) -> Iterator[str]:
    if isinstance(texts, str):
        raise UserError("encode takes a list of texts; put the one text in a list.")
    for i, text in enumerate(texts):
        if not tables.is_text(text):
            raise UserError(f"text {i} is empty or no text: {text!r:.60}.")
        yield text


def _rows(ids: list[np.ndarray], *, num_devices: int):
    """Texts in order of length -> (indices of texts, packed rows, where they went), in a handful of shapes.

    A row is a power of two long, at least twice its longest text where there is more to put into it; the rows of a call are
    a power of two in number, or the next multiple of the devices.
    """
    length = np.array([len(text) for text in ids], np.int64)
    order = np.argsort(-length, kind="stable")
    while len(order):
        row_length = max(MIN_ROW, power_of_two(min(2 * length[order[0]], length[order].sum())))
        max_rows = most_rows(row_length, num_devices=num_devices)
        fill = np.cumsum(length[order[: max_rows * TEXTS_PER_ROW]])
        count = max(1, np.searchsorted(fill, max_rows * row_length, side="right"))
        some = order[:count]
        packed = packing.pack(length[some], row_length=row_length, texts_per_row=TEXTS_PER_ROW)
        num_rows = power_of_two(packed.num_rows)
        if (num_rows - packed.num_rows) * row_length > SPARE:
            num_rows //= 2  # the shortest wait for a call with fewer tokens left over
        num_rows = rows_of_call(num_rows, row_length=row_length, num_devices=num_devices)
        fits = packed.row_N < num_rows  # what opened another row waits for the next call
        members, order = some[fits], np.concatenate([some[~fits], order[count:]])
        packed = packing.Packed(
            packed.row_N[fits], packed.segment_N[fits], packed.start_N[fits], min(packed.num_rows, num_rows)
        )
        rows = packing.fill_rows([ids[i] for i in members], packed, num_rows=num_rows, row_length=row_length)
        yield members, {name.replace("_BL", "_MBL"): array[None] for name, array in rows.items()}, packed


def power_of_two(n: int) -> int:
    """The next one at or above n, which is 1 or more."""
    return 1 << (int(n) - 1).bit_length()


def most_rows(row_length: int, *, num_devices: int) -> int:
    """Rows of this length that all devices together encode at once."""
    return max(ROW_TOKENS // row_length, 1) * num_devices


def rows_of_call(num_rows: int, *, row_length: int, num_devices: int) -> int:
    """The rows that are laid out for `num_rows` of them, a power of two: as many on each device, and none beyond `most_rows`."""
    most = 1 << most_rows(row_length, num_devices=num_devices).bit_length() - 1  # the power of two at or below
    return -(-min(num_rows, most) // num_devices) * num_devices


def load(path: str | pathlib.Path, *, mesh: jax.sharding.Mesh | None = None, step: int | None = None) -> Model:
    """Open a workdir or a Hugging Face folder, on `mesh` (by default all devices, batch over data).

    `step` is a checkpoint of a workdir, None the newest that verifies. Raises UserError when there is no model at `path`,
    no checkpoint of it verifies, or not this one.
    """
    root = bucket.path_of(path)
    mesh = sharding.make_mesh(config_lib.Mesh()) if mesh is None else mesh
    if bucket.is_file(root / DESCRIPTION):
        return _load_workdir(root, mesh, step)
    if bucket.is_file(root / "config.json") and step is None:
        if bucket.is_remote(root):
            raise UserError(
                f"{root} is a Hugging Face folder in a bucket; gcloud storage cp -r it here, and name the copy."
            )
        return of_folder(hf_folder.read_folder(root), mesh=mesh, origin=str(root))
    raise UserError(no_model(root))


def no_model(root: pathlib.Path) -> str:
    """The sentence on a path without a model."""
    kinds = f"neither a workdir ({DESCRIPTION}) nor a Hugging Face folder (config.json)"
    if bucket.is_remote(root) or root.exists():
        return f"{root} holds no model: {kinds}."
    name = root.as_posix()
    if name.count("/") == 1 and not root.parent.exists():  # OWNER/NAME of the hub
        return (
            f"{root} holds no model: it does not exist here. From the hub: hf download {name} --local-dir={root.name}"
        )
    return f"{root} holds no model: it does not exist."


def of_folder(folder: hf_folder.Folder, *, mesh: jax.sharding.Mesh, origin: str) -> Model:
    """What was read from a Hugging Face folder, on `mesh`."""
    # Of several processes each has read all. device_put would first send every array to every device, to compare them.
    params = jax.tree.map(
        lambda x, s: jax.make_array_from_callback(x.shape, s, lambda part: x[part]),
        folder.params,
        _shardings(folder.params, mesh, origin),
    )
    return Model(folder.encoder, folder.moe, params, folder.tokenizer, folder.prompts, mesh, origin)


def _shardings(params, mesh: jax.sharding.Mesh, origin: str):
    """Where each parameter lies on the mesh. UserError where the mesh does not divide one."""
    try:
        return sharding.shardings(params, column="parameter", mesh=mesh)
    except ValueError as error:
        raise UserError(f"{origin} does not fit the mesh {dict(mesh.shape)}: {error}") from error


@dataclasses.dataclass(frozen=True)
class Description:
    """What workdir.json says. `config` is the run's, None in a model folder (import_hf, upcycle, soup): nothing to continue."""

    encoder: config_lib.Encoder
    moe: config_lib.Moe
    prompts: dict[str, str]
    with_head: bool  # a head of masked language modelling is among the parameters
    config: config_lib.Config | None
    init_from: str | None = None  # the model a run began with; None: fresh parameters
    made_by: str | None = None  # what wrote a model folder, a sentence


def _load_workdir(root: pathlib.Path, mesh: jax.sharding.Mesh, step: int | None) -> Model:
    d = read_description(root)
    if step is None:
        step = checkpoint.newest_verified(root / "checkpoints", say=print)
    elif fault := checkpoint.problem(root / "checkpoints", step):
        raise UserError(f"step {step} of {root} does not verify: {fault}.")
    if step is None:
        raise UserError(f"{root} has no checkpoint yet; train it first: python -m moe_embed.train --workdir={root} ...")
    abstract = jax.eval_shape(lambda: encoder_lib.init(d.encoder, d.moe, key=jax.random.key(0), with_head=d.with_head))
    shardings = _shardings(abstract, mesh, str(root))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings)
    params = checkpoint.restore_params(root / "checkpoints", step, abstract_params=abstract)
    return Model(d.encoder, d.moe, params, find_tokenizer(root), d.prompts, mesh, f"{root} (step {step})")


def read_description(root: pathlib.Path) -> Description:
    """What a workdir or a model folder was written with. UserError if its workdir.json cannot be read."""
    try:
        description = stored.read_json(root / DESCRIPTION)
        prompts = description["prompts"]
        if not isinstance(prompts, dict) or not all(isinstance(text, str) for text in prompts.values()):
            raise ValueError(f"its prompts are {prompts!r}")
        if "config" in description:
            config = config_lib.from_dict(description["config"])
            with_head, init_from = config.loss.objective == "mlm", description.get("init_from")
            return Description(config.encoder, config.moe, prompts, with_head, config, init_from)
        encoder, moe = (config_lib.section(name, description[name]) for name in ("encoder", "moe"))
        if faults := config_lib.model_faults(encoder, moe):
            raise UserError(*faults)
        return Description(encoder, moe, prompts, bool(description["head"]), None, made_by=description.get("made_by"))
    except (ValueError, KeyError, TypeError, AttributeError, UserError) as error:
        raise UserError(
            f"{root / DESCRIPTION} cannot be read ({error}); train and import_hf write such files."
        ) from error


def find_tokenizer(root: pathlib.Path) -> tokenizer_lib.Tokenizer | tokenizer_lib.JsonTokenizer:
    """The tokenizer a workdir or model folder carries."""
    kinds = (tokenizer_lib.Tokenizer, tokenizer_lib.JsonTokenizer)
    there = [root / kind.file_name for kind in kinds if bucket.is_file(root / kind.file_name)]
    return tokenizer_lib.read(there[0] if there else root / kinds[0].file_name)


def prompts_of(config: config_lib.Config) -> dict[str, str]:
    """What a run puts in front of a text, by the name of the task; masked language modelling puts nothing."""
    if config.loss.objective == "mlm":
        return {}
    return {"query": config.data.query_prompt, "document": config.data.document_prompt}


def write_description(
    root: pathlib.Path, config: config_lib.Config, tokenizer, *, prompts: dict[str, str], init_from: str | None = None
) -> None:
    """Make `root` a workdir: config, prompts, versions and what it began with, and a copy of the tokenizer."""
    _write(root, {"config": config_lib.to_dict(config), "prompts": prompts, "init_from": init_from}, tokenizer)


def save(model: Model, output: str | pathlib.Path, *, made_by: str) -> None:
    """Write a model folder: a workdir with step 0 and no optimiser, for --model and --init_from.

    `made_by` says in a sentence where it comes from. It is written beside its place and renamed into it. An earlier model
    folder at `output` is replaced; UserError if anything else is there.
    """
    check_model_output(pathlib.Path(output))
    root = pathlib.Path(output).resolve()  # of a link, what it points to
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
        folder = pathlib.Path(scratch) / root.name
        folder.mkdir()
        state = {"step": 0, "params": model.params}
        checkpoint.save(folder / "checkpoints", state, facts={"made_by": made_by}, keep=1)
        shape = {"encoder": dataclasses.asdict(model.encoder), "moe": dataclasses.asdict(model.moe)}
        description = {**shape, "head": "head" in model.params, "prompts": model.prompts, "made_by": made_by}
        _write(folder, description, model.tokenizer)
        put_in_place(folder, root)


def check_model_output(root: pathlib.Path, *, read: Sequence[str] = ()) -> None:
    """UserError, before any work, unless `save` may write a model folder at `root`. Else as `make_parent`."""
    make_parent(root, read=read)
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return
    if not bucket.is_file(root / DESCRIPTION) or read_description(root).config is not None:
        raise UserError(f"--output={root} exists and is no earlier model folder; name another.")
    own = {DESCRIPTION, tokenizer_lib.Tokenizer.file_name, tokenizer_lib.JsonTokenizer.file_name}
    own |= {f"checkpoints/0/{name}" for name in checkpoint.files_of(root / "checkpoints", 0)}
    files = (path for path in root.rglob("*") if path.is_symlink() or not path.is_dir())
    others = sorted({path.relative_to(root).as_posix() for path in files} - own)
    if others:  # it is about to be replaced: nobody's work is deleted with it
        raise UserError(
            f"--output={root} also holds {', '.join(others[:5])}, which would be lost; name another folder."
        )


def make_parent(output: pathlib.Path, *, read: Sequence[str] = ()) -> None:
    """Make the folder that `output` is to be made in. UserError, before any work, where nothing can be written there.

    `read` are the models that the work reads: none of them is to be replaced by what is made of it.
    """
    root, parent = output.resolve(), output.resolve().parent
    if root.exists() and any(pathlib.Path(path).exists() and root.samefile(path) for path in read):
        raise UserError(f"--output={output} is the model that is read; it would be replaced, so name another folder.")
    if root.is_mount():
        raise UserError(f"--output={output} is a mount point, which cannot be replaced; name a folder in it.")
    try:
        parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=parent).cleanup()
    except OSError as error:
        raise UserError(f"--output={output} cannot be made: {error.strerror} ({parent}).") from error


def put_in_place(folder: pathlib.Path, output: pathlib.Path, *, keep: pathlib.Path | None = None) -> None:
    """Rename `folder` to `output`, on the same disk. What was there becomes `keep`, or is deleted when all is done.

    Whatever stops it, the old one or the new one is whole at `output`. UserError where it cannot be renamed.
    """
    aside = keep or pathlib.Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent)) / output.name
    try:
        if output.exists():
            output.rename(aside)
        folder.rename(output)
    except BaseException as error:
        if aside.exists() and not output.exists():
            aside.rename(output)
        if not keep:
            aside.parent.rmdir()
        if isinstance(error, OSError):
            raise UserError(f"--output={output} cannot be replaced: {error.strerror}; name another folder.") from error
        raise
    if not keep:
        shutil.rmtree(aside.parent, ignore_errors=True)
        if aside.parent.exists():
            print(f"what was in {output} could not be deleted; the rest of it is in {aside.parent}.")


def _write(root: pathlib.Path, description: dict, tokenizer) -> None:
    import flax
    import orbax.checkpoint

    description |= {"versions": {m.__name__: m.__version__ for m in (jax, flax, np, orbax.checkpoint)}}
    stored.write_bytes(root / tokenizer.file_name, tokenizer.model_bytes)
    stored.write_json(root / DESCRIPTION, description)
