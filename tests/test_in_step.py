"""rdd_lib/ is what nbs/ exports, the notebooks are clean, and README.md is what the index says."""
import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def files(folder, *ends):
    return {p.relative_to(folder) for p in folder.rglob("*") if p.suffix in ends and not any(part[0] == "." or part == "__pycache__" for part in p.relative_to(folder).parts)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the checkout in which nbdev has exported and cleaned."
    copy = tmp_path_factory.mktemp("copy") / "rdd_lib"
    copy.mkdir()
    for name in ("nbs", "rdd_lib"): shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    for name in ("settings.ini", "pyproject.toml", "setup.py"): shutil.copy(ROOT / name, copy)
    shutil.rmtree(copy / "rdd_lib")
    (copy / "rdd_lib").mkdir()
    for command in ("nbdev_export", "nbdev_clean"):
        done = subprocess.run([BIN / command], cwd=copy, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(copy)})
        assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.parametrize("folder, end", [("rdd_lib", ".py"), ("nbs", ".ipynb")])
def test_notebooks_and_library_agree(exported, folder, end):
    ours, made = ROOT / folder, exported / folder
    extra, missing = files(ours, end) - files(made, end), files(made, end) - files(ours, end)
    differ = [str(p) for p in sorted(files(ours, end) & files(made, end)) if not filecmp.cmp(ours / p, made / p, shallow=False)]
    assert not (extra or missing or differ), f"{folder}: run nbdev_export and nbdev_clean. Only here: {sorted(extra)}; lacking: {sorted(missing)}; different: {differ}"


def test_readme_is_the_index():
    done = subprocess.run([sys.executable, ROOT / "tests" / "readme.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (ROOT / "README.md").read_text(encoding="utf-8") == done.stdout, "README.md is not what nbs/index.ipynb says: run `make readme`"


def test_no_notebook_sets_the_number_of_threads():
    "It would hold for every notebook that runs after it in the same process, and threads on shared cores wait for each other."
    for path in (ROOT / "nbs").rglob("[!.]*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        assert not [s for s in sources if "set_num_threads" in s and not s.startswith("#| export")], path.name
