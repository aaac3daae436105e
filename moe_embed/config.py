"""The door: a Python config file and `--config.a.b=value` overrides in, frozen dataclasses out.

`ml_collections.ConfigDict` is known in this file and in the config files, nowhere else. Every fault of a config
is collected and reported together, one sentence a line, exit code 2. Beyond the door a field is an attribute;
`.get(key, default)` does not occur (tests/test_layering.py).
"""

import dataclasses
import difflib
import importlib.util
import pathlib
import typing
from collections.abc import Sequence

import ml_collections

from moe_embed import fields


class UserError(Exception):
    """Something the user can mend. Each argument is one sentence: what was found, where, what would work."""

    def __str__(self) -> str:
        return "\n".join(self.args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Encoder:
    """Shape of the encoder (Nomic Embed v2, arXiv 2502.07972: 12 layers, dim 768, 12 heads, ffn 3072)."""

    vocab_size: int  # rows of the embedding table: the tokenizer's pieces, padded to a multiple of 64
    num_layers: int
    dim: int
    num_heads: int
    ffn_dim: int
    max_seq_length: int  # tokens; what encode() reads of a text, queries and documents alike
    num_token_types: int = 1
    position: str = "rotary"  # or "learned": a table of num_positions rows, added to the embedding (BERT, XLM-R)
    num_positions: int = 0
    position_offset: int = 0  # the table's row for a text's first token: 0 in BERT, 2 in XLM-R
    rotary_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    dtype: str = "float32"  # of the matrix products; masters, router, norms, pooling and loss stay float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Moe:
    """Which layers are mixtures of experts, and of how many."""

    num_experts: int = 8  # 0: every layer is dense
    top_k: int = 2  # experts a token visits; their softmax weights are used as they are, not renormalised
    every: int = 2  # layer i is a mixture when i % every == every - 1

    @property
    def unit_length(self) -> int:
        """Layers in the unit that repeats: `every` with the mixture last, or one dense layer."""
        return self.every if self.num_experts else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data:
    """Which pairs, and how they become packed rows."""

    # files, patterns, folders made by prepare, tfds:NAME:SPLIT; a global batch comes from one file
    sources: tuple[str, ...]
    max_bad_fraction: float = 0.0  # of a source's rows that may be left out, counted; 0: the first one stops
    tokenizer: str  # a SentencePiece model, or a tokenizer.json
    batch_size: int  # pairs in a global batch, 0: by how many there are; for the objective mlm: packed rows
    weights: tuple[float, ...] = ()  # how often each source is drawn; () is in proportion to its size ** smoothing
    by_language: bool = False  # also one language per global batch; its size is that over all sources
    smoothing: float = 1.0  # 0.3 for Nomic's MLM: small languages are drawn more often than their share
    query: str = "query"  # column names
    document: str = "document"
    query_prompt: str = "search_query: "
    document_prompt: str = "search_document: "
    query_length: int = 32  # tokens; longer queries are cut, and counted
    document_length: int = 256
    num_negatives: int = 0  # hard negatives taken from a pair's "negatives"
    teacher: str = ""  # vectors to distil: pairs.jsonl + ".<teacher>.query.npy" and ".document.npy", a row a pair
    row_length: int = 512  # tokens L in a packed row; 0: by how long the texts are
    rows: int = 32  # packed rows B of one micro-batch on one device; 0: by the tokens of the run's batches
    texts_per_row: int = 64  # at most S texts share a row
    workers: int = 0  # processes that read, tokenise and pack; 0: a thread of the training process
    held_out: float = 0.0  # share of the pairs kept out of training, and searched for before and after (held_out.py)
    dev: tuple[str, ...] = ()  # BEIR folders with qrels/dev.tsv, evaluated during training


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss:
    """What is minimised: InfoNCE over the documents of the global batch, or masked language modelling; and the balance loss."""

    objective: str = "contrastive"  # or "mlm"
    form: str = (
        "auto"  # "gathered": a device holds its N x C scores; "ring": the same in tiles; auto: by objectives.SCORES
    )
    temperature: float = 0.02
    bidirectional: bool = False  # also document -> query, averaged (the paper: query -> document only)
    mask_duplicates: bool = True  # a copy of the positive document, or a positive of the same query, is no negative
    false_negative_margin: float = 2.0  # nor is a document that scores above positive + margin; cosines differ by <= 2
    dims: tuple[int, ...] = ()  # Matryoshka (arXiv 2205.13147): the loss on these prefixes too, beside the whole vector
    dim_weights: tuple[float, ...] = ()  # one for each of dims; () is 1 each; the whole vector has 1 unless named
    distill: str = ""  # teacher's view to match: "scores" of a pair's own documents, or "embeddings" of the batch
    distill_weight: float = 1.0
    distill_temperature: float = 0.02  # of the teacher's scores
    mask_fraction: float = 0.3  # of the pieces in an mlm row: 80 % become <mask>, 10 % another piece, 10 % stay
    balance_coefficient: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW with warm-up and decay."""

    learning_rate: float
    schedule: str = "cosine"  # cosine, linear, inverse_sqrt or constant, after a linear warm-up
    warmup_steps: int = 0
    weight_decay: float = 0.01  # on matrices; never on biases and norms
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    freeze_embedding: bool = False  # 192M of the 475M parameters, and no moments for them: the piece table stays


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along the two mesh axes; one of them may be -1: all that are left."""

    data: int = -1
    expert: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """How long, from which seed, and how often something is written down."""

    steps: int  # 0: by how many pairs there are
    seed: int = 0
    eval_every: int = 0  # steps between evaluations on data.dev; 0 is never
    save_every: int = 1000
    keep: int = 2  # verified checkpoints to keep
    watchdog: int = (
        3600  # seconds without a step (an evaluation, a save) after which a run is stuck, and ends; 0 is never
    )
    log_to: tuple[str, ...] = ()  # trackers beside the workdir's files: tensorboard, wandb
    max_skips: int = 3  # steps of a run whose loss or gradient may be not finite: skipped; one more ends the run
    recompute: bool = (
        True  # encode again in the backward pass: 4/3 of the FLOPs, one micro-batch of activations (GradCache)
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """All of a run; `load` makes one, a workdir keeps it as JSON."""

    encoder: Encoder
    moe: Moe
    data: Data
    loss: Loss
    optim: Optim
    mesh: Mesh
    run: Run


SECTIONS = typing.get_type_hints(Config)
POSITIVE = ("vocab_size", "num_layers", "dim", "num_heads", "ffn_dim", "num_token_types", "rotary_base", "norm_epsilon")
SIZE = 2**31  # of a model no number is as large
CHOICES = {
    "encoder.dtype": ("float32", "bfloat16"),
    "encoder.position": ("rotary", "learned"),
    "loss.objective": ("contrastive", "mlm"),
    "loss.form": ("auto", "gathered", "ring"),
    "loss.distill": ("", "scores", "embeddings"),
    "optim.schedule": ("cosine", "linear", "inverse_sqrt", "constant"),
}


def load(spec: str, overrides: Sequence[str] = ()) -> Config:
    """`path/to/config.py[:variant]` and `--config.a.b=value` overrides -> Config.

    Raises UserError with every fault found: a missing file, unknown or missing keys, wrong types, impossible values.
    """
    path, _, variant = spec.partition(":")
    if not pathlib.Path(path).is_file() or not path.endswith(".py"):
        raise UserError(f"--config={spec}: {_no_file(path)}")
    module_spec = importlib.util.spec_from_file_location("moe_embed_config", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        tree = module.get_config(variant)
    except ValueError as error:  # a config's own sentence about an unknown variant
        raise UserError(f"--config={spec}: {error}") from error
    except Exception as error:  # the file is the user's own code: whatever it raises is about that file
        raise UserError(f"--config={spec}: {path} fails with {type(error).__name__}: {error}") from error
    if isinstance(tree, ml_collections.ConfigDict):
        tree = tree.to_dict()
    if not isinstance(tree, dict):
        raise UserError(f"--config={spec}: get_config returned {tree!r}; it must return a ConfigDict or a dict.")
    faults: list[str] = []
    for override in overrides:
        _apply_override(tree, override, faults)
    return from_dict(tree, faults=faults)


def _no_file(path: str) -> str:
    """What is wrong with a config's path, and which files of nearly that name are there."""
    here = pathlib.Path(path)
    folders = dict.fromkeys((here.parent, pathlib.Path("configs"), pathlib.Path("configs") / here.parent.name))
    there = [str(file) for folder in folders for file in sorted(folder.glob("*.py"))]
    by_name = {pathlib.Path(file).stem: file for file in reversed(there)}
    close = [by_name[name] for name in difflib.get_close_matches(here.stem, by_name)]
    if close:
        end = f"did you mean {' or '.join(close)}?"
    else:
        end = f"there are {', '.join(there)}." if there else "give a file that defines get_config(variant)."
    what = "is a folder" if here.is_dir() else "is no Python file" if here.exists() else "does not exist"
    return f"{path} {what}; {end}"


def from_dict(tree: dict, *, faults: Sequence[str] = ()) -> Config:
    """A nested dict (a config file's, or a workdir's) -> Config; raises UserError with all faults."""
    faults = list(faults)
    sections = {}
    for name, kind in SECTIONS.items():
        values = tree[name] if name in tree else {}
        if not isinstance(values, dict):
            faults.append(f"config.{name} is {values!r}; it is a section with keys of its own.")
            continue
        sections[name] = fields.build(kind, values, name, faults, choices=CHOICES)
    for key in tree:
        if key not in SECTIONS:
            faults.append(f"config.{key} is not a section{fields.did_you_mean(key, SECTIONS)}")
    if set(sections) == set(SECTIONS) and None not in sections.values():  # else a missing key is fault enough
        faults += _contradictions(Config(**sections))
    if faults:
        raise UserError(*faults)
    return Config(**sections)


def section(name: str, values: dict):
    """One section of a config ("encoder") from a plain dict; raises UserError with all its faults."""
    faults: list[str] = []
    built = fields.build(SECTIONS[name], values, name, faults, choices=CHOICES)
    if faults:
        raise UserError(*faults)
    return built


def to_dict(config: Config) -> dict:
    """Config -> plain nested dict, ready for JSON; `from_dict` is its inverse."""
    return dataclasses.asdict(config)


def _apply_override(tree: dict, override: str, faults: list[str]) -> None:
    name, equals, text = override.partition("=")
    keys = name.removeprefix("--config.").split(".")
    if not name.startswith("--config.") or not equals or len(keys) != 2:
        faults.append(f"{override} is not an override; write --config.section.key=value.")
        return
    section, key = keys
    if section not in SECTIONS:
        faults.append(f"config.{section} is not a section{fields.did_you_mean(section, SECTIONS)}")
        return
    kinds = typing.get_type_hints(SECTIONS[section])
    if not isinstance(tree.setdefault(section, {}), dict):
        return  # reported as no section
    if key in kinds:
        tree.setdefault(section, {})[key] = fields.parse(text, kinds[key])
        if (section, key) == ("data", "sources"):
            tree["data"].pop("weights", None)  # they were another list's
    else:  # reported with the other unknown keys
        tree.setdefault(section, {})[key] = text


def model_faults(encoder: Encoder, moe: Moe) -> list[str]:
    """What contradicts itself in a model's shape alone, a sentence each."""
    rules = [
        (encoder.num_layers % max(moe.unit_length, 1) == 0,
         f"config.encoder.num_layers={encoder.num_layers} is not divisible by config.moe.every={moe.every}."),
        (encoder.num_heads > 0 and encoder.dim % (2 * max(encoder.num_heads, 1)) == 0,
         f"config.encoder.dim={encoder.dim} must be a multiple of twice config.encoder.num_heads="
         f"{encoder.num_heads}: rotary positions turn pairs of a head's dims."),
        (encoder.position != "learned" or encoder.max_seq_length <= encoder.num_positions - encoder.position_offset,
         f"config.encoder.num_positions={encoder.num_positions} - position_offset={encoder.position_offset} learned "
         f"positions are fewer than the {encoder.max_seq_length} tokens of max_seq_length."),
        (encoder.position == "learned" or (encoder.num_positions, encoder.position_offset) == (0, 0),
         'config.encoder.num_positions and position_offset belong to config.encoder.position="learned".'),
        (moe.num_experts == 0 or 1 <= moe.top_k <= moe.num_experts,
         f"config.moe.top_k={moe.top_k} must be between 1 and config.moe.num_experts={moe.num_experts}."),
    ]  # fmt: skip
    for name, part, lowest in (("encoder", encoder, POSITIVE), ("moe", moe, ("every",))):
        for key, kind in typing.get_type_hints(type(part)).items():
            value = getattr(part, key)
            if kind in (int, float):
                sign = "be positive" if key in lowest else "not be negative"
                rules.append(
                    (value > 0 or (value == 0 and key not in lowest), f"config.{name}.{key}={value} must {sign}.")
                )
                rules.append((not value >= SIZE, f"config.{name}.{key}={value} must be less than 2**31."))
    return [sentence for holds, sentence in rules if not holds]


def _contradictions(c: Config) -> list[str]:
    """Faults that need more than one field to see."""
    longest = max(c.data.query_length, c.data.document_length)
    longest = max(longest, c.data.row_length) if c.loss.objective == "mlm" else longest  # there a text may fill a row
    rules = [
        (c.encoder.position != "learned" or longest <= c.encoder.num_positions - c.encoder.position_offset,
         f"config.encoder.num_positions={c.encoder.num_positions} - position_offset={c.encoder.position_offset} learned "
         f"positions are fewer than the {longest} tokens of query_length, document_length or, for mlm, row_length."),
        (all(0 < dim <= c.encoder.dim for dim in c.loss.dims) and len(set(c.loss.dims)) == len(c.loss.dims),
         f"config.loss.dims={c.loss.dims} must be different numbers between 1 and config.encoder.dim={c.encoder.dim}."),
        (len(c.loss.dim_weights) in (0, len(c.loss.dims)) and all(w > 0 for w in c.loss.dim_weights),
         f"config.loss.dim_weights={c.loss.dim_weights} must be one positive number for each of dims={c.loss.dims}."),
        (c.loss.distill != "scores" or c.data.num_negatives > 0,
         'config.loss.distill="scores" compares a pair\'s documents; it needs config.data.num_negatives of 1 or more.'),
        (c.loss.form != "ring" or not c.loss.distill,
         f'config.loss.form="ring" has no distillation ({c.loss.distill}); config.loss.form="gathered" has.'),
        (bool(c.data.teacher) == (c.loss.distill == "embeddings"),
         'config.data.teacher names the vectors of config.loss.distill="embeddings"; set both or neither.'),
        (not (c.data.workers and c.loss.objective == "mlm"), "config.data.workers is for pairs; mlm packs its texts once: set it to 0."),
        (0 <= c.data.held_out <= 0.5 and not (c.data.held_out and (c.loss.objective == "mlm" or c.data.teacher)),
         f"config.data.held_out={c.data.held_out} must be between 0 and 0.5, and 0 for mlm and with config.data.teacher."),
        (c.loss.objective != "mlm" or c.data.row_length >= 3 or not c.data.row_length,
         f"config.data.row_length={c.data.row_length} has no room for a text: <s>, a piece, </s>; give 3 or more."),
        (0 < c.loss.mask_fraction < 1, f"config.loss.mask_fraction={c.loss.mask_fraction} must be between 0 and 1."),
        (c.loss.distill_temperature > 0,
         f"config.loss.distill_temperature={c.loss.distill_temperature} must be positive."),
        (c.loss.objective != "mlm" or not (c.run.eval_every or c.data.num_negatives or c.loss.distill or c.loss.dims),
         "config.loss.objective=mlm reads texts: leave config.run.eval_every, config.data.num_negatives, config.loss.distill "
         "and config.loss.dims out."),
        (max(c.data.query_length, c.data.document_length) <= c.data.row_length or not c.data.row_length
         or c.loss.objective == "mlm",
         f"config.data.row_length={c.data.row_length} is shorter than a text's cap (query_length="
         f"{c.data.query_length}, document_length={c.data.document_length}); raise row_length."),
        (min(c.data.query_length, c.data.document_length, c.encoder.max_seq_length) >= 3,
         "config.data.query_length, document_length and config.encoder.max_seq_length must be 3 or more: <s>, a piece, </s>."),
        (0 <= c.data.max_bad_fraction <= 1, f"config.data.max_bad_fraction={c.data.max_bad_fraction} must be 0 to 1."),
        (len(c.data.weights) in (0, len(c.data.sources)),
         f"config.data.weights has {len(c.data.weights)} numbers for {len(c.data.sources)} sources."),
        (all(w >= 0 for w in c.data.weights) and (not c.data.weights or sum(c.data.weights) > 0),
         f"config.data.weights={c.data.weights} must be non-negative, and not all zero."),
        (c.loss.temperature > 0, f"config.loss.temperature={c.loss.temperature} must be positive."),
        (all(n == -1 or n > 0 for n in (c.mesh.data, c.mesh.expert)) and (c.mesh.data, c.mesh.expert) != (-1, -1),
         f"config.mesh is data={c.mesh.data}, expert={c.mesh.expert}: give counts of devices, at most one of them -1."),
    ]  # fmt: skip
    positive = {
        "data": ("texts_per_row", *(("rows", "row_length") if c.loss.objective == "mlm" else ())),
        "run": ("save_every", "keep"),
        "optim": ("clip_norm", "epsilon"),
    }
    rules += [
        (0 <= value < 1, f"config.optim.{key}={value} must be at least 0 and less than 1.")
        for key, value in (("beta1", c.optim.beta1), ("beta2", c.optim.beta2))
    ]
    for section, keys in positive.items():
        for key in keys:
            value = getattr(getattr(c, section), key)
            rules.append((value > 0, f"config.{section}.{key}={value} must be positive."))
    not_negative = {
        "optim": ("learning_rate", "warmup_steps", "weight_decay"),
        "data": ("num_negatives", "smoothing", "batch_size", "workers", "rows", "row_length"),  # 0: by the data
        "loss": ("balance_coefficient", "false_negative_margin", "distill_weight"),
        "run": ("seed", "eval_every", "steps", "max_skips", "watchdog"),
    }
    for section, keys in not_negative.items():
        for key in keys:
            value = getattr(getattr(c, section), key)
            rules.append((value >= 0, f"config.{section}.{key}={value} must not be negative."))
    rules.append((c.run.seed < 2**63, f"config.run.seed={c.run.seed} does not fit 63 bits."))
    rules.append((bool(c.data.sources), "config.data.sources is empty; name at least one file of pairs."))
    return model_faults(c.encoder, c.moe) + [sentence for holds, sentence in rules if not holds]
