"""What to do with twelve minutes on a GPU: all that only a real one can tell, into one folder and one tar.

    python benchmarks/gpu.py [--minutes 12] [--only tests attacks] [--rehearse] [--out FOLDER] [--keep 40] [--list]

Stages run one after another, each a command with a share of the time; what one leaves over the later ones have. One
that fails, or is stopped when its time is over, stops no other. FOLDER (runs/gpu-<device>) gets <stage>.log, what the
stage wrote in <stage>/, and summary.json; FOLDER.tar.gz holds all of it after every stage, and after Ctrl-C. The rows
of the papers keep their cells and checkpoints in FOLDER/store and go on from there; of that the tar takes the smallest
files, --keep megabytes of them.

--rehearse takes tiny sizes: whether every stage runs. Where there is no GPU it is chosen, on the pretend one of
tests/pretend_gpu, and without a C++ compiler on the CPU. Python is the one that runs this; the checkout need not be
installed.
"""
import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GRACE = 5.          # seconds between being asked to stop and being stopped


@dataclass(frozen=True)
class Stage:
    "A command of Python's; {out} is its folder, {device} cuda or cpu."
    name: str
    seconds: float       # its share, in twelve minutes
    command: str
    full: str = ""       # what is added on a GPU,
    small: str = ""      # and in a rehearsal
    bars: bool = False   # progress, as lines of its log

    def words(self, out, device, rehearse):
        words = shlex.split(f"{self.command} {self.small if rehearse else self.full}")
        return [sys.executable, *(word.format(out=out, device=device) for word in words)]


ROW = "benchmarks/rows.py {} --device {{device}} --out {{out}}/rows.csv --set methods={} --set {}=1"
STAGES = (
    Stage("tests", 150, "-m pytest -vv -p no:cacheprovider -m gpu --junitxml={out}/tests.xml tests/test_gpu.py",
          "tests/test_waits.py tests/test_squeeze.py tests/test_generative.py --durations=10",
          "-k 'attacks or training or papers or devices'"),
    Stage("waits", 60, "benchmarks/waits.py --beside benchmarks/waits.csv --out {out}/waits.csv",
          small="--only evaluation"),
    Stage("students", 100, "benchmarks/students.py --device {device} --only 'width 16' --out {out}/students.csv",
          "--students 5 20 50 --seconds 1 --repeats 1", "--quick --students 2"),
    Stage("attacks", 80, "benchmarks/attacks.py --device {device} --out {out}/attacks.csv",
          "--standard 100 --repeats 1", "--quick"),
    Stage("distill", 110, "benchmarks/distill.py --device {device} --out {out}/distill.csv",
          "--data cifar10 --ipc 10 --repeats 1 --seconds .5", "--quick --ipc 2 --methods dsa tm real"),
    Stage("table1", 60, ROW.format("mcs/table1", "Rand", "seeds") + " --set readings=pixel",
          "--profile paper --data cifar10 mnist mnist5k --set n_test=1000", "--set n_test=20 --set steps=3", True),
    Stage("transfer", 140, ROW.format("guard/transfer", "SRe2L", "sets") + " --set ipcs=1 --set attacks=PGD100",
          "--profile paper --data cifar10 mnist5k --set students=1 --set n_test=500",
          "--set iterations=2 --set epochs=1 --set n_test=10", True))


# ---- the device ----------------------------------------------------------------------------------------------------

ASK = """import json, sys
sys.path.insert(0, "tests")
import torch, pretend_gpu
told = {"torch": torch.__version__, "cuda": torch.version.cuda, "why": pretend_gpu.install()}
if not told["why"]:
    told |= {"kind": "pretended" if pretend_gpu.pretended() else "real", "env": pretend_gpu.environment()}
    with pretend_gpu.present():
        found = torch.cuda.get_device_properties(0)
        told |= {"name": found.name, "bytes": found.total_memory}
    if told["kind"] == "real": told["cudnn"] = torch.backends.cudnn.version()
print(json.dumps(told))"""

def said(*command):
    "The last line of what a command prints, or nothing; and of what it complains of."
    try: done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as e: return "", str(e)
    return [text.strip().rpartition("\n")[2] for text in (done.stdout, done.stderr)]

def machine():
    "The device, what drives it, and what is run on it."
    told, complaint = said(sys.executable, "-c", ASK)
    nothing = {"kind": "none", "name": "cpu", "env": {}, "why": complaint}
    driver, _ = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    commit, _ = said("git", "describe", "--always", "--dirty", "--exclude=*")
    about = {"driver": driver, "commit": commit, "python": sys.version.split()[0],
             "date": time.strftime("%Y-%m-%d %H:%M")}
    return nothing | json.loads(told or "{}") | about


# ---- a stage -------------------------------------------------------------------------------------------------------

def surroundings(stage, out, given):
    "The environment of a stage: the checkout, a store of its own."
    path = [given.get("PYTHONPATH"), str(ROOT), os.environ.get("PYTHONPATH")]
    own = {"PYTHONPATH": os.pathsep.join(filter(None, path)), "RDD_STORE": str(out / "store" / stage.name / "cells"),
           "PYTHONUNBUFFERED": "1", "MPLBACKEND": "Agg", "TQDM_DISABLE": "" if stage.bars else "1"}
    return {"OMP_NUM_THREADS": "1"} | os.environ | own

