"""How often the host waits for the GPU in one step of each flow, counted on the pretend GPU of tests/pretend_gpu: by running n and 2n steps and comparing. No GPU is needed,
a C++ compiler is. Copies count that block, either way, and numbers that are asked for (`item`, `nonzero`, a mask as an index, ...).

    python benchmarks/waits.py [--only distill] [--where] [--beside benchmarks/waits.csv] [--out benchmarks/waits.csv]

--where lists the lines that wait. --beside puts the counts of an earlier table next to these, as `before`.
"""
import argparse
import collections
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
import pandas as pd
import torch
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import pretend_gpu
from rdd_lib.coresets.signals import Proxy, read, signals
from rdd_lib.covering.distances import space_of
from rdd_lib.covering.set_cover import farthest_first
from rdd_lib.data import ImageSet
from rdd_lib.core import generator
from rdd_lib.distill.backprop import BackpropThroughTraining
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.gradient import GradientMatching
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import Net
from rdd_lib.robust.attacks import APGD, APGDT, MIFGSM, PGD, attack_until_broken
from rdd_lib.robust.carlini_wagner import CW
from rdd_lib.robust.certified import certify
from rdd_lib.robust.curvature import Curvature
from rdd_lib.robust.evaluation import evaluate, save_table
from rdd_lib.robust.fab import FAB
from rdd_lib.robust.objectives import Adversarial
from rdd_lib.robust.smoothing import Noisy, Smoothed
from rdd_lib.robust.square import Square
from rdd_lib.robust.threats import L2, Linf
from rdd_lib.robust.training import OBJECTIVES, Trainer, objective_of

GPU, NET = "cuda", Net("convnet", dict(width=2, depth=1))


@cache
def data():
    "Three classes of noise, 8 x 8."
    g = generator(0)
    return ImageSet((torch.rand(36, 1, 8, 8, generator=g) * 255).byte(), torch.arange(36) % 3, "abc", "noise")

@cache
def judged():
    "A network on the GPU, and images with the labels that it gives."
    model, x = NET(data(), 0).to(GPU), data().images(GPU)
    with torch.no_grad(): return model, x, model(x).argmax(1)


# ---- flows: name -> a function that takes n steps -----------------------------------------------------------------------------------------------------------

def training(objective, **settings):
    run = {k: settings.pop(k) for k in ("watch", "log") if k in settings}
    return lambda n: Trainer(objective, steps=n, batch=12, **settings)(NET, data(), 0, GPU, **run)

def objectives():
    made = {name: objective_of(name, Linf(.1), **({"eta": .1} if name == "generalized" else {})) for name in OBJECTIVES}
    return made | {"noisy": Noisy(.1), "adversarial, square": Adversarial(Square(Linf(.1), 4)), "adversarial, apgd": Adversarial(APGD(Linf(.1), steps=5))}

def attacked(make):
    "An evaluation in which nothing breaks."
    return lambda n: attack_until_broken(make(n), *judged())

def climbed(make):
    return lambda n: make(n)(*judged(), generator(0, device=GPU))

TINY, SHORT = Linf(1e-6), L2(1e-6)
ATTACKS = {"pgd": lambda n: PGD(TINY, n), "pgd, l2": lambda n: PGD(SHORT, n), "mifgsm": lambda n: MIFGSM(TINY, n), "apgd-ce": lambda n: APGD(TINY, "ce", n), "apgd-dlr": lambda n: APGD(TINY, "dlr", n),
           "apgd-t": lambda n: APGDT(TINY, steps=n, targets=1), "cw": lambda n: CW(SHORT, steps=n), "fab": lambda n: FAB(TINY, n, 1), "fab, l2": lambda n: FAB(SHORT, n, 1),
           "square": lambda n: Square(TINY, n), "square, l2": lambda n: Square(SHORT, n)}

def distilled(method, **settings):
    return lambda n: method(net=NET, batch_real=8, **settings, iterations=n).compress(data(), ipc=2, device=GPU)

def led(unit="iterations", **settings):
    def run(n):
        steps = {"iterations": 1, "student_steps": 2} | {unit: n}
        experts = Experts(n=1, epochs=2, batch=12)
        with tempfile.TemporaryDirectory() as folder:
            experts(NET, data(), 2, folder, "cpu")
            TrajectoryMatching(net=NET, experts=experts, max_start=1, expert_epochs=1, **settings, **steps).compress(data(), ipc=2, device=GPU, buffers=folder)
    return run

