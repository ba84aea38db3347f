"""Floating-point operations of any JAX function, from its jaxpr: nothing is compiled, allocated or run.

XLA's `cost_analysis` counts the body of a loop once. Here every loop's body is multiplied by its number of rounds, so
that stacked layers, chunked attention and accumulated gradients count in full. The conventions are XLA's: a
multiply-add is two operations, a convolution counts the taps that meet the image (not its padding, nor the zeros
between the cells of a transposed one), anything else is one operation per element.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxprs_in_params
from jax.interpreters.partial_eval import dce_jaxpr

# Layout, conversion and book-keeping: bytes move, nothing is computed.
LAYOUT = {
    "broadcast_in_dim",
    "concatenate",
    "expand_dims",
    "iota",
    "pad",
    "reshape",
    "rev",
    "split",
    "squeeze",
    "transpose",
}
COPIES = {"convert_element_type", "copy", "copy_p", "dynamic_slice", "dynamic_update_slice", "slice"}
REFERENCES = {"get", "masked_load", "masked_swap", "swap"}  # to and from memory, in kernels
MARKS = {"device_put", "name", "optimization_barrier", "pvary", "sharding_constraint", "stop_gradient"}
FREE = LAYOUT | COPIES | REFERENCES | MARKS
# No simple function of their shapes: they are named, and count nothing.
UNCOUNTED = {
    "cholesky",
    "eig",
    "eigh",
    "fft",
    "ffi_call",
    "geqrf",
    "householder_product",
    "pure_callback",
    "schur",
    "svd",
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations.

    Attributes:
      matmul: of matrix products.
      convolution: of convolutions, transposed ones and gradients included.
      other: one per element of everything else that works on floating-point numbers.
      unknown: what this count cannot see through: loops whose number of rounds depends on data (one round is in the
        count), and operations without a formula (not in the count).
    """

    matmul: int = 0
    convolution: int = 0
    other: int = 0
    unknown: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """All of them."""
        return self.matmul + self.convolution + self.other

    def __add__(self, more: "Cost") -> "Cost":
        unknown = tuple(dict.fromkeys(self.unknown + more.unknown))
        return Cost(self.matmul + more.matmul, self.convolution + more.convolution, self.other + more.other, unknown)

    def __mul__(self, times: int) -> "Cost":
        return Cost(self.matmul * times, self.convolution * times, self.other * times, self.unknown)


def count(function: Callable, *arguments: Any, **keywords: Any) -> Cost:
    """The operations of `function(*arguments, **keywords)`.

    Of a `cond` the most expensive branch counts, but of one that depends on the platform the default, whose work is
    the same without what a kernel computes twice; of a `shard_map` the body counts once per shard. What no result
    depends on does not count. Rematerialised parts count as often as they are computed.

    Args:
      function: anything that `jax.make_jaxpr` can trace, gradients and compiled functions included.
      *arguments: pytrees of arrays or of `jax.ShapeDtypeStruct`.
      **keywords: handed on as they are; not traced.
    """
    return count_jaxpr(jax.make_jaxpr(lambda *traced: function(*traced, **keywords))(*arguments))


def count_jaxpr(jaxpr: ClosedJaxpr) -> Cost:
    """`count` of what is traced already: `jax.jit(function).trace(...).jaxpr`."""
    return _walk(jaxpr.jaxpr)


