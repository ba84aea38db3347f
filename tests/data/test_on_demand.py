"""Objects rendered when they are drawn: what a built set holds, in the same order, from any position on."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest

from geolrm_jax.data.builders.config import DataConfig
from geolrm_jax.data.folder import FolderSource
from geolrm_jax.data.on_demand import RenderedSource, open_data
from geolrm_jax.data.pipeline import PipelineConfig, training_dataset
from geolrm_jax.data.reader import open_split

BATCHES = dict(batch=2, views=4, inputs=2, input_size=(28, 28), render_size=(32, 32), seed=5)


@pytest.fixture(scope="module")
def config(tiny_config):
    return dataclasses.replace(tiny_config, on_demand=True)


# All tests ask for four views at a time: each number of views is a program of its own.
@pytest.mark.parametrize("split", ["train", "test"])
def test_records_are_those_of_the_built_set(config, tiny_set, split):
    stored, rendered = open_split(tiny_set, split), open_data(config, tiny_set, split)
    assert len(rendered) == len(stored) and rendered.config == stored.config
    for index in range(len(stored)):
        a, b = stored[index], rendered[index]
        for field in dataclasses.fields(a):
            if field.name != "read_views":
                np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)
        # Another number of views is another program: sums may be rounded another way.
        chosen = [20, 4, 16, 25]
        a, b = a.views(chosen), b.views(chosen)
        np.testing.assert_array_equal(a.depth, b.depth)
        assert np.abs(a.rgba.astype(int) - b.rgba).max() <= 1 and (a.rgba != b.rgba).mean() < 1e-3
        np.testing.assert_array_equal(a.cameras.world_from_camera, b.cameras.world_from_camera)


def test_training_sees_the_same_batches_and_goes_on_at_any_position(config, tiny_set):
    stored, rendered = (
        iter(training_dataset(source, **BATCHES))
        for source in (open_split(tiny_set, "train"), open_data(config, tiny_set, "train"))
    )
    batches, states = [], []
    for a in itertools.islice(stored, 5):
        states.append(rendered.get_state())
        batches.append(next(rendered))
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1.01 / 255), a, batches[-1])
    for k in (3, 1):
        rendered.set_state(states[k])
        jax.tree.map(np.testing.assert_array_equal, next(rendered), batches[k])
    stored.close(), rendered.close()


def test_threads_may_ask_at_the_same_time(config):
    source = RenderedSource(config, "train")
    alone = [source[index].views([0, 25, 12, 8]) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda index: source[index].views([0, 25, 12, 8]), range(4)))
    jax.tree.map(np.testing.assert_array_equal, alone, together)


def test_what_cannot_be_rendered_on_demand_is_refused(config, tmp_path):
    with pytest.raises(ValueError, match="on_demand renders a ProceduralSource, got FolderSource"):
        DataConfig(FolderSource(str(tmp_path)), on_demand=True)
    with pytest.raises(ValueError, match="neither data"):
        dataclasses.replace(config, root=str(tmp_path))
    with pytest.raises(ValueError, match="processes must be 0, got 2"):
        training_dataset(RenderedSource(config, "train"), **BATCHES, config=PipelineConfig(processes=2))
    with pytest.raises(ValueError, match="no objects of split 'unseen_family'"):
        open_data(config, tmp_path, "unseen_family")
