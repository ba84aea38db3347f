"""The floors of docs/architecture.md, checked by import-linter with the contract in pyproject.toml."""

import subprocess
import sys
from pathlib import Path


def test_no_import_runs_upward(request):
    command = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([command], cwd=request.config.rootpath, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    assert "0 broken" in run.stdout


def test_tensorflow_is_never_imported():
    program = (
        "import sys, geolrm_jax.recipe, geolrm_jax.cli\n"
        "assert not [m for m in sys.modules if m == 'tensorflow' or m.startswith('tensorflow.')]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
