"""State and step: pure functions on nested dicts, compiled once per number of input views."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Key

from geolrm_jax.models.splitting import STACKED, whole
from geolrm_jax.scene import Batch
from geolrm_jax.training.guard import GuardConfig, init_guard, judge
from geolrm_jax.training.objectives import Objective

INIT, STEP = 0, 1  # purposes of random numbers, folded into the seed first
State = dict[str, Any]
Metrics = dict[str, Array]


def init_state(
    make: Callable[[nnx.Rngs], nnx.Module],
    objective: Objective,
    optimizer,
    key,
    *,
    ema: bool,
    guard: GuardConfig,
) -> State:
    """Fresh state: `{params, batch_stats, opt_state, step, guard}`, and `ema` of the trained parameters if asked for.

    Pure, so that it can be compiled with sharded outputs or evaluated for shapes alone.
    """
    _, params, stats = nnx.split(make(nnx.Rngs(key)), nnx.Param, nnx.BatchStat)
    params, stats = nnx.to_pure_dict(params), nnx.to_pure_dict(stats)
    trained = {name: params[name] for name in objective.trains}
    state = {
        "params": params,
        "batch_stats": stats,
        "opt_state": optimizer.init(trained),
        "step": jnp.zeros((), jnp.int32),
        "guard": init_guard(guard),
    }
    return state | ({"ema": jax.tree.map(jnp.copy, trained)} if ema else {})


def make_train_step(
    graphdef,
    objective: Objective,
    optimizer,
    schedule,
    *,
    seed,
    accumulation=1,
    ema_decay=0.0,
    guard: GuardConfig,
    shardings=None,
):
    """Returns step(state, constants, batch) -> (state, metrics), compiled, with `state` donated.

    The batch is worked through in `accumulation` parts whose gradients are averaged; part i has rows i,
    i + accumulation, ...: some of every device. A step that the guard does not let pass leaves everything but the step
    count and the guard's own memory as it was and is counted in `skipped`. `shardings` are those of the state, kept
    from step to step; their mesh is ambient in the losses, for operations that must know it.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh.abstract_mesh if shardings else jax.sharding.get_abstract_mesh()

    def gradients(trained, frozen, stats, constants, batch: Batch, key: Key[Array, ""]):
        def total(trained):
            with jax.sharding.use_abstract_mesh(mesh):
                model = nnx.merge(graphdef, whole({**frozen, **trained}, without=STACKED), stats)
                losses, metrics = objective.losses(model, constants, batch, key)
            new_stats = nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))
            loss = sum(losses.values())
            return loss, ({"loss": loss, **losses, **metrics}, new_stats)

        return jax.grad(total, has_aux=True)(trained)

    def step(state: State, constants, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), STEP), state["step"])
        trained = {name: state["params"][name] for name in objective.trains}
        frozen = {name: tree for name, tree in state["params"].items() if name not in trained}

        def part(stats, part_batch_and_key):
            grads, (metrics, stats) = gradients(trained, frozen, stats, constants, *part_batch_and_key)
            return stats, (grads, metrics)

        parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)
        stats, summed = mean_of_scan(part, state["batch_stats"], (parts, jax.random.split(key, accumulation)))
        grads, metrics = summed

        norm = optax.tree.norm(grads)
        usable, remembered, verdict = judge(state["guard"], state["step"], metrics["loss"], norm, guard)
        updates, opt_state = optimizer.update(grads, state["opt_state"], trained)
        params = optax.apply_updates(trained, updates)
        new = {"params": {**frozen, **params}, "batch_stats": stats, "opt_state": opt_state}
        if "ema" in state:
            new["ema"] = optax.incremental_update(params, state["ema"], 1 - ema_decay)
        kept = jax.tree.map(lambda n, o: jnp.where(usable, n, o), new, {name: state[name] for name in new})
        metrics |= {"gradient_norm": norm, "learning_rate": schedule(state["step"]), **verdict}
        for word, tree in (("gradient", grads), ("parameter", params), ("update", updates)):
            metrics |= norms_of_parts(f"{word}_norm", tree)
        return {**state, **kept, "guard": remembered, "step": state["step"] + 1}, metrics

    return jax.jit(step, donate_argnames="state", out_shardings=(shardings, None))


def norms_of_parts(name: str, networks: Mapping[str, Mapping[str, Any]]) -> Metrics:
    """`name/network.part`: the norm of everything below each part of the networks, as `reconstruction.encoder`."""
    return {
        f"{name}/{network}.{part}": optax.tree.norm(tree)
        for network, parts in networks.items()
        for part, tree in parts.items()
    }


def mean_of_scan(body, carry, parts):
    """Scans `body` over the leading axis of `parts` and averages its outputs without stacking them."""
    first, count = jax.tree.map(lambda x: x[0], parts), len(jax.tree.leaves(parts)[0])
    if count == 1:
        return body(carry, first)

    def add(carry_and_total, part):
        carry, out = body(carry_and_total[0], part)
        return (carry, jax.tree.map(jnp.add, carry_and_total[1], out)), None

    nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(body, carry, first)[1])
    (carry, total), _ = jax.lax.scan(add, (carry, nothing), parts)
    return carry, jax.tree.map(lambda x: x / count, total)
