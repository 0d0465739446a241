"""How often the host waits for the GPU in one step of each flow, counted on the pretend GPU of tests/pretend_gpu: by
running n and 2n steps and comparing. No GPU is needed, a C++ compiler is. What counts: copies that block, either way,
and numbers that are asked for (`item`, `nonzero`, a mask as an index, ...). Where there is a GPU it is counted
there, by what torch warns of in its debug mode for synchronisation, which leaves some out.

    python benchmarks/waits.py [--only distill] [--where] [--beside benchmarks/waits.csv] [--out benchmarks/waits.csv]

--where lists the lines that wait. --beside puts the counts of an earlier table next to these, as `before`.
"""
import argparse
import atexit
import collections
import os
import shutil
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
import pandas as pd
import torch
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import pretend_gpu
from rdd_lib.compressed import Compressed
from rdd_lib.coresets.signals import Proxy, read, signals
from rdd_lib.covering.distances import space_of
from rdd_lib.covering.greedy import farthest_first
from rdd_lib.data import ImageSet
from rdd_lib.core import generator_of
from rdd_lib.distill.backprop import BackpropThroughTraining
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.generative import GenerativeDistillation
from rdd_lib.distill.gradient import GradientMatching
from rdd_lib.distill.kernel_regression import NeuralFeatureRegression
from rdd_lib.distill.relabel import Relabel
from rdd_lib.distill.squeeze_recover import SqueezeRecover
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import APGD, APGDT, MIFGSM, PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.carlini_wagner import CW
from rdd_lib.certificates.certificate import certify
from rdd_lib.training.curvature import Curvature
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.files import save_table
from rdd_lib.attacks.fab import FAB
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.training.certified import Noisy
from rdd_lib.certificates.smoothing import Smoothed
from rdd_lib.attacks.square import Square
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.objectives import OBJECTIVES, objective_of
from rdd_lib.training.squeeze import Squeeze
from rdd_lib.training.trainer import Trainer
from rdd_lib.views import Views

GPU, NET = "cuda", Net("convnet", dict(width=2, depth=1))


@cache
def data():
    "Three classes of noise, 8 x 8."
    g = generator_of(0)
    return ImageSet((torch.rand(36, 1, 8, 8, generator=g) * 255).byte(), torch.arange(36) % 3, "abc", "noise")

@cache
def judged():
    "A network on the GPU, and images with the labels that it gives."
    model, x = NET(data(), 0).to(GPU), data().images(GPU)
    with torch.no_grad(): return model, x, model(x).argmax(1)


# ---- flows: name -> a function that takes n steps ------------------------------------------------------------------

def training(objective, watch=None, **settings):
    return lambda n: Trainer(objective, steps=n, batch=12, **settings)(NET, data(), 0, GPU, watch)

def objectives():
    made = {k: objective_of(k, Linf(.1), **({"eta": .1} if k == "generalized" else {})) for k in OBJECTIVES}
    return made | {"noisy": Noisy(.1), "adversarial, square": Adversarial(Square(Linf(.1), 4)),
                   "adversarial, apgd": Adversarial(APGD(Linf(.1), steps=5))}

def proxied(n): signals(data(), Proxy(NET, Trainer(steps=n, batch=12)), device=GPU, keep=False)

TRAININGS = {name: training(o) for name, o in objectives().items()} | {
    "augmented": training(Standard(), augment="color_crop_cutout_flip_scale_rotate"),
    "watched": training(Standard(), watch=lambda step: step.loss.item()), "of a proxy": proxied,
    "squeeze": training(Standard(), views=Views("pad"), by_epoch=True),
    "squeeze, variant A": training(Curvature(variant="authors_cifar"), views=Views("resized")),
    "squeeze, mixed": training(Standard(), views=Views("resized", mix="cutmix"))}

