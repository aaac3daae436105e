"""Several models become one: the average of their parameters (model soups, arXiv 2203.05482), or the arc between two.

    python -m moe_embed.soup --models=runs/seed0,runs/seed1,runs/seed2 --output=runs/soup
    python -m moe_embed.soup --models=runs/base,runs/finetuned --output=runs/soup --weights=0.3,0.7
    python -m moe_embed.soup --models=runs/base,runs/finetuned --output=runs/soup --weights=0.3,0.7 --method=slerp

Models must have one shape, one tokenizer and the same prompts, and an ancestor in common: arrays are combined place by place,
and neither the experts of a mixture nor anything else is permuted to fit. How far each model is from the soup is printed.
--method=slerp goes from the first of two models to the second by the second's weight, along the great circle, one matrix
at a time (each layer's, each expert's), as mergekit does; nearly parallel ones are averaged.
"""

import dataclasses
import math
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from moe_embed import sharding, verb
from moe_embed.config import UserError
from moe_embed.load import Model, check_model_output, load, save

PARALLEL = 0.9995  # |cosine| from which sin(angle) is too small to divide by; mergekit's number


def main(argv: Sequence[str]) -> None:
    parser = verb.Parser("soup", __doc__)
    parser.add_argument("--models", required=True, help="two or more workdirs or model folders, separated by commas")
    parser.add_argument("--output", required=True, type=pathlib.Path, help="the model folder to write")
    parser.add_argument("--weights", help="a number for each model; only their ratio counts (default: equal)")
    parser.add_argument("--method", choices=("average", "slerp"), default="average")
    arguments = parser.parse_args(argv)
    paths = [path for path in arguments.models.split(",") if path]
    check_model_output(arguments.output, read=paths)
    shares = _shares(arguments.weights, len(paths))
    _check_count(len(paths), arguments.method)
    models = [load(path) for path in paths]
    mixed = soup(models, shares, method=arguments.method)
    for share, model in zip(shares, models, strict=True):
        print(f"{share:6.1%} of {model.origin}, {distance(model, mixed):.2%} of the soup's norm away from it")
    save(mixed, arguments.output, made_by=f"soup {' '.join(argv)}")
    print(f"wrote {arguments.output}")


def soup(models: Sequence[Model], shares: Sequence[float], *, method: str = "average") -> Model:
    """Models and a share for each, with a sum of 1 -> a model on the first one's mesh; float64 until the last rounding.

    UserError names each way in which a model differs from the first: shape, tokenizer, prompts, or which arrays it has.
    """
    _check_count(len(models), method)
    _check_alike(models)

    def mix(path, *arrays: jax.Array) -> np.ndarray:
        name = path[-1].key
        num_stacked = sum(dim in "RE" for dim in sharding.letters(name))  # R and E come first in every name
        combined = average(arrays, shares) if method == "average" else slerp(arrays, shares, num_stacked=num_stacked)
        if not np.isfinite(combined).all():
            raise UserError(
                f"{name} of the soup is not finite, so it is not in one of the models either; leave that out."
            )
        return combined.astype(np.float32)

    first = models[0]
    params = jax.tree.map_with_path(mix, *(model.params for model in models))
    params = jax.device_put(params, sharding.shardings(params, column="parameter", mesh=first.mesh))
    return dataclasses.replace(first, params=params, origin=f"soup of {', '.join(model.origin for model in models)}")


def average(arrays: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """The weighted mean of arrays of one shape, float64."""
    return sum(share * np.asarray(array, np.float64) for share, array in zip(shares, arrays, strict=True))


def slerp(arrays: Sequence[np.ndarray], shares: Sequence[float], *, num_stacked: int = 0) -> np.ndarray:
    """The point at shares[1] of the way from the first of two arrays to the second, float64.

    sin((1 - t) angle) / sin(angle) of the one plus sin(t angle) / sin(angle) of the other. The first `num_stacked` dims
    count matrices, each of which goes its own way. The average where they are nearly parallel, opposite, or zero.
    """
    a, b = (np.asarray(array, np.float64) for array in arrays)
    axes = tuple(range(num_stacked, a.ndim))
    norms = np.sqrt((a * a).sum(axes, keepdims=True) * (b * b).sum(axes, keepdims=True))
    cosine = (a * b).sum(axes, keepdims=True) / np.where(norms > 0, norms, 1)
    on_arc = (np.abs(cosine) < PARALLEL) & (norms > 0)
    angle = np.arccos(np.where(on_arc, cosine, 0))
    return sum(
        np.where(on_arc, np.sin(share * angle) / np.sin(angle), share) * x
        for share, x in zip(shares, (a, b), strict=True)
    )


def distance(a: Model, b: Model) -> float:
    """Norm of the difference of two models' parameters, over the norm of b's."""
    away = size = 0.0
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        away, size = away + np.square(x - y).sum(), size + np.square(y).sum()
    return math.sqrt(away / size) if size else 0.0


def _check_count(count: int, method: str) -> None:
    if count < 2:
        raise UserError(f"--models names {count} model{'s' * (count != 1)}; a soup needs two or more.")
    if method == "slerp" and count != 2:
        raise UserError(f"--method=slerp goes from one model to another; --models names {count}.")


def _shares(text: str | None, count: int) -> list[float]:
    if text is None:
        return [1 / max(count, 1)] * count
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if len(weights) != count or not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
        raise UserError(f"--weights={text} must be {count} numbers of 0 or more, not all 0: one for each model.")
    return [weight / sum(weights) for weight in weights]


def _check_alike(models: Sequence[Model]) -> None:
    first, faults = models[0], []
    for other in models[1:]:
        pair = f"{first.origin} and {other.origin}"
        for section in ("encoder", "moe"):
            ours, theirs = (dataclasses.asdict(getattr(model, section)) for model in (first, other))
            for key, value in ours.items():
                if value != theirs[key]:
                    faults.append(f"{pair} differ in {section}.{key}: {value!r} and {theirs[key]!r}.")
        if first.tokenizer.model_bytes != other.tokenizer.model_bytes:
            faults.append(f"{pair} have different tokenizers: their embedding tables do not mean the same pieces.")
        if first.prompts != other.prompts:
            faults.append(f"{pair} have different prompts: {first.prompts} and {other.prompts}.")
        if ("head" in first.params) != ("head" in other.params):
            faults.append(f"{pair} do not both have a head of masked language modelling.")
    if faults:
        raise UserError(*faults)


if __name__ == "__main__":
    verb.run(main)
