"""Every example runs to its last assertion, and the README's code runs as printed."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, folder: Path) -> None:
    env = {**os.environ, "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_example(path, tmp_path):
    source = path.read_text()
    assert "assert " in source.split("# %%")[-1], f"{path.name} must end in an assertion of a number"
    run(f"import runpy; runpy.run_path({str(path)!r}, run_name='__main__')", tmp_path)


@pytest.mark.slow
def test_readme(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks, "the README shows no Python code"
    for block in blocks:
        run(block, tmp_path)


def test_readme_names_only_make_targets_that_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?m)(?:^|`)make ([\w-]+)", (ROOT / "README.md").read_text())) <= targets
