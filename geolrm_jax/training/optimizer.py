"""AdamW with warm-up, cosine decay and clipping."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW (Loshchilov and Hutter 2019); the defaults are the paper's."""

    learning_rate: float = 1e-4
    warmup: int = 1500
    """Steps of half-cosine rise to the peak; what remains of the period is the cosine fall."""
    period: int | None = None
    """Steps until the floor is reached; None for all of the stage's."""
    after_period: Literal["clamp", "rise"] = "clamp"
    """Stay at the floor, or go on along the cosine, which rises again (released)."""
    floor: float = 0.001
    """Lowest multiplier of the learning rate, at the first and from the last step on."""
    b1: float = 0.9
    b2: float = 0.95
    weight_decay: float = 0.05
    """On all parameters, as in the paper."""
    clip: float = 4.0
    """Largest global norm of the gradient."""

    def schedule(self, steps: int) -> optax.Schedule:
        """Learning rate by optimizer step, for a stage of `steps`."""
        period = self.period or steps

        def rate(step):
            step = jnp.asarray(step, jnp.float32)
            step = jnp.minimum(step, period) if self.after_period == "clamp" else step
            rise = step / max(self.warmup, 1)
            fall = (step - self.warmup) / max(period - self.warmup, 1)
            share = 0.5 * jnp.where(step < self.warmup, 1 - jnp.cos(jnp.pi * rise), 1 + jnp.cos(jnp.pi * fall))
            return self.learning_rate * (self.floor + (1 - self.floor) * share)

        return rate

    def make(self, steps: int) -> optax.GradientTransformation:
        """The transformation for a stage of `steps`."""
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.adamw(self.schedule(steps), self.b1, self.b2, weight_decay=self.weight_decay),
        )