def end(child):
    """Nobody of a group outlives its stage. First it is interrupted: then pytest says what failed so far, and a row
    writes down what it has."""
    with suppress(ProcessLookupError, PermissionError):
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGINT)
            with suppress(subprocess.TimeoutExpired): child.wait(GRACE)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()

def run(command, log, env, seconds):
    "How a command ended, in a process group of its own, and the last line that it wrote by then."
    with open(log, "wb") as file:
        child = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=file,
                                 stderr=subprocess.STDOUT, start_new_session=True)
        try: return "failed" if child.wait(seconds) else "ok", last_line(log)
        except subprocess.TimeoutExpired: return "out of time", last_line(log)
        finally: end(child)

def last_line(log):
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
    return lines[-1].strip()[:200]


# ---- all of them ---------------------------------------------------------------------------------------------------

def go(stages, out, seconds, device, rehearse, keep=40):
    "Runs the stages in at most so many seconds; the rows of the summary. `device` is as from `machine`."
    out.mkdir(parents=True, exist_ok=True)
    rows = [{"stage": stage.name, "ended": "not run", "seconds": 0., "last": ""} for stage in stages]
    finish = time.monotonic() + seconds
    try:
        for k, (stage, row) in enumerate(zip(stages, rows)):
            share = stage.seconds / sum(later.seconds for later in stages[k:])
            row["ended"], start = "interrupted", time.monotonic()
            try: row["ended"], row["last"] = one(stage, out, share * (finish - start), device, rehearse)
            finally: row["seconds"] = round(time.monotonic() - start, 1)
            print(line(row), flush=True)
            keep_all(rows, out, device, rehearse, keep)
    finally: keep_all(rows, out, device, rehearse, keep)
    return rows

def one(stage, out, seconds, device, rehearse):
    folder = out / stage.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    env = surroundings(stage, out, device["env"])
    command = stage.words(folder, "cpu" if device["kind"] == "none" else "cuda", rehearse)
    return run(command, out / f"{stage.name}.log", env, max(1., seconds - GRACE))

def line(row):
    why = "" if row["ended"] == "ok" else f"   {row['last']:.60}"
    return f"{row['stage']:10} {row['ended']:12} {row['seconds']:6.1f} s{why}"

def keep_all(rows, out, device, rehearse, keep):
    "Summary and tar, each written whole."
    taken, left = within(out / "store", keep * 1e6)
    about = {name: value for name, value in device.items() if name != "env"}
    summary = {"rehearsed": rehearse, "device": about, "stages": rows,
               "not in the tar": [str(p.relative_to(out)) for p in left]}
    whole(out / "summary.json", lambda tmp: tmp.write_text(json.dumps(summary, indent=1)))
    others = [p for p in out.rglob("*") if p.is_file() and p.relative_to(out).parts[0] != "store"]
    whole(Path(f"{out}.tar.gz"), lambda tmp: pack(tmp, out, sorted(others) + taken))

def within(folder, limit):
    "Its files in two: the smallest, as long as there is room, and those that are too much."
    files = sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    taken = []
    while files and files[0].stat().st_size <= limit:
        limit -= files[0].stat().st_size
        taken.append(files.pop(0))
    return taken, files

def pack(path, out, files):
    with tarfile.open(path, "w:gz") as tar:
        for file in files: tar.add(file, f"{out.name}/{file.relative_to(out)}")

def whole(path, write):
    "A file appears when it is complete."
    tmp = path.with_name(f".{path.name}.part")
    write(tmp)
    os.replace(tmp, path)

def stop(*_): raise KeyboardInterrupt


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=12., help="for all of it")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes; so it is where there is no GPU")
    parser.add_argument("--out", type=Path, help="the folder; its tar lies beside it")
    parser.add_argument("--keep", type=float, default=40., help="megabytes of the store that go into the tar")
    parser.add_argument("--list", action="store_true", help="the stages and their seconds, and that is all")
    asked = parser.parse_args()
    stages = [stage for stage in STAGES if stage.name in asked.only]
    if asked.list: return print(*(f"{s.name:10} {s.seconds:4.0f}  {s.command} {s.full}" for s in stages), sep="\n")
    signal.signal(signal.SIGTERM, stop)
    start, device = time.monotonic(), machine()
    rehearse = asked.rehearse or device["kind"] != "real"
    told = {"real": "", "pretended": ", which is pretended", "none": f", for there is no GPU ({device['why']})"}
    if device["driver"] and device["kind"] != "real": print("nvidia-smi tells of a GPU that torch cannot use")
    print(f"{'rehearsing' if rehearse else 'running'} on {device['name']}{told[device['kind']]}", flush=True)
    slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-")
    out = (asked.out or ROOT / "runs" / f"gpu-{slug}{'-rehearsed' if asked.rehearse else ''}").resolve()
    try: rows = go(stages, out, 60 * asked.minutes - (time.monotonic() - start), device, rehearse, asked.keep)
    except KeyboardInterrupt: sys.exit(f"interrupted; what there is: {out}.tar.gz")
    print(f"\n{device['name']}, {device['date']}", *map(line, rows), f"{out}.tar.gz", sep="\n")
    sys.exit(any(row["ended"] != "ok" for row in rows))


if __name__ == "__main__": main()
