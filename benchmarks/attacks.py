"""Seconds, network passes and outcomes of three programs that attack the same images: this library, the AutoAttack
authors' own (pyautoattack), and torchattacks. In one process, in turns, on three students whose robust accuracy is near
0, .15 and .9. A program that is not installed is left out.

    python benchmarks/attacks.py [--quick] [--device cuda] [--images 200] [--threads 1] [--repeats 2] [--standard 100]
                                 [--out mine.csv]

"paper" is APGD-CE + APGD-DLR with 100 steps each; --standard N adds full AutoAttack (APGD-CE, APGD-T, FAB-T, Square
with 5,000 queries) on N of the images, once each. Outcomes are compared image by image: `differ` counts images that one
program breaks and ours does not, or the other way round; up to 250 images its random starts are ours. Passes are images
that went forward plus images that went backward.
"""
import argparse
import importlib.util
import platform
import time
from dataclasses import replace
from pathlib import Path
import pandas as pd
import torch
from torch import nn
from rdd_lib.models import keep_heap, seeded
from rdd_lib.data import load, sample
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.autoattack import autoattack
from rdd_lib.files import save_table
from rdd_lib.training.objectives import Adversarial
from rdd_lib.attacks.threats import Linf
from rdd_lib.training.trainer import Trainer

STAGES = {"paper": ["apgd-ce", "apgd-dlr"], "standard": ["apgd-ce", "apgd-t", "fab-t", "square"]}


class Counted(nn.Module):
    "A model that counts the images which pass through it, both ways."
    def __init__(self, model):
        super().__init__()
        self.model, self.passes = model, 0

    def forward(self, x):
        logits = self.model(x)
        self.passes += len(x)
        if logits.requires_grad: logits.register_hook(self.back)
        return logits

    def back(self, grad): self.passes += len(grad)


def ours(model, x, y, threat, version):
    return ~attack_until_broken(autoattack(threat, version), model, x, y, 0).broken.cpu()


def official(model, x, y, threat, version):
    from pyautoattack import AutoAttack
    attack = AutoAttack(model, norm="Linf", eps=threat.eps, version="custom", attacks=STAGES[version], seed=0,
                        device=x.device)
    attack.apgd.n_restarts = 1
    with seeded(0): x_adv = attack.run_standard_evaluation(x, y, batch_size=250)[0]
    with torch.no_grad(): return model(x_adv).argmax(1) == y


def torchattacks_(model, x, y, threat, version):
    "Its attacks with AutoAttack's steps, which are not its defaults."
    import torchattacks as ta
    both = dict(eps=threat.eps, seed=0)
    made = {"apgd-ce": lambda: ta.APGD(model, steps=100, loss="ce", **both),
            "apgd-dlr": lambda: ta.APGD(model, steps=100, loss="dlr", **both),
            "apgd-t": lambda: ta.APGDT(model, steps=100, **both),
            "fab-t": lambda: ta.FAB(model, steps=100, multi_targeted=True, n_classes=10, **both),
            "square": lambda: ta.Square(model, n_queries=5000, resc_schedule=False, **both)}
    attack = ta.MultiAttack([made[s]() for s in STAGES[version]])
    with seeded(0): x_adv = attack(x, y)
    with torch.no_grad(): return model(x_adv).argmax(1) == y


NEEDS = {"official": "pyautoattack", "torchattacks": "torchattacks"}
PROGRAMS = {"ours": ours, "official": official, "torchattacks": torchattacks_}
PROGRAMS = {name: run for name, run in PROGRAMS.items() if importlib.util.find_spec(NEEDS.get(name, "torch"))}


def students(device, quick):
    "Each with the threat it is judged under."
    train, net, plain = load("mnist5k"), Net("convnet", dict(width=8)), Trainer(epochs=3, lr=.05)
    if quick: train = sample(train, 200)
    standard = plain(net, train, 0, device)
    adversarial = replace(plain, epochs=10, objective=Adversarial(PGD(Linf(.1), 5)))(net, train, 0, device)
    return {"standard, eps .3": (standard, Linf(.3)), "standard, eps .12": (standard, Linf(.12)),
            "adversarial, eps .1": (adversarial, Linf(.1))}


def measured(model, x, y, threat, version, repeats):
    "For each program: which images survive, the fewest seconds, and the passes."
    survive, seconds, passes = {}, {}, {}
    for _ in range(repeats):
        for name, program in PROGRAMS.items():
            counted = Counted(model).eval()
            start = time.perf_counter()
            survive[name] = program(counted, x, y, threat, version).cpu()
            seconds[name] = min(seconds.get(name, float("inf")), time.perf_counter() - start)
            passes[name] = counted.passes
    return survive, seconds, passes


def machine(device):
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu = names[0] if names else platform.processor()
    gpu = {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    return gpu | {"cpu": cpu, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def row(student, version, survive, seconds, passes):
    robust = survive["ours"].double().mean().item()
    found = {"attack": version, "student": student, "images": len(survive["ours"]), "robust": robust,
             "seconds": seconds["ours"], "passes": passes["ours"]}
    for name in list(PROGRAMS)[1:]:
        found |= {f"{name} / ours, seconds": seconds[name] / seconds["ours"],
                  f"{name} / ours, passes": passes[name] / passes["ours"],
                  f"{name}: differ": int((survive[name] != survive["ours"]).sum())}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="10 images, students of 200: whether it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for name, default in (("images", 200), ("threads", 1), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--standard", type=int, default=0, help="full AutoAttack as well, on this many images: minutes")
    parser.add_argument("--out", help="write the table here, .csv or .parquet")
    asked = parser.parse_args()
    if asked.quick: asked.images, asked.repeats = 10, 1
    torch.set_num_threads(asked.threads)
    keep_heap()                                              # helps all three programs alike
    test = sample(load("mnist5k", "test"), asked.images)
    rows, judged = [], students(asked.device, asked.quick)
    runs = [("paper", test, asked.repeats)]
    if asked.standard: runs.append(("standard", sample(test, asked.standard), 1))
    for version, images, repeats in runs:
        for student, (model, threat) in judged.items():
            x, y = images.images(asked.device), images.y.to(asked.device)
            rows.append(row(student, version, *measured(model, x, y, threat, version, repeats)))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
            table = pd.DataFrame(rows)
            if asked.out: save_table(table.assign(threads=asked.threads, **machine(asked.device)), asked.out)
    print(table.round(2).to_string(index=False))
    for name in list(PROGRAMS)[1:]:
        for version, part in table.groupby("attack"):
            mean = torch.tensor(part[f"{name} / ours, seconds"].to_numpy()).log().mean().exp()
            print(f"{version}: {name} / ours, geometric mean of the three: {mean:.2f}")


if __name__ == "__main__": main()
