"""mteb_model: a model of ours as mteb (version 2) wants one: its prompts, a length to cut to, and figures that are counted.

    import moe_embed, mteb                                   # pip install -e ".[mteb]"
    model = moe_embed.mteb_model("runs/demo", embed_dim=64)
    mteb.evaluate(model, mteb.get_tasks(tasks=["NanoSciFactRetrieval"]))

mteb keeps results under a model's name and revision and takes them from there the next time: the revision is a digest of the
parameters, so that a model trained further is measured again.
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from moe_embed import program, sharding
from moe_embed.config import UserError
from moe_embed.data import tables
from moe_embed.load import Model, load


@dataclasses.dataclass(frozen=True)
class MtebModel:
    """mteb's EncoderProtocol. What mteb asks for with `mteb_model_meta` is an mteb.models.ModelMeta."""

    model: Model
    embed_dim: int
    max_length: int
    mteb_model_meta: Any

    def encode(
        self,
        inputs: Iterable[Mapping],
        *,
        task_metadata,
        hf_split=None,
        hf_subset=None,
        prompt_type=None,
        **encode_kwargs,
    ) -> np.ndarray:
        """Batches {"text": [text, ...]} -> float32 [N, embed_dim], unit norm, behind the prompt that `prompt_name` gives.

        All texts are packed at once, so mteb's `batch_size` says nothing here. An empty text, which mteb's data have and
        our `encode` refuses, is a row of zeros: similar to nothing. UserError for a `precision` other than float32.
        """
        known = {"batch_size", "show_progress_bar", "precision"}
        if unknown := sorted(set(encode_kwargs) - known):
            raise UserError(f"encode_kwargs has {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        if encode_kwargs.get("precision") not in (None, "float32"):
            raise UserError(f"precision={encode_kwargs['precision']}: only float32 is given to mteb; moe_embed.evaluate "
                            "--precisions measures smaller ones.")  # fmt: skip
        texts = [text for batch in inputs for text in batch["text"]]
        full = [i for i, text in enumerate(texts) if tables.is_text(text)]
        out_ND = np.zeros((len(texts), self.embed_dim), np.float32)
        task = prompt_name(self.model.prompts, task_metadata, prompt_type)
        progress = bool(encode_kwargs.get("show_progress_bar"))
        some = [texts[i] for i in full]
        out_ND[full] = self.model.encode(some, task, self.embed_dim, self.max_length, progress=progress)
        return out_ND

    def similarity(self, embeddings1, embeddings2):
        """Cosines of all of [N, D] with all of [C, D]: [N, C], a torch tensor as mteb's own encoders give."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1, embeddings2):
        """Cosines of [N, D] and [N, D], row with row: [N], a torch tensor."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


def mteb_model(
    path: str | pathlib.Path, *, embed_dim: int | None = None, max_length: int | None = None, name: str | None = None
) -> MtebModel:
    """Open a workdir or a Hugging Face folder for `mteb.evaluate(model, tasks)`.

    Args:
      embed_dim: keep the first numbers of a vector and normalise again; None keeps all.
      max_length: tokens read of a text, at most the model's own `max_seq_length`, which None is.
      name: "organisation/model" in mteb's results; None is moe_embed/ and the folder's name.

    Raises UserError without mteb, without a model at `path`, or for a length that the model does not have.
    """
    if name is None:
        name = f"moe_embed/{pathlib.Path(path).resolve().name or 'model'}"
    return of_model(load(path), name=name, embed_dim=embed_dim, max_length=max_length)


def of_model(model: Model, *, name: str, embed_dim: int | None = None, max_length: int | None = None) -> MtebModel:
    """`mteb_model` of a model that is open already."""
    if importlib.util.find_spec("mteb") is None:
        raise UserError('mteb_model gives a model to mteb, which is not installed: pip install -e ".[mteb]"')
    import mteb.models

    if name.count("/") != 1:
        raise UserError(f"name={name!r} must be organisation/model, as mteb files its results.")
    own_dim, own_length = model.encoder.dim, model.encoder.max_seq_length
    cut = {"embed_dim": embed_dim, "max_length": max_length}  # mteb keeps the results of each cut apart
    embed_dim = own_dim if embed_dim is None else embed_dim
    max_length = own_length if max_length is None else max_length
    if not 1 <= embed_dim <= own_dim:
        raise UserError(f"embed_dim={embed_dim} is not between 1 and the model's {own_dim}.")
    if not 3 <= max_length <= own_length:
        raise UserError(f"max_length={max_length} is not between 3 and the model's {own_length}.")
    meta = mteb.models.ModelMeta(
        loader=None,
        name=name,
        revision=model.digest,
        experiment_kwargs={key: value for key, value in cut.items() if value is not None} or None,
        embed_dim=embed_dim,
        max_tokens=max_length,
        framework=["JAX"],
        similarity_fn_name="cosine",
        use_instructions=bool(model.prompts),
        **figures(model),
        # What the folder does not say is not made up; mteb takes None for unknown.
        release_date=None, languages=None, license=None, open_weights=None, public_training_code=None,
        public_training_data=None, training_datasets=None,
    )  # fmt: skip
    return MtebModel(model, embed_dim, max_length, meta)


def prompt_name(prompts: Mapping[str, str], task_metadata, prompt_type) -> str | None:
    """The model's own name of the prompt for a task of mteb, or None where it has none.

    The order is mteb's: task and side, task, type of task and side, type of task, side (its "query" or "document", which
    older folders call "passage"). A name as it stands comes first, then without regard to case and punctuation:
    "pair_classification" is mteb's PairClassification.
    """
    side = [] if prompt_type is None else [str(prompt_type.value)]
    wanted = [
        name
        for of in (task_metadata.name, task_metadata.type)
        for name in (*(f"{of}-{one}" for one in side), str(of))
    ] + side  # fmt: skip
    wanted += ["passage"] if side == ["document"] else []
    plain = lambda name: "".join(filter(str.isalnum, name.lower()))  # noqa: E731
    for name in wanted:
        if name in prompts:
            return name
        alike = [own for own in prompts if plain(own) == plain(name)]
        if alike:
            return alike[0]
    return None


def figures(model: Model) -> dict[str, int | float]:
    """Parameters in mteb's sense, without a head of masked language modelling, and the MB (2**20) they take as stored.

    mteb counts as active what is not the embedding (of pieces); of experts, those that a token visits.
    """
    params = {key: part for key, part in model.params.items() if key != "head"}
    total, active = program.count_parameters(params, model)  # it reads `moe` alone
    leaves = jax.tree_util.tree_leaves_with_path(params)
    pieces = sum(leaf.size for path, leaf in leaves if "V" in sharding.letters(path[-1].key))
    counted = {"n_parameters": total, "n_embedding_parameters": pieces}
    if model.moe.num_experts:  # of a dense model mteb subtracts itself
        counted["n_active_parameters_override"] = active - pieces
    return counted | {"memory_usage_mb": sum(leaf.nbytes for _, leaf in leaves) / 2**20}
