"""Learning-rate schedules and AdamW with clipping; what decays is read from a parameter's name."""

import jax
import jax.numpy as jnp
import optax

from moe_embed import config as config_lib
from moe_embed import sharding

FROZEN = "word_VD"  # by Optim.freeze_embedding


def schedule(c: config_lib.Optim, *, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak over `warmup_steps`, then decay to 0 at `steps` (inverse_sqrt, constant: not)."""
    after = max(steps - c.warmup_steps, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(c.learning_rate, after),
        "linear": optax.linear_schedule(c.learning_rate, 0.0, after),
        # contrastors' schedule: lr * sqrt(warmup / step) from the end of the warm-up
        "inverse_sqrt": lambda step: c.learning_rate * (1 + jnp.maximum(step, 0) / max(c.warmup_steps, 1)) ** -0.5,
        "constant": optax.constant_schedule(c.learning_rate),
    }[c.schedule]
    warmup = optax.linear_schedule(0.0, c.learning_rate, c.warmup_steps)
    return optax.join_schedules([warmup, decay], [c.warmup_steps])


def decays(params: dict) -> dict:
    """True for each parameter that weight decay pulls at: matrices, not biases, norms or the one token-type row."""

    def of(path, leaf):
        name = path[-1].key
        dims = sharding.letters(name).replace("R", "")
        return len(dims) >= 2 and not name.startswith(("b_", "bias_", "type_"))

    return jax.tree.map_with_path(of, params)


def freeze(params: dict) -> dict:
    """The same values; no gradient flows to the frozen ones."""
    frozen = lambda path, x: jax.lax.stop_gradient(x) if path[-1].key == FROZEN else x  # noqa: E731
    return jax.tree.map_with_path(frozen, params)


def make(c: config_lib.Optim, *, steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm.

    With `freeze_embedding` the piece table has no moments, no decay and, through `freeze`, gradients of zero.
    """
    adamw = _clipped_adamw(c, steps=steps)
    if not c.freeze_embedding:
        return adamw
    return optax.masked(adamw, lambda params: jax.tree.map_with_path(lambda path, _: path[-1].key != FROZEN, params))


def _clipped_adamw(c: config_lib.Optim, *, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(
            schedule(c, steps=steps),
            b1=c.beta1,
            b2=c.beta2,
            eps=c.epsilon,
            weight_decay=c.weight_decay,
            mask=decays,
        ),
    )


def keep_if(good: jax.Array, new, old):
    """`new` where the scalar `good` holds, else `old`; counts of steps go on: the learning rate is the step's either way."""
    count = lambda x: jnp.issubdtype(x.dtype, jnp.integer)  # noqa: E731
    return jax.tree.map(lambda n, o: n if count(n) else jnp.where(good, n, o), new, old)
