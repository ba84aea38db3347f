"""The guard of a step: a gradient that is not finite, or far above those before it, changes nothing.

What it remembers is part of the state, a function of the steps alone: all processes decide alike, and so does a run
that was restarted.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

GuardState = dict[str, Array]


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and what follows when they are many."""

    spike: float = 10.0
    """A gradient whose norm is above so many times the median of the window, where that is not 0, is skipped."""
    window: int = 100
    """Steps that the median and the count of skipped steps look back; spikes are skipped once it is half full."""
    max_rollbacks: int = 2
    """Times that a stage may go back to its last good checkpoint, and on with another order of the data."""

    def __post_init__(self):
        if self.spike <= 1.0 or self.window < 2 or self.max_rollbacks < 0:
            raise ValueError(f"expected spike > 1, window >= 2 and max_rollbacks >= 0, got {self}")


def init_guard(config: GuardConfig) -> GuardState:
    """`norms` of the last `window` steps' gradients, NaN where there is none, and which of those were `skipped`."""
    return {
        "norms": jnp.full(config.window, jnp.nan, jnp.float32),
        "skipped": jnp.zeros(config.window, bool),
    }


def judge(
    guard: GuardState,
    step: Int[Array, ""],
    loss: Float[Array, ""],
    norm: Float[Array, ""],
    config: GuardConfig,
) -> tuple[Bool[Array, ""], GuardState, dict[str, Array]]:
    """Whether a step may be taken.

    Args:
      guard: of the steps before.
      step: their number.
      loss, norm: the loss and the global norm of the gradient.
      config: of the guard.

    Returns:
      True if the step may be taken; the guard's state behind it, in which a spike counts too, so that a level that
      stays becomes the median; and the metrics `skipped`, `skipped_recently` (steps of the window, this one included)
      and `gradient_norm_median` (of the window before this step, NaN while it is empty).
    """
    median = jnp.nanmedian(guard["norms"])
    enough = 2 * jnp.sum(jnp.isfinite(guard["norms"])) >= config.window
    finite = jnp.isfinite(loss) & jnp.isfinite(norm)
    usable = finite & ~(enough & (median > 0) & (norm > config.spike * median))  # of zeros anything is a multiple
    place = step % config.window
    after = {
        "norms": guard["norms"].at[place].set(jnp.where(finite, norm, jnp.nan).astype(jnp.float32)),
        "skipped": guard["skipped"].at[place].set(~usable),
    }
    metrics = {
        "skipped": ~usable,
        "skipped_recently": jnp.sum(after["skipped"]),
        "gradient_norm_median": median,
    }
    return usable, after, metrics
