"""rdd_lib/ is what nbs/ exports, the notebooks are clean, and the pages made from notebooks are what those say."""
import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
import readme

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def files(folder, *ends):
    found = {p.relative_to(folder) for p in folder.rglob("*") if p.suffix in ends}
    return {p for p in found if not any(part[0] == "." or part == "__pycache__" for part in p.parts)}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the checkout in which nbdev has exported and cleaned."
    copy = tmp_path_factory.mktemp("copy") / "rdd_lib"
    copy.mkdir()
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in ("nbs", "rdd_lib"): shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in ("settings.ini", "pyproject.toml", "hatch_build.py"): shutil.copy(ROOT / name, copy)
    shutil.rmtree(copy / "rdd_lib")
    (copy / "rdd_lib").mkdir()
    for command in ("nbdev_export", "nbdev_clean"):
        env = os.environ | {"PYTHONPATH": str(copy)}
        done = subprocess.run([BIN / command], cwd=copy, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.parametrize("folder, end", [("rdd_lib", ".py"), ("nbs", ".ipynb")])
def test_notebooks_and_library_agree(exported, folder, end):
    ours, made = ROOT / folder, exported / folder
    extra, missing = files(ours, end) - files(made, end), files(made, end) - files(ours, end)
    both = files(ours, end) & files(made, end)
    differ = [str(p) for p in sorted(both) if not filecmp.cmp(ours / p, made / p, shallow=False)]
    assert not (extra or missing or differ), (
        f"{folder}: run nbdev_export and nbdev_clean. Only here: {sorted(extra)}; lacking: {sorted(missing)}; "
        f"different: {differ}")


@pytest.mark.parametrize("name", readme.PAGES)
def test_pages_are_what_the_notebooks_say(name):
    assert (ROOT / name).read_text(encoding="utf-8") == readme.page(name), f"{name} is out of step: run `make readme`"


def test_no_notebook_sets_the_number_of_threads():
    "It would hold for all notebooks that run after it in the process: threads on shared cores wait for each other."
    for path in (ROOT / "nbs").rglob("[!.]*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        sources = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
        assert not [s for s in sources if "set_num_threads" in s and not s.startswith("#| export")], path.name
