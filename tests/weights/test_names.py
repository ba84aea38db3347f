"""Name maps: layouts and what they are called."""

import jax
import numpy as np
import pytest

from geolrm_jax.weights import names
from geolrm_jax.weights.names import LINEAR, SAME, TWO_LEADING, check, collapse, match, nest, renamed


def abstract(**shapes):
    return {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()}


VARIABLES = {
    "params": {"blocks": {"query": abstract(kernel=(3, 4, 2), bias=(3, 2))}, **abstract(token=(5,))},
    "batch_stats": abstract(count=()),
}
ROWS = (
    ("layer.{n}.wq", "blocks.query", LINEAR),
    ("cls", "token", TWO_LEADING),
    ("bn.number", "count", SAME),
    ("elsewhere", "another", LINEAR),
)


def arrays(rng):
    theirs = {f"layer.{n}.wq.weight": rng.standard_normal((2, 4)).astype(np.float32) for n in range(3)}
    theirs |= {f"layer.{n}.wq.bias": rng.standard_normal(2).astype(np.float32) for n in range(3)}
    return theirs | {"cls": rng.standard_normal((1, 1, 5)).astype(np.float32), "bn.number": np.float32(9)}


def test_layers_are_stacked_and_axes_turned(rng):
    theirs, leaves = arrays(rng), match(ROWS, VARIABLES)
    check(leaves, {key: np.shape(x) for key, x in theirs.items()}, "it")
    ours = nest(leaves, lambda leaf: leaf.load(lambda key: np.asarray(theirs[key])))
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda x: x.shape, VARIABLES)
    for n in range(3):
        np.testing.assert_array_equal(ours["params"]["blocks"]["query"]["kernel"][n], theirs[f"layer.{n}.wq.weight"].T)
        np.testing.assert_array_equal(ours["params"]["blocks"]["query"]["bias"][n], theirs[f"layer.{n}.wq.bias"])
    np.testing.assert_array_equal(ours["params"]["token"], theirs["cls"][0, 0])
    assert ours["batch_stats"]["count"] == 9


def test_every_layout_comes_back(rng):
    shapes = {2: (2, 3), 3: (1, 1, 4), 4: (2, 3, 4, 5)}
    for layout, rank in {
        names.SAME: 2,
        names.ONE_LEADING: 3,
        names.TWO_LEADING: 3,
        names.MATRIX: 2,
        names.CONVOLUTION: 4,
        names.TRANSPOSED_CONVOLUTION: 4,
    }.items():
        theirs = rng.standard_normal(shapes[rank])
        ours = layout.here(theirs)
        np.testing.assert_array_equal(layout.there(ours), theirs)
        assert layout.there_shape(ours.shape) == theirs.shape


def test_convolutions_read_the_right_way(rng):
    theirs = rng.standard_normal((2, 3, 4, 5))
    assert names.CONVOLUTION.here(theirs)[1, 2, 0, 1] == theirs[1, 0, 1, 2]
    assert names.TRANSPOSED_CONVOLUTION.here(theirs)[1, 2, 0, 1] == theirs[0, 1, 4 - 1 - 1, 5 - 1 - 2]


def test_all_that_does_not_fit_is_in_one_message(rng):
    shapes = {key: np.shape(x) for key, x in arrays(rng).items()}
    del shapes["layer.1.wq.bias"]
    shapes |= {"cls": (1, 6), "extra.x": (3,), "layer.7.wq.bias": (2,)}
    with pytest.raises(ValueError) as error:
        check(match(ROWS, VARIABLES), shapes, "some.ckpt")
    assert str(error.value).splitlines() == [
        "some.ckpt does not fit the model:",
        "  1 missing:",
        "    layer.1.wq.bias",
        "  2 unexpected:",
        "    extra.x [3]",
        "    layer.7.wq.bias [2]",
        "  1 of another shape:",
        "    cls [1, 6], expected [1, 1, 5]",
    ]


def test_long_lists_share_lines_by_layer():
    keys = [f"a.layers.{n}.w" for n in (0, 1, 2, 4, 10)] + ["b.w", "a.layers.3.v", "blocks.1.attn.2.w"]
    assert collapse(keys) == ["a.layers.{0-2,4,10}.w", "b.w", "a.layers.3.v", "blocks.1.attn.2.w"]
    with pytest.raises(ValueError, match=r"100 unexpected:\n    layer\.\{0-99\}\.x \[1\]$"):
        check(match(ROWS, VARIABLES), {f"layer.{n}.x": (1,) for n in range(100)}, "it")


def test_an_array_without_a_name_is_an_error():
    with pytest.raises(ValueError, match=r"no name for these of the model's arrays: blocks\.query\.bias, token"):
        match((("layer.{n}.wq.weight", "blocks.query.kernel", names.MATRIX), ROWS[2]), VARIABLES)


def test_newer_names_are_turned_back():
    old_by_new = {".q_proj.": ".query."}
    assert renamed(["a.q_proj.w", "b"], old_by_new) == {"a.query.w": "a.q_proj.w", "b": "b"}
    for keys in (["a.q_proj.w", "a.query.w"], ["a.query.w", "a.q_proj.w"]):
        assert renamed(keys, old_by_new) == {key: key for key in keys}
