"""The head of masked language modelling: dense, GELU, norm, then scores against the embedding table itself (tied).

XLM-R's and BERT's (arXiv 1911.02116, 1810.04805). It exists in training and in what import_hf brings along; an embedding
model has none.
"""

import jax
import jax.numpy as jnp

from moe_embed import config as config_lib
from moe_embed.model import layers
from moe_embed.model.attention import MASKED


def init(c: config_lib.Encoder, *, key: jax.Array) -> dict:
    """Fresh float32 parameters: w_DU, b_U, scale_U, bias_U, b_V."""
    return {
        "w_DU": jax.random.normal(key, (c.dim, c.dim), jnp.float32) * c.dim**-0.5,
        "b_U": jnp.zeros(c.dim, jnp.float32),
        "scale_U": jnp.ones(c.dim, jnp.float32),
        "bias_U": jnp.zeros(c.dim, jnp.float32),
        "b_V": jnp.zeros(c.vocab_size, jnp.float32),
    }


def scores(head: dict, word_VD: jax.Array, hidden_TD: jax.Array, *, num_ids: int, epsilon: float) -> jax.Array:
    """float32 score_TV of every piece in the place of each hidden state; rows of the table from `num_ids` on are padding."""
    dtype = hidden_TD.dtype
    x_TU = jnp.einsum("TD,DU->TU", hidden_TD, head["w_DU"].astype(dtype)) + head["b_U"].astype(dtype)
    x_TU = layers.standardise(layers.gelu(x_TU).astype(jnp.float32), epsilon=epsilon) * head["scale_U"] + head["bias_U"]
    score_TV = jnp.einsum("TU,VU->TV", x_TU.astype(dtype), word_VD.astype(dtype), preferred_element_type=jnp.float32)
    return jnp.where(jnp.arange(word_VD.shape[0]) < num_ids, score_TV + head["b_V"], MASKED)
