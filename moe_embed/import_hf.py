"""import_hf: a pretrained encoder in Hugging Face's layout becomes a model folder, for --model and --init_from.

    python -m moe_embed.import_hf --model=HF_DIR --output=D
    python -m moe_embed.import_hf --model=HF_DIR --output=D --query_prompt="query: " --document_prompt="passage: "
    python -m moe_embed.import_hf --model=HF_DIR --output=D --prune_vocab=A.jsonl.gz,B.jsonl --keep=49152
    python -m moe_embed.import_hf --model=HF_DIR --output=D --position=rotary

BERT, XLM-RoBERTa, NomicBert and exports of this package, from model.safetensors. --prune_vocab cuts a SentencePiece vocabulary
to the pieces that texts need (.jsonl[.gz] with "text", or files of pairs). --position=rotary drops the learned positions, as the
paper does before it adapts an encoder to long texts (arXiv 2502.07972); what that costs until it is trained is measured and said.
"""

import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from moe_embed import config as config_lib
from moe_embed import hf_folder, retrieval, sharding, verb
from moe_embed.config import UserError
from moe_embed.data import sources, vocabulary
from moe_embed.data import tokenizer as tokenizer_lib
from moe_embed.load import Model, check_model_output, of_folder, save

ROTARY_BASE = 10_000.0
TASK = pathlib.Path(__file__).parent / "sample/dev/xling-libreoffice-help-de-en"  # German queries, English documents


class Cost(NamedTuple):
    """What rotary positions cost a model that learned others, on TASK."""

    ndcg: tuple[float, float]  # nDCG@10 before and after
    cosine: float  # of a document's old and new vector, mean
    cosine_of_others: float  # of the old vectors of two different documents, mean: what a cosine is to be held against
    found: float  # share of documents whose old vector finds their own new one first
    num_documents: int


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("import_hf", __doc__)
    parser.add_argument("--model", required=True, help="a folder with config.json and model.safetensors")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the model folder to write")
    parser.add_argument("--position", choices=("learned", "rotary"), help="default: as the model has them")
    parser.add_argument("--rotary_base", type=float, help="of --position=rotary (default: 10,000)")
    parser.add_argument("--max_seq_length", type=int, help="tokens read of a text; beyond the model's own: rotary only")
    parser.add_argument("--query_prompt", help="where config_sentence_transformers.json names none")
    parser.add_argument("--document_prompt", help="the same for documents")
    parser.add_argument("--prune_vocab", help="files of texts, separated by commas: keep the pieces that these need")
    parser.add_argument("--keep", type=int, help="how many pieces to keep")
    arguments = parser.parse_args(argv)
    if (arguments.prune_vocab is None) != (arguments.keep is None):
        raise UserError("--prune_vocab=TEXTS and --keep=N go together: which texts count, and how many pieces to keep.")
    base = arguments.rotary_base
    if base is not None and not 0 < base < math.inf:
        raise UserError(f"--rotary_base={base} must be a positive number.")
    if base is not None and arguments.position != "rotary":
        raise UserError("--rotary_base belongs to --position=rotary.")
    check_model_output(arguments.output)
    given = {"query": arguments.query_prompt, "document": arguments.document_prompt}
    model, folder = read(arguments.model, prompts={task: text for task, text in given.items() if text is not None})
    rotary = arguments.position == "rotary" and model.encoder.position == "learned"
    if arguments.position == "learned" and model.encoder.position != "learned":
        raise UserError(f"{arguments.model} has rotary positions and no table of learned ones; leave --position out.")
    if base is not None and not rotary:
        raise UserError(
            f"{arguments.model} has rotary positions already, of base {model.encoder.rotary_base:g}; leave --rotary_base out."
        )
    if arguments.prune_vocab is not None:
        model = prune(model, [path for path in arguments.prune_vocab.split(",") if path], keep=arguments.keep)
    learned, model = model, to_rotary(model, base=ROTARY_BASE if base is None else base) if rotary else model
    if arguments.max_seq_length is not None:
        model = read_at_most(model, arguments.max_seq_length)
    print(summary(model, folder))
    if rotary:
        print(say_cost(cost(learned, model)), f"configs/nomic_v2/mlm.py with --init_from={arguments.output}.")
    save(model, arguments.output, made_by=f"import_hf {' '.join(argv)}")
    print(f"wrote {arguments.output}")