def array_bytes(tree: Any) -> int:
    """Bytes of all arrays, or shapes of arrays, of a pytree: of a function's results after `jax.eval_shape`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _walk(jaxpr: Jaxpr) -> Cost:
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum((_equation(equation) for equation in jaxpr.eqns), Cost())


def _equation(equation: JaxprEqn) -> Cost:
    name, params = equation.primitive.name, equation.params
    outputs = [_elements(v) for v in equation.outvars]
    floating = any(_is_floating(v) for v in (*equation.invars, *equation.outvars))
    if name in FREE:
        return Cost()
    if name in UNCOUNTED:
        return Cost(unknown=(name,))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return Cost(matmul=2 * outputs[0] * math.prod(shape[axis] for axis in contracted))
    if name == "conv_general_dilated":
        return Cost(convolution=_convolution(equation))
    if name == "lu":  # of square matrices
        return Cost(other=outputs[0] * equation.outvars[0].aval.shape[-1] * 2 // 3)
    if name == "triangular_solve":
        return Cost(other=outputs[0] * equation.invars[0].aval.shape[-1])
    if name.startswith("scatter"):
        return Cost(other=_elements(equation.invars[2])) if floating else Cost()
    if name in ("gather", "atomic_rmw"):  # of a kernel's atomic operations only the part that it touches counts
        return Cost(other=outputs[0]) if floating else Cost()
    if name in CONTROL:
        return CONTROL[name](equation)
    inner = () if name.startswith("reduce") or name == "sort" else tuple(jaxprs_in_params(params))
    if inner:  # a call: compiled, rematerialised, or with a derivative of its own
        return sum((_walk(jaxpr) for jaxpr in inner), Cost())
    # One per element of the result, or of what is reduced to it.
    return Cost(other=max(outputs + [_elements(v) for v in equation.invars], default=0)) if floating else Cost()


def _scan(equation: JaxprEqn) -> Cost:
    return _walk(_open(equation.params["jaxpr"])) * equation.params["length"]


def _while(equation: JaxprEqn) -> Cost:
    params = equation.params
    body = _walk(_open(params["body_jaxpr"])) + _walk(_open(params["cond_jaxpr"]))
    rounds = _rounds(equation)
    if rounds is not None or body == Cost():  # however often nothing is done
        return body * (rounds or 1)
    return body + Cost(unknown=(f"while loop ({_place(equation)})",))


def _cond(equation: JaxprEqn) -> Cost:
    if equation.params.get("branches_platforms"):  # of `lax.platform_dependent`; the default is the last
        return _walk(_open(equation.params["branches"][-1]))
    return max((_walk(_open(branch)) for branch in equation.params["branches"]), key=lambda cost: cost.total)


def _shard_map(equation: JaxprEqn) -> Cost:
    sizes, manual = dict(equation.params["mesh"].shape), equation.params["newly_manual_axes"]
    return _walk(_open(equation.params["jaxpr"])) * math.prod(sizes[axis] for axis in manual)


def _pallas_call(equation: JaxprEqn) -> Cost:
    return _walk(_open(equation.params["jaxpr"])) * math.prod(equation.params["grid_mapping"].grid)


def _linear_solve(equation: JaxprEqn) -> Cost:
    return _walk(_open(equation.params["jaxprs"].solve))


CONTROL = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
    "pallas_call": _pallas_call,
    "custom_linear_solve": _linear_solve,
}


def _rounds(equation: JaxprEqn) -> int | None:
    """Rounds of a loop that counts up by one from a literal while below a literal; None for any other."""
    params = equation.params
    cond, body = _open(params["cond_jaxpr"]), _open(params["body_jaxpr"])
    if [e.primitive.name for e in cond.eqns] != ["lt"] or not isinstance(cond.eqns[0].invars[1], Literal):
        return None
    counter, limit = cond.eqns[0].invars
    if counter not in cond.invars[params["cond_nconsts"] :]:
        return None
    place = cond.invars.index(counter) - params["cond_nconsts"]
    start = equation.invars[params["cond_nconsts"] + params["body_nconsts"] + place]
    before, after = body.invars[params["body_nconsts"] + place], body.outvars[place]
    counts_up = any(
        e.primitive.name == "add"
        and e.outvars[0] is after
        and e.invars[0] is before
        and isinstance(e.invars[1], Literal)
        and e.invars[1].val == 1
        for e in body.eqns
    )
    return max(0, int(limit.val) - int(start.val)) if counts_up and isinstance(start, Literal) else None


def _convolution(equation: JaxprEqn) -> int:
    """2 per pair of an output and a kernel tap that meets a cell of the image, per pair of channels."""
    image, kernel, out = (v.aval.shape for v in (*equation.invars, *equation.outvars))
    params, axes = equation.params, equation.params["dimension_numbers"]
    pairs = 1
    for d, (lhs, rhs, to) in enumerate(zip(axes.lhs_spec[2:], axes.rhs_spec[2:], axes.out_spec[2:], strict=True)):
        spread = params["lhs_dilation"][d]
        place = (
            np.arange(out[to])[:, None] * params["window_strides"][d]
            + np.arange(kernel[rhs])[None] * params["rhs_dilation"][d]
            - params["padding"][d][0]
        )
        pairs *= int(np.sum((place >= 0) & (place % spread == 0) & (place // spread < image[lhs])))
    samples, channels, fan_in = out[axes.out_spec[0]], out[axes.out_spec[1]], kernel[axes.rhs_spec[1]]
    return 2 * pairs * samples * channels * fan_in


def _open(jaxpr: Jaxpr | ClosedJaxpr) -> Jaxpr:
    return jaxpr.jaxpr if isinstance(jaxpr, ClosedJaxpr) else jaxpr


def _elements(variable) -> int:
    return math.prod(getattr(variable.aval, "shape", ()))


def _is_floating(variable) -> bool:
    dtype = getattr(variable.aval, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, np.inexact)


def _place(equation: JaxprEqn) -> str:
    """File and line of the innermost frame outside JAX."""
    frames = equation.source_info.traceback.frames if equation.source_info.traceback else ()
    outside = [f for f in frames if "/jax/" not in f.file_name.replace("\\", "/")]
    return f"{outside[0].file_name.split('/')[-1]}, line {outside[0].line_num}" if outside else "unknown place"
