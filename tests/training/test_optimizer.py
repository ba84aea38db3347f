"""The learning rate's ends; AdamW against its own equations."""

import jax.numpy as jnp
import numpy as np

from geolrm_jax.training.optimizer import OptimizerConfig


def test_schedule_stays_at_the_floor_after_the_last_step():
    rate = OptimizerConfig(1.0, warmup=10, floor=0.01).schedule(100)
    np.testing.assert_allclose([rate(100), rate(101), rate(10_000)], 0.01, rtol=1e-5)


def test_an_update_follows_adamws_equations(rng):
    config = OptimizerConfig(0.1, warmup=0, clip=1.0, weight_decay=0.05)
    optimizer = config.make(1000)
    weights = rng.normal(size=5)
    params = {"w": jnp.array(weights, jnp.float32)}
    state = optimizer.init(params)
    mean, square = np.zeros(5), np.zeros(5)
    for step in range(1, 4):
        gradient = rng.normal(size=5) * 3
        updates, state = optimizer.update({"w": jnp.array(gradient, jnp.float32)}, state, params)
        params = {"w": params["w"] + updates["w"]}
        gradient = gradient / max(np.linalg.norm(gradient), 1.0)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.95 * square + 0.05 * gradient**2
        rate = float(config.schedule(1000)(step - 1))
        direction = (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.95**step)) + 1e-8)
        weights = weights - rate * (direction + 0.05 * weights)
        np.testing.assert_allclose(params["w"], weights, rtol=1e-4, atol=1e-5)