def read(path: str, *, prompts: dict[str, str]) -> tuple[Model, hf_folder.Folder]:
    """The model in a Hugging Face folder, on all devices; `prompts` by task stand where the folder has none.

    UserError: no such folder, what hf_folder.read_folder refuses, or a prompt that disagrees.
    """
    folder = hf_folder.read_folder(path)
    model = of_folder(folder, mesh=sharding.make_mesh(config_lib.Mesh()), origin=str(path))
    return dataclasses.replace(model, prompts=merge_prompts(folder.prompts, prompts, origin=path)), folder


def merge_prompts(found: dict[str, str], given: dict[str, str], *, origin: str) -> dict[str, str]:
    """The folder's prompts, then those given where it has none or an empty one. UserError if two disagree."""
    for task, text in given.items():
        if task in found and found[task] not in ("", text):
            raise UserError(
                f"--{task}_prompt={text!r} disagrees with {origin}, which has {found[task]!r}; leave it out."
            )
    return found | given


def prune(model: Model, paths: Sequence[str], *, keep: int) -> Model:
    """`model` with the `keep` pieces that the texts of `paths` need; prints what they cover. UserError: no SentencePiece."""
    if not isinstance(model.tokenizer, tokenizer_lib.Tokenizer):
        raise UserError(f"--prune_vocab cuts SentencePiece models; {model.origin} has a {model.tokenizer.file_name}.")
    if not paths:
        raise UserError("--prune_vocab names no file.")
    start = time.perf_counter()
    count_V = np.zeros(model.tokenizer.num_ids, np.int64)
    for path in paths:
        count_V += vocabulary.count(model.tokenizer, vocabulary.read_texts(path))
    pruned = vocabulary.prune(model.tokenizer, count_V, keep=keep, prompts=model.prompts.values())
    print(
        f"pruned      {model.tokenizer.num_ids:,} ids to {pruned.tokenizer.num_ids:,}, which are {pruned.coverage:.2%} of "
        f"the {count_V[3:].sum():,} tokens in {count_V[0]:,} texts; a text of kept pieces alone keeps its ids and its "
        f"vector ({time.perf_counter() - start:.0f} s)"
    )
    params = dict(model.params)
    params["embedding"] = params["embedding"] | {"word_VD": _cut(params["embedding"]["word_VD"], pruned.old_V)}
    if "head" in params:
        params["head"] = params["head"] | {"b_V": _cut(params["head"]["b_V"], pruned.old_V)}
    encoder = dataclasses.replace(model.encoder, vocab_size=params["embedding"]["word_VD"].shape[0])
    return dataclasses.replace(model, encoder=encoder, params=params, tokenizer=pruned.tokenizer)


def to_rotary(model: Model, *, base: float = ROTARY_BASE) -> Model:
    """`model` without its table of positions, its attention turned by rotary angles of this base instead."""
    encoder = model.encoder
    if encoder.dim // encoder.num_heads % 2:
        raise UserError(f"{model.origin} has heads of {encoder.dim // encoder.num_heads} numbers; rotary needs pairs.")
    encoder = dataclasses.replace(encoder, position="rotary", num_positions=0, position_offset=0, rotary_base=base)
    embedding = {name: array for name, array in model.params["embedding"].items() if name != "position_PD"}
    return dataclasses.replace(model, encoder=encoder, params=model.params | {"embedding": embedding})


