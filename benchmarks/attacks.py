"""Seconds and network samples of the first paper's judge (APGD-CE + APGD-DLR, 100 steps), side by side in one process:

ours with survivor compaction, ours without, and the AutoAttack authors' own program (pyautoattack), on three students
whose robust accuracy is low, middling and high. Outcomes are compared image by image.

    python benchmarks/attacks.py [images, default 100]
"""
import sys
import time
from dataclasses import replace
import pandas as pd
import torch
from rdd_lib.data import load, sample
from rdd_lib.models import Net
from rdd_lib.robust.attacks import PGD, attack_until_broken
from rdd_lib.robust.autoattack import autoattack
from rdd_lib.robust.objectives import Adversarial
from rdd_lib.robust.threats import Linf
from rdd_lib.robust.training import Trainer


def timed(run):
    start = time.perf_counter()
    return run(), time.perf_counter() - start


def theirs(model, x, y, threat):
    "Which images survive the official program."
    from pyautoattack import AutoAttack
    attack = AutoAttack(model, norm="Linf", eps=threat.eps, version="custom", attacks=["apgd-ce", "apgd-dlr"], seed=0)
    attack.apgd.n_restarts = 1
    with torch.random.fork_rng(): x_adv = attack.run_standard_evaluation(x, y, batch_size=64)[0]
    with torch.no_grad(): return model(x_adv).argmax(1) == y


def main(n):
    train, test, threat = sample(load("mnist5k"), 500), sample(load("mnist5k", "test"), n), Linf(.1)
    net, plain = Net("convnet", dict(width=8)), Trainer(steps=120, lr=.05)
    hard = replace(plain, objective=Adversarial(PGD(threat, 5)))
    students = {"standard": plain(net, train, 0, "cpu"), "adversarial, 30 steps": replace(hard, steps=30)(net, train, 0, "cpu"), "adversarial": hard(net, train, 0, "cpu")}
    x, y, rows = test.images(), test.y, []
    for name, model in students.items():
        ours, seconds = timed(lambda m=model: attack_until_broken(autoattack(threat), m, x, y, 0, 64))
        full, seconds_full = timed(lambda m=model: attack_until_broken(autoattack(threat), m, x, y, 0, 64, compact=False))
        survive, seconds_theirs = timed(lambda m=model: theirs(m, x, y, threat))
        rows.append({"student": name, "robust": ours.robust_accuracy, "samples": ours.forward_samples, "samples uncompacted": full.forward_samples,
                     "same outcomes": f"{int((survive == ~ours.broken).sum())}/{n}", "uncompacted / ours": seconds_full / seconds, "official / ours": seconds_theirs / seconds})
    print(f"{n} test digits, {threat}, {torch.get_num_threads()} threads; times as ratios")
    print(pd.DataFrame(rows).to_string(index=False, float_format="%.2f"))


if __name__ == "__main__": main(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
