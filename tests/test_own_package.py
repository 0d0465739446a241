"""The template for other people's packages, docs/own_package: installed beside the library, it is found, and it works.

It goes into a folder of its own, without a network, and only the process that is started here looks there."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path
import pytest
import typer
from rdd_lib import cli

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "docs/own_package"
SCORE = "score nm.safetensors --net two_layers --train blend --attack sign_steps --n-test 50 --set steps=20"
# What is typed, in this order; all in one process, for it takes seconds to load torch.
TYPED = {"list": "list --json",
         "compress": "compress nearest_mean mnist5k --ipc 1 -o nm.safetensors",
         "plan": "compress NM mnist5k --ipc 1 --set norm=1 --plan",
         "odd": "compress nearest_mean mnist5k --ipc 1 --set nrm=1",
         "score": SCORE,
         "otherwise": f"{SCORE} --set net.settings.width=8 --set objective.share=1 --set objective.steps=2 "
                      "--set attack.steps=9",
         "data": "data stripes"}
SHELL = """
import contextlib, io, json, sys
from rdd_lib import cli
told = {}
for name, line in json.loads(sys.argv[1]).items():
    sys.argv[1:] = line.split()
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try: cli.main()
        except SystemExit as left: told[name] = left.code or 0, out.getvalue(), err.getvalue()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    "name: (exit code, output, complaints) of what is typed where the package is installed, and a broken one beside it."
    folder = tmp_path_factory.mktemp("own")
    there, broken = folder / "there", folder / "there/broken-1.dist-info"
    words = ["install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check",
             "--target", there, PACKAGE]
    done = subprocess.run([sys.executable, "-m", "pip", *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    broken.mkdir()
    (broken / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1\n")
    (broken / "entry_points.txt").write_text("[rdd_lib.methods]\ngone = broken:Gone\n")
    env = os.environ | {"PYTHONPATH": f"{there}{os.pathsep}{ROOT}", "RDD_STORE": str(folder / "store/cells"),
                        "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SHELL, json.dumps(TYPED)], cwd=folder, env=env, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_all_five_are_listed_behind_the_librarys_own(told):
    code, out, err = told["list"]
    found = json.loads(out)
    last = {kind: found[kind][-1]["name"] for kind in found if kind not in ("papers", "protocols")}
    assert code == 0 and last == {"data": "stripes", "methods": "nearest_mean", "models": "two_layers",
                                  "objectives": "blend", "attacks": "sign_steps"}
    assert found["methods"][-1] == {"name": "nearest_mean", "short": "nm", "settings": ["norm"],
                                    "what": "The images nearest to the mean of their class. you, 2026."}
    assert found["models"][-1]["settings"] == ["width=64"]


def test_a_broken_package_is_named_and_passed_over(told):
    _, out, err = told["list"]
    assert len(err.splitlines()) == 1 and "the method 'gone' of 'broken:Gone' cannot be loaded" in err
    assert "it is passed over" in err and "gone" not in out and not told["compress"][2]


def test_the_method_the_student_its_training_and_the_attack_work(told):
    assert [told[name][0] for name in ("compress", "score", "otherwise")] == [0, 0, 0], told
    assert "NearestMean: norm=2.0" in told["compress"][1] and "10 images of 1x28x28" in told["compress"][1]
    said = "10 images of mnist5k; blend training of two_layers; sign_steps attack, Linf(eps=0.1); 50 test images"
    for name in ("score", "otherwise"): assert told[name][1].startswith(said) and "robust" in told[name][1]


def test_their_settings_can_be_set(told):
    assert json.loads(told["plan"][1]) == {"is": "NearestMean", "norm": 1.}
    assert told["odd"][0] == 2 and "did you mean 'norm'?" in told["odd"][2]
    assert told["otherwise"][1] != told["score"][1]


def test_the_data_set_is_shown(told):
    code, out, _ = told["data"]
    assert code == 0 and "500 noisy images of stripes" in out
    assert re.search(r"across +200 +50\n +upright +200 +50", out)


def shown():
    "The `rdd` lines of the page."
    page = (ROOT / "docs/own.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, re.S | re.M)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.startswith("rdd ")]


@pytest.mark.parametrize("line", shown())
def test_the_commands_of_the_page_exist(line):
    "Their names, arguments and options; none is run."
    _, name, *words = line.split()
    typer.main.get_command(cli.app).commands[name].make_context(name, words)