def read_at_most(model: Model, length: int) -> Model:
    """`model` reading `length` tokens of a text. UserError where learned positions end before that."""
    c = model.encoder
    if length < 3:
        raise UserError(f"--max_seq_length={length} leaves no room for a text between <s> and </s>; give 3 or more.")
    if c.position == "learned" and length > c.num_positions - c.position_offset:
        raise UserError(
            f"--max_seq_length={length} is more than the {c.num_positions - c.position_offset} positions that "
            f"{model.origin} has learned; add --position=rotary, and train it so (configs/nomic_v2/mlm.py)."
        )
    return dataclasses.replace(model, encoder=dataclasses.replace(c, max_seq_length=length))


def cost(old: Model, new: Model) -> Cost:
    """Encode the documents and queries of TASK with both models, and compare."""
    task, ndcg, documents = sources.read_task(str(TASK), split="dev"), [], []
    for model in (old, new):
        encode = lambda texts, name, m=model: m.encode(texts, m.prompt(name), progress=sys.stderr.isatty())  # noqa: E731
        for _, query_ND, document_CD in retrieval.embed_tasks(encode, [task]):
            ndcg.append(retrieval.measure(task, retrieval.run_of(task, query_ND, document_CD))["ndcg@10"])
            documents.append(document_CD)
    old_CD, new_CD = documents
    num = len(old_CD)
    others = (np.square(old_CD.sum(0, dtype=np.float64)).sum() - num) / (
        num * (num - 1)
    )  # mean over pairs, of unit vectors
    own_C = (old_CD * new_CD).sum(1)
    found = own_C > retrieval.top_k(old_CD, new_CD, k=1)[0][:, 0] - 1e-6  # sections that are cut to the same text tie
    return Cost(tuple(ndcg), float(own_C.mean()), float(others), float(found.mean()), num)


def say_cost(c: Cost) -> str:
    """The cost in words, ending where the remedy's name is to follow."""
    return (
        f"cost        of rotary positions, until the model is trained with them: on sample/dev/{TASK.name} nDCG@10 goes "
        f"from {100 * c.ndcg[0]:.1f} to {100 * c.ndcg[1]:.1f} %. The mean cosine of a document's old and new vector is "
        f"{c.cosine:.3f} (of two documents' old ones {c.cosine_of_others:.3f}); the old one finds the new one first for "
        f"{c.found:.1%} of {c.num_documents}. Masked language modelling repairs it:"
    )


def summary(model: Model, folder: hf_folder.Folder) -> str:
    """What was read, a line each; what was not used by name."""
    c, moe = model.encoder, model.moe
    total = sum(array.size for array in jax.tree.leaves(model.params))
    experts = f", {moe.num_experts} experts, {moe.top_k} active, every {moe.every} layers" if moe.num_experts else ""
    position = f"learned, {c.num_positions} rows" if c.position == "learned" else f"rotary, base {c.rotary_base:g}"
    kind = "SentencePiece" if isinstance(model.tokenizer, tokenizer_lib.Tokenizer) else "tokenizer.json"
    prompts = ", ".join(f"{task} {text!r}" for task, text in model.prompts.items() if text)
    if not prompts:
        prompts = (
            "none: the folder names none and no --query_prompt, --document_prompt was given. Some models are far worse "
            "without theirs (E5's are 'query: ' and 'passage: ')."
        )
    return "\n".join(
        (
            f"model type  {folder.model_type}: {c.num_layers} layers, dim {c.dim}, {c.num_heads} heads, ffn {c.ffn_dim}{experts}",
            f"parameters  {total:,}, of which {c.vocab_size:,} x {c.dim} are the table of pieces",
            f"positions   {position}; a text is read up to max_seq_length, {c.max_seq_length} tokens",
            f"tokenizer   {kind}, {model.tokenizer.num_ids:,} ids",
            f"mlm head    {'kept, for training' if 'head' in model.params else 'none'}",
            f"prompts     {prompts}",
            f"left out    {', '.join(folder.left_out) or 'nothing'}",
        )
    )


def _cut(array: jax.Array, old_V: np.ndarray) -> jax.Array:
    return jax.device_put(vocabulary.cut_rows(array, old_V), array.sharding)


if __name__ == "__main__":
    verb.run(main)