TINY, SHORT = Linf(1e-6), L2(1e-6)                           # within which nothing breaks
ATTACKS = {"pgd": lambda n: PGD(TINY, n), "pgd, l2": lambda n: PGD(SHORT, n), "mifgsm": lambda n: MIFGSM(TINY, n),
           "apgd-ce": lambda n: APGD(TINY, "ce", n), "apgd-dlr": lambda n: APGD(TINY, "dlr", n),
           "cw": lambda n: CW(SHORT, steps=n), "square": lambda n: Square(TINY, n),
           "square, l2": lambda n: Square(SHORT, n)}
JUDGES = ATTACKS | {"apgd-t": lambda n: APGDT(TINY, steps=n, targets=1), "fab": lambda n: FAB(TINY, n, 1),
                    "fab, l2": lambda n: FAB(SHORT, n, 1)}

def judging(make): return lambda n: attack_until_broken(make(n), *judged())
def climbing(make): return lambda n: make(n)(*judged(), generator_of(0, device=GPU))

def distilled(method, **settings):
    settings = dict(net=NET, batch_real=8) | settings
    return lambda n: method(**{"iterations": n} | settings).compress(data(), ipc=2, device=GPU)

def dc(**settings): return distilled(GradientMatching, **{"outer": 1, "inner": 1} | settings)
def later(make): return lambda n: make(n)(1)                 # n is not the number of iterations

AGEING = Net("convnet", dict(width=2, depth=2, norm="fast_batch", norm_first=True))

def regressed(**settings):
    return distilled(NeuralFeatureRegression, net=AGEING, nets=2, updates=3, student_steps=1, **settings)

EXPERTS = Experts(n=1, epochs=2, batch=12)

def folder():
    made = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, made)
    return made

@cache
def expert_folder():
    made = folder()
    EXPERTS(NET, data(), 2, made, "cpu")
    return made

# a teacher, what is recovered from it, what it says of views, and who learns that

NORMED, SQUEEZE = Net("strided", dict(width=2)), Squeeze(epochs=1, batch=12)
teachers = cache(folder)
shown = dict(batch=12, views=Views("resized", mix="cutmix"))

def recovered(**settings):
    def run(n):
        method = SqueezeRecover(net=NORMED, squeeze=SQUEEZE, iterations=n, relabel=None, **settings)
        method.compress(data(), ipc=1, device=GPU, folder=teachers())
    return run

@cache
def labels(n, store):
    return Relabel(epochs=n, store=store, **shown)(SQUEEZE(NORMED, data(), teachers(), GPU), NORMED, data())

def followed(store):
    def run(n):
        d = data()
        told = Compressed(d.x, d.y, d.classes, d.name, views=labels(n, store), schedule=Relabel().student)
        Trainer()(NORMED, told, 0, GPU)
    return run

def asked(n): Relabel(epochs=n, **shown)(SQUEEZE(NORMED, data(), teachers(), GPU), NORMED, data())

def led(unit="iterations", **settings):
    def run(n):
        steps = {"iterations": 1, "student_steps": 2} | {unit: n}
        method = TrajectoryMatching(net=NET, experts=EXPERTS, max_start=1, expert_epochs=1, **settings, **steps)
        method.compress(data(), ipc=2, device=GPU, buffers=expert_folder())
    return run

def generated(epochs=0, **settings):
    "Of one turn an epoch: the players alone in the first one and `epochs` more, then with matching."
    one = dict(width=2, noise=8, convs=1, depth=5, batch=36, match_batch=36, real_steps=2, nets=(NET,), student={})
    def run(n):
        how = GenerativeDistillation(epochs=1 + epochs * n, **{k: n * v for k, v in settings.items()}, **one)
        return how.compress(data(), ipc=2, device=GPU)
    return run

def drawn_anew(n): Trainer(steps=n, batch=6)(NET, generated(match_epochs=0)(1), 0, GPU)

