"""`geolrm data`: sets of objects made, checked and rendered; each job is a function of the table at the end."""

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from geolrm_jax.data_render_cli import render
from geolrm_jax.runtime import logging

Arguments = Sequence[str]


def run(arguments: Arguments, program: str) -> None:
    """Runs `geolrm data JOB ...`; raises ValueError or OSError for what a user can mend."""
    parser = argparse.ArgumentParser(prog=program, description="Sets of objects: render, build, check.")
    parser.add_argument("job", choices=JOBS, help="; ".join(f"{name}: {job.__doc__}" for name, job in JOBS.items()))
    job = parser.parse_args(arguments[:1]).job
    JOBS[job](arguments[1:], f"{program} {job}")


@contextlib.contextmanager
def shown_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A function (split, objects done, objects in all) that shows a bar for each split."""
    with contextlib.ExitStack() as stack:
        bars: dict[str, logging.Progress] = {}

        def advance(split: str, done: int, total: int) -> None:
            if split not in bars:
                bars[split] = stack.enter_context(
                    logging.progress(f"{split} objects", total, start=done, unit="object")
                )
            bars[split].update(done)

        yield advance


def build(arguments: Arguments, program: str) -> None:
    """write a source's objects into a set that training reads"""
    parser = argparse.ArgumentParser(prog=program, description=build.__doc__)
    parser.add_argument("source", choices=("gobjaverse", "procedural"))
    parser.add_argument("--source", dest="root", type=Path, metavar="DIR", help="where the objects lie")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the set to make")
    known = parser.parse_args(arguments)

    from geolrm_jax.data.builders.records import DataConfig
    from geolrm_jax.data.builders.records import build as build_set
    from geolrm_jax.data.folder import FolderSource
    from geolrm_jax.data.procedural import ProceduralSource

    source = ProceduralSource() if known.source == "procedural" else FolderSource(str(known.root))
    with shown_progress() as advance:
        build_set(DataConfig(source), known.out, advance=advance)


JOBS = {"build": build, "render": render}
