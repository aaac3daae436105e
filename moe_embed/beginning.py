"""What a run begins with: shape, prompts and parameters, of the model it starts from or fresh."""

import dataclasses
from collections.abc import Collection

import jax

from moe_embed import config as config_lib
from moe_embed import program
from moe_embed.config import Config, UserError
from moe_embed.load import Description, Model, prompts_of
from moe_embed.model import mlm_head


def inherit(
    config: Config, base: Model | Description, *, origin: str, explicit: Collection[str]
) -> tuple[Config, dict[str, str]]:
    """`config` with the encoder, the mixture and the prompts of the model it starts from, and all of its prompts.

    Says what the config had otherwise. Its dtype stays: it is how the run computes, not what the model is; and so does
    max_seq_length where it was set explicitly. UserError names each other key that was set explicitly and disagrees.
    """
    kept = {"dtype": config.encoder.dtype}
    if "encoder.max_seq_length" in explicit:
        kept["max_seq_length"] = config.encoder.max_seq_length
    ours = {"query": "query_prompt", "document": "document_prompt"}
    prompts = {task: text for task, text in base.prompts.items() if text}  # an empty one says nothing
    data = dataclasses.replace(config.data, **{ours[task]: text for task, text in prompts.items() if task in ours})
    theirs = dict(encoder=dataclasses.replace(base.encoder, **kept), moe=base.moe, data=data)
    faults, inherited = [], []
    for section, values in theirs.items():
        for field in dataclasses.fields(values):
            asked, found = getattr(getattr(config, section), field.name), getattr(values, field.name)
            name = f"{section}.{field.name}"
            if asked != found and name in explicit:
                faults.append(f"--config.{name}={asked!r} disagrees with {origin}, which has {found!r}; leave it out.")
            elif asked != found:
                inherited.append(f"{field.name} {found!r} (config: {asked!r})")
    if faults:
        raise UserError(*faults)
    if inherited and isinstance(base, Model):
        print(f"of {origin}: {', '.join(inherited)}")
    config = dataclasses.replace(config, **theirs)
    return config_lib.from_dict(config_lib.to_dict(config)), prompts_of(config) | prompts  # checked again as a whole


def parameters_of(base: Model | None, prog: program.Program, batches) -> dict:
    """What a run begins with: the parameters of the model it starts from, or fresh ones.

    A head of masked language modelling is left out where it has no part. A fresh one begins as the unigram model, its bias
    the pieces' log frequencies: the first steps then learn what context says, not how common a piece is.
    """
    params = prog.init()["params"] if base is None else dict(base.params)
    wants_head = "head" in prog.abstract_state["params"]
    if wants_head and (base is None or "head" not in params):
        print("mlm head    fresh, at the pieces' log frequencies")
        head = mlm_head.init(prog.config.encoder, key=jax.random.key(prog.config.run.seed))
        params["head"] = head | {"b_V": batches.log_frequency_V}
    elif "head" in params and not wants_head:
        print("mlm head    left out: this objective does not use it")
        del params["head"]
    return params