def smoothed(n, **settings): Smoothed(judged()[0], .1, 10, **settings).counts(judged()[1][0], 10 * n, generator(0))

def proxied(n):
    signals(data(), Proxy(NET, Trainer(steps=n, batch=12)), device=GPU, keep=False)

FLOWS = {f"training: {name}": training(o) for name, o in objectives().items()} | {
    "training: augmented": training(objectives()["standard"], augment="color_crop_cutout_flip_scale_rotate"), "training: with log=": training(objectives()["standard"], log=[]),
    "training: of a proxy": proxied} | {
    f"evaluation: {name}": attacked(make) for name, make in ATTACKS.items()} | {f"attack: {name}": climbed(make) for name, make in ATTACKS.items() if "fab" not in name and name != "apgd-t"} | {
    "distill: dm, iteration": distilled(DistributionMatching), "distill: dc, iteration": distilled(GradientMatching, outer=1, inner=1),
    "distill: dc, step on the images": lambda n: distilled(GradientMatching, outer=n, inner=1)(1), "distill: dc, inner step": lambda n: distilled(GradientMatching, outer=2, inner=n)(1),
    "distill: dsa, inner step": lambda n: distilled(GradientMatching, outer=2, inner=n, augment="crop_scale_cutout", init="real")(1),
    "distill: dsa, iteration": distilled(GradientMatching, outer=1, inner=1, augment="crop", init="real"),
    "distill: guard, iteration": distilled(GradientMatching, outer=1, inner=1, real_objective=Curvature()),
    "distill: dc of PGD-3, iteration": distilled(GradientMatching, outer=1, inner=1, real_objective=Adversarial(PGD(Linf(.1), 3))),
    "distill: dd, iteration": distilled(BackpropThroughTraining), "distill: dd, step of the walk": lambda n: distilled(BackpropThroughTraining, epochs=n)(1),
    "distill: tm, iteration": led(augment="crop"), "distill: tm, student step": led("student_steps", augment="crop"), "distill: mat, iteration": led(),
    "smoothing, batch": smoothed, "certify, batch of 4": lambda n: certify(judged()[0], judged()[1][:4 * n], Linf(.01), y=judged()[2][:4 * n], device=GPU, batch=4),
    "evaluate, no attack, batch of 4": lambda n: evaluate(judged()[0], data().subset(range(4 * n)), None, device=GPU, batch=4),
    "signals, batch of 4": lambda n: read(judged()[0], data().subset(range(4 * n)), None, 0, GPU, 4),
    "farthest first, centre": lambda n: farthest_first(space_of(data().x, device=GPU), n)}


# ---- counting -------------------------------------------------------------------------------------------------------------------------------------------------

def waits(run, n):
    "Everything that the host waits for in n steps: (kind, operator, file:line) -> how often."
    run(n)                                                   # what is made once has been made
    with pretend_gpu.waits("rdd_lib/") as w: run(n)
    return w.at()

def per_step(run, n=3):
    "Waits of one step, and where: the difference between 2n and n steps."
    more, fewer = waits(run, 2 * n), waits(run, n)
    places = collections.Counter({k: v / n for k in more | fewer if (v := more[k] - fewer[k])})
    return sum(places.values()), places


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="flows whose name holds this")
    parser.add_argument("--where", action="store_true", help="list the lines that wait")
    parser.add_argument("--beside", help="an earlier table (its column waits): what was before")
    parser.add_argument("--out", help="write the table here, .csv or .parquet")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TQDM_DISABLE", "1")
    rows = []
    with pretend_gpu.present():
        if not pretend_gpu.pretended(): raise SystemExit("this machine has a GPU, and a real one does not count")
        for name in (f for f in FLOWS if asked.only in f):
            count, places = per_step(FLOWS[name])
            rows.append((name, round(count, 2)))
            print(f"{name:35} {count:7.2f}", flush=True)
            for (kind, op, place), k in places.most_common() if asked.where else (): print(f"    {k:6.2f} {kind}, {op}: {place}")
    table = pd.DataFrame(rows, columns=["flow", "waits"])
    if asked.beside: table.insert(1, "before", table.flow.map(pd.read_csv(asked.beside).set_index("flow").waits))
    if asked.out: save_table(table, asked.out)


if __name__ == "__main__": main()
