"""How the files beside this were made, by version 0.1.0. They are the past and are not made anew.
`test_made_before.py` says what each is."""
import json
import os
import shutil
import sys
from pathlib import Path
HERE = Path(__file__).parent
os.environ["RDD_STORE"] = str(HERE / "store" / "cells")
sys.path.insert(0, str(HERE.parent))
import torch
import test_made_before as past
from rdd_lib.compressed import save
torch.set_num_threads(1)


def interrupted(run, *args, **more):
    "The run up to the question at which the model, or the log, has enough."
    try: run(*args, **more)
    except past.Stop: return
    raise AssertionError(f"{args} came to its end")


class Log(list):
    "Takes the losses of two iterations."
    def append(self, loss):
        if len(self) == 2: raise past.Stop
        super().append(loss)


def cells():
    for fn in past.GRIDS: past.run_grid(past.cells_of(fn), fn, progress=False)
    for path in (HERE / "store" / "compressed").iterdir():                 # one is enough
        if "Random" not in path.name: path.unlink()
    for kind in ("experts", "evaluations"): shutil.rmtree(HERE / "store" / kind, ignore_errors=True)


def kept():
    for experts in past.EXPERTS.values(): experts(past.TINY, past.digits(), device="cpu")
    for attack in past.ATTACKED.values(): past.signals(past.digits(), past.PROXY, attack, "cpu")


def checkpoints():
    at = HERE / "checkpoints"
    for name, stop in past.EVALUATIONS.items(): interrupted(past.evaluation, at / name, stop)
    for name in past.RUNS:
        _, whole = past.smoothing(name)
        interrupted(past.smoothing, name, at / name, 3 * whole // 5 + 1)
    for name in past.DISTILLERS: interrupted(past.distilled, name, at / name, Log())


def in_the_cache():
    "What the file of an evaluation is called there: what it holds is kept as a checkpoint."
    folder = HERE / "store" / "evaluations"
    interrupted(past.evaluation, True, past.EVALUATIONS["fab"])
    path, = folder.iterdir()
    assert path.read_bytes() == (HERE / "checkpoints" / "fab").read_bytes()
    shutil.rmtree(folder)
    return path.name


def sets():
    found = {name: past.compress(name) for name in past.SETS}
    for name, made in found.items(): save(made, HERE / "compressed" / f"{name}.safetensors")
    facts = {name: past.facts(made) for name, made in found.items()}
    told = {"torch": str(torch.__version__), "evaluation": in_the_cache(), "sets": facts}
    (HERE / "made.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    assert not (HERE / "store").exists(), "the files are there; they are the past"
    for make in (cells, kept, checkpoints, sets): make()
