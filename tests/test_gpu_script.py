"""`make gpu`: stages are bounded, know nothing of each other, and whatever happens, what there is lies in one tar."""
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
import pretend_gpu
import pytest
import torch
from conftest import FULL

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("script_for_a_gpu", ROOT / "benchmarks" / "gpu.py")
script = importlib.util.module_from_spec(_spec)
sys.modules["script_for_a_gpu"] = script                     # dataclasses look there
_spec.loader.exec_module(script)
Stage, NONE = script.Stage, {"kind": "none", "name": "cpu", "env": {}, "driver": ""}

FAILS = "import sys; sys.exit('said why')"
HANGS = ("import subprocess, sys, time; print('begun', flush=True); "
         "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); time.sleep(60)")
PRINTS = ("import os; from pathlib import Path; print('on {device}', os.environ['RDD_STORE']); "
          "Path('{out}/a.csv').write_text('1')")
STAGES = [Stage("fails", 3, f'-c "{FAILS}"'), Stage("hangs", 3, f'-c "{HANGS}"'), Stage("prints", 94, f'-c "{PRINTS}"')]
STOPPED = """import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)         # who is started by `nohup ... &` would not hear it
sys.path.insert(0, 'benchmarks')
import gpu
from gpu import Stage
gpu.STAGES, gpu.machine = {stages}, lambda: {device}
gpu.main()"""


@pytest.fixture(autouse=True)
def quick(monkeypatch): monkeypatch.setattr(script, "GRACE", .5)


def members(tar):
    with tarfile.open(tar) as t: return {m.name.partition("/")[2]: t.extractfile(m).read() for m in t}


def test_one_fails_one_hangs_one_prints(tmp_path, capsys):
    out, start = tmp_path / "gpu-cpu", time.monotonic()
    rows = script.go(STAGES, out, 100., NONE, False)
    assert [row["ended"] for row in rows] == ["failed", "out of time", "ok"] and time.monotonic() - start < 20
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["fails", "hangs", "prints"]
    found = members(f"{out}.tar.gz")
    assert b"said why" in found["fails.log"] and found["hangs.log"].startswith(b"begun")
    assert b"on cpu" in found["prints.log"] and found["prints/a.csv"] == b"1"
    summary = json.loads(found["summary.json"])
    assert summary["stages"] == rows and summary["device"] == {"kind": "none", "name": "cpu", "driver": ""}
    assert [row["last"] for row in rows[:2]] == ["said why", "begun"]
    assert not [p for p in tmp_path.rglob("*") if p.name.endswith(".part")]


def test_nobody_outlives_a_stage(tmp_path):
    note = tmp_path / "pid"
    child = f"import os, time; open('{note}', 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert script.run([sys.executable, "-c", parent], tmp_path / "log", os.environ, 3.)[0] == "out of time"
    with pytest.raises(ProcessLookupError):
        for _ in range(50):
            os.kill(int(note.read_text()), 0)
            time.sleep(.1)


def test_time_that_is_left_over_is_for_those_that_come(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(script, "run", lambda command, log, env, seconds: given.append(seconds) or ("ok", ""))
    script.go([Stage("a", 1, ""), Stage("b", 1, ""), Stage("c", 2, "")], tmp_path / "o", 80., NONE, False)
    assert [round(s + script.GRACE) for s in given] == [20, 27, 80]


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM])
def test_what_there_is_goes_in_when_it_is_stopped(tmp_path, by):
    code = STOPPED.format(stages=STAGES[1:], device=NONE | {"why": "none here"})
    running = subprocess.Popen([sys.executable, "-c", code, "--out", tmp_path / "o"], cwd=ROOT, text=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    log = tmp_path / "o" / "hangs.log"
    while running.poll() is None and not (log.exists() and log.read_text()): time.sleep(.05)
    running.send_signal(by)
    assert "what there is" in running.communicate(timeout=30)[1] and running.returncode == 1
    ended = [row["ended"] for row in json.loads(members(tmp_path / "o.tar.gz")["summary.json"])["stages"]]
    assert ended == ["interrupted", "not run"]


def test_of_the_store_the_tar_takes_what_has_room(tmp_path):
    store = tmp_path / "o" / "store" / "row"
    store.mkdir(parents=True)
    for name, size in (("cell", 10), ("set", 3000), ("teacher", 5000)): (store / name).write_bytes(bytes(size))
    script.go([], tmp_path / "o", 1., NONE, False, keep=.004)
    found = members(tmp_path / "o.tar.gz")
    assert {"store/row/cell", "store/row/set"} < {*found} and "store/row/teacher" not in found
    assert json.loads(found["summary.json"])["not in the tar"] == ["store/row/teacher"]


def test_it_finds_the_gpu(gpu):
    found = script.machine()
    assert found["kind"] == ("pretended" if pretend_gpu.pretended() else "real"), found["why"]
    assert found["name"] == torch.cuda.get_device_name()


def test_without_torch_it_says_why(monkeypatch):
    monkeypatch.setattr(script, "ASK", "raise ImportError('no torch here')")
    found = script.machine()
    assert found["kind"] == "none" and found["why"] == "ImportError: no torch here"


def test_every_stage_names_what_there_is():
    for stage in script.STAGES:
        for rehearse in (True, False):
            files = [w for w in stage.words("o", "cuda", rehearse) if w.startswith(("tests/", "benchmarks/"))]
            assert files and all((ROOT / w).exists() for w in files)
    assert sum(stage.seconds for stage in script.STAGES) <= 720


def test_the_tests_of_the_first_stage_are_all_that_need_a_gpu():
    need = {f"tests/{p.name}" for p in (ROOT / "tests").glob("test_*.py")
            if re.search(r"(?m)^def test_\w+\([^)]*\bgpu\b", p.read_text(encoding="utf-8"))}
    need -= {"tests/test_pretend_gpu.py", "tests/test_gpu_script.py", "tests/test_rehearsal.py"}   # pages, not devices
    assert need == need & {*script.STAGES[0].words("o", "cuda", False)}


@pytest.mark.skipif(not FULL, reason="minutes; make test-all, and make gpu")
def test_the_whole_rehearsal(tmp_path):
    if why := pretend_gpu.install(): pytest.skip(why)
    words = "benchmarks/gpu.py", "--rehearse", "--minutes", "30", "--out", tmp_path / "o"
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    found = members(tmp_path / "o.tar.gz")
    assert all(f"{s.name}.log" in found for s in script.STAGES)
    assert {"waits/waits.csv", "students/students.csv", "attacks/attacks.csv", "distill/distill.csv", "table1/rows.csv",
            "transfer/rows.csv", "tests/tests.xml"} < {*found}
