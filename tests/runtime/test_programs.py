import os
import subprocess
import sys

PROGRAM = """
import jax
from geolrm_jax.runtime import programs
programs.keep_between_runs()
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: x * 2 + 1)(3.0)
print(jax.config.jax_compilation_cache_dir)
"""


def run(tmp_path, **variables) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), **variables}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_programs_are_kept_in_the_users_cache_folder(tmp_path):
    folder = run(tmp_path)
    assert folder.startswith(str(tmp_path / "geolrm_jax"))
    assert any(os.scandir(folder))


def test_jaxs_own_variable_decides(tmp_path):
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine")) == str(tmp_path / "mine")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR="") in ("", "None")
    assert not (tmp_path / "geolrm_jax").exists()