DISTILLERS = {
    "dm, iteration": distilled(DistributionMatching), "dc, iteration": dc(),
    "dc, step on the images": later(lambda n: dc(outer=n)), "dc, inner step": later(lambda n: dc(outer=2, inner=n)),
    "dsa, iteration": dc(augment="crop", init="real"),
    "dsa, inner step": later(lambda n: dc(outer=2, inner=n, augment="crop_scale_cutout", init="real")),
    "guard, iteration": dc(real_objective=Curvature()),
    "dc of PGD-3, iteration": dc(real_objective=Adversarial(PGD(Linf(.1), 3))),
    "dd, iteration": distilled(BackpropThroughTraining),
    "dd, step of the walk": later(lambda n: distilled(BackpropThroughTraining, epochs=n, iterations=1)),
    "tm, iteration": led(augment="crop"), "tm, student step": led("student_steps", augment="crop"),
    "frepo, iteration": regressed(), "frepo in parts, iteration": regressed(mirror=True, chunk=3),
    "dim, turn": generated(epochs=1, match_epochs=0), "dim, turn with matching": generated(match_epochs=1),
    "sre2l, iteration": recovered(), "cda, iteration": recovered(crop=(1., .08))}

def voted(n): Smoothed(judged()[0], .1, 10).counts(judged()[1][0], 10 * n, generator_of(0))

def certified(n):
    model, x, y = judged()
    certify(model, x[:4 * n], Linf(.01), y=y[:4 * n], device=GPU, batch=4)

def part(n): return data().subset(range(4 * n))

OTHERS = {"smoothing: batch": voted, "certify: batch": certified,
          "evaluate, no attack: batch": lambda n: evaluate(judged()[0], part(n), None, device=GPU, batch=4),
          "relabel: epoch of three batches": asked,
          "training: epoch of labels of views": followed("logits"),
          "training: epoch of a teacher of views": followed("teacher"),
          "training: epoch of images drawn anew": drawn_anew,
          "signals: batch": lambda n: read(judged()[0], part(n), None, 0, GPU, 4),
          "farthest first: centre": lambda n: farthest_first(space_of(data().x, device=GPU), n)}

FLOWS = {f"training: {k}": run for k, run in TRAININGS.items()} | {
    f"evaluation: {k}": judging(make) for k, make in JUDGES.items()} | {
    f"attack: {k}": climbing(make) for k, make in ATTACKS.items()} | {
    f"distill: {k}": run for k, run in DISTILLERS.items()} | OTHERS


# ---- counting ------------------------------------------------------------------------------------------------------

def waits(run, n):
    "Everything that the host waits for in n steps: (kind, operator, file:line) -> how often."
    if not pretend_gpu.pretended(): return warned(run, n)
    with pretend_gpu.waits("rdd_lib/") as w: run(n)
    return w.at()

def warned(run, n):
    "The same on a real GPU, where torch tells neither kind nor operator."
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            run(n)
    finally: torch.cuda.set_sync_debug_mode("default")
    told = [w for w in seen if "called a synchronizing CUDA operation" in str(w.message)]
    return collections.Counter(("wait", "", f"{w.filename}:{w.lineno}") for w in told)

def per_step(run, n=3):
    "Waits of one step, and where: the difference between 2n and n steps."
    run(n)
    run(2 * n)                                               # what is made once has been made
    fewer, more = waits(run, n), waits(run, 2 * n)
    places = collections.Counter({k: v / n for k in more | fewer if (v := more[k] - fewer[k])})
    return sum(places.values()), places

def told(rows, beside):
    "As a table, with the counts of an earlier one."
    table = pd.DataFrame(rows, columns=["flow", "waits"])
    if beside: table.insert(1, "before", table.flow.map(pd.read_csv(beside).set_index("flow").waits))
    return table


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
        for name in (f for f in FLOWS if asked.only in f):
            count, places = per_step(FLOWS[name])
            rows.append((name, round(count, 2)))
            print(f"{name:35} {count:7.2f}", flush=True)
            if asked.out: save_table(told(rows, asked.beside), asked.out)
            if not asked.where: continue
            for (kind, op, place), k in places.most_common(): print(f"    {k:6.2f} {kind}, {op}: {place}")


if __name__ == "__main__": main()
