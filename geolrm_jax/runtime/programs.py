"""Compiled programs, kept from run to run: JAX's persistent compilation cache, on unless it is set otherwise."""

import os
import platform
import zlib
from pathlib import Path

import jax

VARIABLE = "JAX_COMPILATION_CACHE_DIR"


def keep_between_runs() -> None:
    """Lets this process find the programs that earlier runs of this user compiled, and leave its own.

    They lie in `$XDG_CACHE_HOME/geolrm_jax`, or `~/.cache/geolrm_jax`, unless JAX_COMPILATION_CACHE_DIR names another
    folder; where that is set and empty, none are kept. It changes nothing once JAX has compiled something.
    """
    if VARIABLE in os.environ or jax.config.jax_compilation_cache_dir:
        return
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(base):  # "~" stays where a user has no home
        jax.config.update("jax_compilation_cache_dir", os.path.join(base, "geolrm_jax", f"programs-{instructions()}"))


def instructions() -> str:
    """Names what this machine's CPU understands: machines that share a home must not share programs for their CPUs."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else [platform.processor()]
    told = next((line for line in lines if line.startswith(("flags", "Features"))), lines[0])
    return f"{platform.machine()}-{zlib.crc32(told.encode()):08x}"
