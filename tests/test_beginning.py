"""Whose shape, prompts and parameters a run begins with (the whole loop: test_train.py)."""

import types

import jax
import numpy as np
import pytest

from moe_embed import beginning
from moe_embed.config import UserError
from moe_embed.load import Description
from tests import tiny


def base(**encoder) -> Description:
    c = tiny.config(encoder=encoder)
    return Description(c.encoder, c.moe, {"query": "q: ", "clustering": "c: ", "document": ""}, False, None)


def test_the_model_decides_on_shape_and_prompts_the_config_on_dtype():
    config, prompts = beginning.inherit(
        tiny.config(encoder={"dtype": "bfloat16"}), base(dim=32), origin="m", explicit=()
    )
    assert (config.encoder.dim, config.encoder.dtype, config.data.query_prompt) == (32, "bfloat16", "q: ")
    assert prompts == {"query": "q: ", "clustering": "c: ", "document": ""}


def test_what_was_set_explicitly_must_agree_but_for_the_length_read():
    config = tiny.config(encoder={"max_seq_length": 24, "dim": 48})
    with pytest.raises(UserError, match=r"encoder\.dim=48 disagrees with m, which has 16"):
        beginning.inherit(config, base(), origin="m", explicit={"encoder.dim"})
    kept, _ = beginning.inherit(config, base(), origin="m", explicit={"encoder.max_seq_length"})
    assert (kept.encoder.max_seq_length, kept.encoder.dim) == (24, 16)


@pytest.mark.parametrize("objective", ["mlm", "contrastive"])
def test_a_head_is_made_where_it_is_used_and_left_out_where_not(objective):
    c = tiny.config(loss={"objective": objective})
    with_head = tiny.config(loss={"objective": "mlm"})
    model = types.SimpleNamespace(params=tiny.params(with_head if objective == "contrastive" else tiny.config()))
    program = types.SimpleNamespace(config=c, abstract_state={"params": tiny.params(c)})
    data = types.SimpleNamespace(log_frequency_V=np.full(c.encoder.vocab_size, -3.0, np.float32))
    params = beginning.parameters_of(model, program, data)
    assert ("head" in params) == (objective == "mlm")
    assert jax.tree.structure(params) == jax.tree.structure(program.abstract_state["params"])
    if objective == "mlm":
        assert (params["head"]["b_V"] == -3).all()
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(params["embedding"]["word_VD"], tiny.params(c, seed=1)["embedding"]["word_VD"])
    np.testing.assert_array_equal(params["embedding"]["word_VD"], model.params["embedding"]["word_VD"])
