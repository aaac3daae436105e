"""The ranges that int8 vectors are calibrated by, from a sample of documents: calibration.json of an export."""

import json
import pathlib

import numpy as np

from moe_embed import quantize, run_data, stored
from moe_embed.config import UserError
from moe_embed.data import inputs, sources
from moe_embed.load import DESCRIPTION, Model, read_description

FILE = "calibration.json"
OWN = "workdir"  # --calibrate=workdir: the documents that the model was trained on
MOST = 1_000  # documents encoded, spread over the file
FEWEST = 100  # fewer leave most new vectors outside of the range in some dim


def texts_of(argument: str, *, model_root: pathlib.Path) -> list[str]:
    """The documents to calibrate with, at most MOST of them, spread evenly.

    Args:
      argument: files with a "text" or a "document" a row, or "workdir" for the documents of the pairs that the workdir at
        `model_root` was trained on.

    UserError: no such file, no texts in it, fewer than FEWEST, or a model that is no workdir.
    """
    if argument == OWN:
        description = None
        if (model_root / DESCRIPTION).is_file():
            description = read_description(model_root)
        if description is None or description.config is None or description.config.loss.objective == "mlm":
            raise UserError(
                f"--calibrate={OWN}: {model_root} is no workdir trained on pairs; give a file of documents."
            )
        read = [source for some in run_data.read_sources(description.config) for source in some]
        each = -(-MOST // len(read))
        found = [pair.document for source in read for pair in source.take(_spread(len(source), each))]
    else:
        read = [texts for path in inputs.find(argument) for texts in sources.read_text_sources(path)]
        found = [text for texts in read for text in texts.texts]
    if len(found) < FEWEST:
        raise UserError(f"--calibrate={argument}: {len(found)} documents; give {FEWEST} or more.")
    return [found[i] for i in _spread(len(found), MOST)]


def _spread(count: int, most: int) -> np.ndarray:
    """At most `most` places of `count`, as far apart as can be."""
    return np.unique(np.linspace(0, count - 1, most).astype(int))


def write(model: Model, texts: list[str], folder: pathlib.Path) -> None:
    """FILE: {"ranges": [[least of each dim], [greatest]], "dim", "documents", "task"}, of whole vectors at unit norm.

    A prefix of a vector, at unit norm again, has other ranges.
    """
    task = model.prompt("document")
    low_D, high_D = quantize.ranges_of(model.encode(texts, task))
    content = {"ranges": [low_D.tolist(), high_D.tolist()], "dim": len(low_D), "documents": len(texts), "task": task}
    (folder / FILE).write_text(json.dumps(content) + "\n", encoding="utf-8")


def read(folder: pathlib.Path) -> quantize.Ranges:
    """What `write` wrote, float32 [D] each. UserError if the file is missing or something else."""
    path = pathlib.Path(folder) / FILE
    try:
        low_D, high_D = np.asarray(stored.read_json(path)["ranges"], np.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} holds no ranges: {error!r}; export --calibrate=documents.jsonl writes them."
        ) from error
    return quantize.Ranges(low_D, high_D)
