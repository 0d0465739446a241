"""What the Trainer's loop adds to a bare PyTorch loop, and what a step of every objective costs.

The bare loop is what a user would write: float images in memory, the same SGD, the same batches, a hand-written PGD
without any checks. Both runs end in the same weights, bit for bit, or the benchmark says so. Runs are interleaved; the
figure is the median of the ratios, beside it the ratio of the fastest runs (a busy machine only ever adds). A step of
an objective against a plain step: fastest of each.

    python benchmarks/training.py [repeats, default 15]
"""
import statistics
import sys
import time
from pathlib import Path
import pandas as pd
import torch
import torch.nn.functional as F
from rdd_lib.core import generator_of, subseed
from rdd_lib.data import load
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import PGD
from rdd_lib.training.curvature import Curvature, cure
from rdd_lib.training.input_gradient import GradientPenalty
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.training.cost import cost, slowdown
from rdd_lib.attacks.threats import Linf
from rdd_lib.training.objectives import OBJECTIVES, objective_of
from rdd_lib.training.trainer import Trainer

EPS, STEP, BATCH, LR = .1, .025, 50, .01
NETS = {"convnet, width 8": Net("convnet", dict(width=8)), "lenet": Net("lenet")}


def bare(net, data, steps, attack_steps=0, seed=0):
    "A training loop as in a tutorial."
    model = net(data, subseed(seed, "init")).train()
    opt = torch.optim.SGD(model.parameters(), LR, .9, weight_decay=5e-4)
    x, y = data.images(), data.y
    order, draws = generator_of(seed, "order"), generator_of(seed, "attack")
    step = 0
    while step < steps:
        for i in torch.randperm(len(x), generator=order).split(BATCH):
            xb, yb = x[i], y[i]
            if attack_steps: xb = pgd(model, xb, yb, attack_steps, draws)
            loss = F.cross_entropy(model(xb), yb)
            opt.zero_grad()
            loss.backward()
            opt.step()
            step += 1
            if step == steps: break
    return model.eval()


def pgd(model, x, y, steps, draws):
    model.eval()
    at = (x + EPS * (2 * torch.rand(x.shape, generator=draws) - 1)).clamp(0, 1)
    for _ in range(steps):
        at = at.detach().requires_grad_()
        grad = torch.autograd.grad(F.cross_entropy(model(at), y, reduction="sum"), at)[0]
        at = torch.min(torch.max(at.detach() + STEP * grad.sign(), x - EPS), x + EPS).clamp(0, 1)
    model.train()
    return at


def seconds(run):
    "The result, and the processor time it took: on one thread that is the time, less what other programs took."
    start = time.process_time()
    return run(), time.process_time() - start


def overhead(net, data, steps, attack_steps, repeats):
    objective = Adversarial(PGD(Linf(EPS), attack_steps)) if attack_steps else Standard()
    ours = Trainer(objective, steps=steps, lr=LR, batch=BATCH)
    pairs = []
    for k in range(repeats + 1):
        runs = [lambda: ours(net, data, 0, "cpu"), lambda: bare(net, data, steps, attack_steps)]
        timed = [seconds(run) for run in (runs if k % 2 else runs[::-1])]                # who goes first alternates
        (mine, a), (theirs, b) = timed if k % 2 else timed[::-1]
        if k: pairs.append((a, b))                                                       # the first pair warms up
    apart = max((p - q).abs().max().item() for p, q in zip(mine.parameters(), theirs.parameters()))
    ratios = [a / b for a, b in pairs]
    mine, theirs = map(min, zip(*pairs))
    return {"time": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios),
            "fastest / fastest": mine / theirs, "weights apart": apart}


def loops(data, repeats):
    for name, net in NETS.items():
        for objective, steps, attack_steps in (("standard", 100, 0), ("adversarial, PGD-10", 15, 10)):
            row = {"table": "Trainer / bare loop", "net": name, "objective": objective}
            yield row | overhead(net, data, steps, attack_steps, repeats)


def prices(data, repeats):
    threat, i = Linf(EPS), torch.arange(0, len(data), len(data) // BATCH)[:BATCH]
    x, y = data.images()[i], data.y[i]
    words = {name: objective_of(name, threat, .05 if name == "generalized" else None) for name in OBJECTIVES}
    words |= {"curvature, CURE": cure(), "curvature, authors_cifar": Curvature(variant="authors_cifar"),
              "curvature, authors_imagenet": Curvature(variant="authors_imagenet"),
              "gradient, finite difference": GradientPenalty(h=.05)}
    nets = NETS | {"convnet, width 8, batch norm": Net("convnet", dict(width=8, norm="batch"))}
    for net_name, net in nets.items():
        model = net(data).train()
        for name, objective in words.items():
            row = {"table": "step / plain step", "net": net_name, "objective": name}
            yield row | {"time": slowdown(objective, model, x, y, repeats)} | cost(objective, model, x, y)


def main(repeats):
    torch.set_num_threads(1)
    data = load("mnist5k")
    table = pd.DataFrame([*loops(data, repeats), *prices(data, repeats)])
    print(f"mnist5k, batches of {BATCH}, 1 thread, {repeats} interleaved repeats; times are ratios")
    for _, part in table.groupby("table", sort=False):
        part = part.drop(columns="table").dropna(axis=1, how="all")
        print("\n" + part.to_string(index=False, float_format="%.3g"))
    table.to_csv(Path(__file__).with_suffix(".csv"), index=False, float_format="%.4g")


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 15)
