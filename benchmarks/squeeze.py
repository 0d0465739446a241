"""What SRe2L's stages cost beside what one would write by hand, as ratios in one run on one thread.

    recover   an iteration of recovering, beside a plain loop with hooks and Adam that ends in the same images
    views     cropping, scaling and mirroring a batch, beside torchvision's RandomResizedCrop and flip image by image
    squeeze   an epoch with GUARD's penalty (variant A), and with PGD-4, beside a plain epoch
    relabel   a view answered (drawn, made, asked, rounded), beside passing an image through the teacher and no more
    student   what a student's step spends on its views: their draws and stored labels; and making the views as well
    bytes     what labels of views add to a file, beyond 2 bytes a class and view

    python benchmarks/squeeze.py [--quick] [--only recover ...] [--repeats 7] [--out benchmarks/squeeze.csv]

Digits of mnist5k (strided network, the prototype's sizes), and noise of CIFAR-10's shape (ConvNet-D3 with batch norm,
width 32). Both sides take turns, who begins alternates, the first pair warms up. Seconds are processor time; `ratio` is
the median of the pairs, `lowest` and `highest` stand beside it; `ms` is for one iteration, image, view or step.
"""
import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
import pandas as pd
import torch
import torch.nn.functional as F
from covering import machine
from torchvision.transforms import Compose, RandomHorizontalFlip, RandomResizedCrop
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.threats import Linf
from rdd_lib.augmentation import Scale
from rdd_lib.compressed import Compressed, save
from rdd_lib.core import generator_of
from rdd_lib.data import ImageSet, load, pixels, sample
from rdd_lib.distill.relabel import Relabel
from rdd_lib.distill.squeeze_recover import norms_of, SqueezeRecover
from rdd_lib.distill.sre2l import guard_penalty
from rdd_lib.files import save_table
from rdd_lib.models import keep_heap, Net
from rdd_lib.training.objectives import Adversarial
from rdd_lib.training.squeeze import Squeeze
from rdd_lib.training.trainer import Trainer
from rdd_lib.views import Views


@dataclass(frozen=True)
class Bench:
    "One data set, one network, one folder for teachers."
    data: ImageSet
    net: Net
    folder: Path
    size: int            # in percent of the full size
    eps: float           # of PGD

    def times(self, n): return max(2, n * self.size // 100)

    @property
    def squeeze(self): return Squeeze(epochs=2, lr=.02, batch=64, views=Views("pad").fitting(self.data.name))

    @property
    def teacher(self): return self.squeeze(self.net, self.data, self.folder, "cpu")

    @property
    def few(self):
        "A hundred images as bytes, as they come out of a recovering."
        d = sample(self.data, 100)
        return d.subset(range(100))


def digits(folder, size):
    return Bench(sample(load("mnist5k"), 2000), Net("strided"), folder, size, .1)

def colours(folder, size):
    x = torch.randint(256, (1000, 3, 32, 32), generator=generator_of(0), dtype=torch.uint8)
    noise = ImageSet(x, torch.arange(1000) % 10, tuple("0123456789"), "cifar10")
    return Bench(noise, Net("convnet", dict(width=32, norm="batch")), folder, size, 4 / 255)

DATA = {"mnist5k": digits, "cifar10's shape": colours}


def pairs(ours, plain, per, repeats):
    "Columns of a row: milliseconds of both, `per` of which were done, and ours / plain."
    keep_heap()
    found = []
    for k in range(repeats + 1):
        took = {}
        for run in ((ours, plain) if k % 2 else (plain, ours)):
            begin = time.process_time()
            run()
            took[run] = 1000 * (time.process_time() - begin) / per
        if k: found.append((took[ours], took[plain]))
    ratios = [a / b for a, b in found]
    return {"ms": statistics.median(a for a, _ in found), "plain ms": statistics.median(b for _, b in found),
            "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


# --- the stages -----------------------------------------------------------------------------------------------------

def recovered(b, m, ipc):
    "SRe2L's loop as one would write it: hooks on the norms, torch's Adam, one roll a step."
    teacher, scale = b.squeeze(b.net, b.data, b.folder, "cpu").requires_grad_(False), Scale(b.data)
    y, heard = torch.arange(b.data.n_classes).repeat(ipc), []
    u = scale.clamp_(torch.randn(len(y), *b.data.shape, generator=generator_of(0, "noise", 0))).requires_grad_()
    opt, norms = torch.optim.Adam([u], m.lr, (.5, .9)), norms_of(teacher)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(opt, m.iterations)
    def hear(norm, inputs, output):
        x, = inputs
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        heard.append((mean - norm.running_mean).norm() + (var - norm.running_var).norm())
    for norm in norms: norm.register_forward_hook(hear)
    for t in range(m.iterations):
        heard.clear()
        shift = torch.randint(m.jitter[0], m.jitter[1] + 1, (2,), generator=generator_of(0, "iteration", t)).tolist()
        logits = teacher.model(u.roll(shift, (2, 3)))
        loss = F.cross_entropy(logits, y) + m.r_bn * (10 * heard[0] + sum(heard[1:]))
        opt.zero_grad()
        loss.backward()
        opt.step()
        rates.step()
        with torch.no_grad(): scale.clamp_(u)
    return (scale.pixels(u.detach()) * 255).round().byte()


def recover(b, repeats):
    m = SqueezeRecover(net=b.net, squeeze=b.squeeze, iterations=b.times(50), images="joint", relabel=None)
    images, ipc = {}, 10
    def ours(): images["ours"] = m.compress(b.data, ipc=ipc, device="cpu", folder=b.folder).x
    def plain(): images["plain"] = recovered(b, m, ipc)
    found = pairs(ours, plain, m.iterations, repeats)
    share = (images["ours"] == images["plain"]).float().mean().item()
    yield {"what": "iteration, 100 images / plain loop"} | found | {"same bytes": share}


def views(b, repeats):
    side, n = b.data.shape[-1], b.times(100)
    x, v = b.data.images()[:n], Views("resized")
    theirs, g = Compose([RandomResizedCrop(side, antialias=True), RandomHorizontalFlip()]), generator_of(0)
    def ours():
        for _ in range(10): v.apply(x, v.draw(n, side, g))
    def plain():
        for _ in range(10): torch.stack([theirs(image) for image in x])
    yield {"what": "view / torchvision's, image by image"} | pairs(ours, plain, 10 * n, repeats)


def squeeze(b, repeats):
    d = b.data.subset(range(64 * b.times(15)))
    def epoch(objective): return lambda: objective.trainer(b.net, d, 0, "cpu")
    once = replace(b.squeeze, epochs=1)
    objectives = {"variant A": guard_penalty(d.name), "PGD-4": Adversarial(PGD(Linf(b.eps), 4))}
    for name, o in objectives.items():
        found = pairs(epoch(replace(once, objective=o)), epoch(once), len(d), repeats)
        yield {"what": f"image of an epoch, {name} / plain"} | found


def relabel(b, repeats):
    how, teacher, few = Relabel(epochs=b.times(40)), b.teacher, b.few
    x = few.images()
    def ours(): how(teacher, b.net, few)
    @torch.no_grad()
    def plain():
        for _ in range(how.epochs): teacher(x)
    yield {"what": "view answered / image passed"} | pairs(ours, plain, how.epochs * len(x), repeats)


def student(b, repeats):
    how, few = Relabel(epochs=b.times(40), batch=25), b.few
    labels = how(b.teacher, b.net, few)
    made = Compressed(few.x, few.y, few.classes, few.name, views=labels, schedule=how.student)
    def steps(): Trainer()(b.net, made, 0, "cpu")
    def read():
        for shown in labels.showings(few): (labels.of(shown, few.x) / 20).softmax(1)
    def shown():
        for shown in labels.showings(few):
            x = labels.views.show(pixels(few.x[shown.rows]), shown.drawn)
            (labels.of(shown, x) / 20).softmax(1)
    for name, run in (("draws and labels", read), ("draws, labels and views", shown)):
        yield {"what": f"{name} / whole step"} | pairs(run, steps, how.epochs * 4, repeats)


def size(b, repeats):
    how, few = Relabel(epochs=b.times(300)), b.few
    made = Compressed(few.x, few.y, few.classes, few.name, views=how(b.teacher, b.net, few))
    whole, bare = (save(replace(made, views=v), b.folder / "set").stat().st_size for v in (made.views, None))
    n = how.epochs * len(few)
    yield {"what": "file's bytes for labels", "bytes a view": (whole - bare) / n, "bytes beside": whole - bare - 20 * n}


STAGES = {"recover": recover, "views": views, "squeeze": squeeze, "relabel": relabel, "student": student, "bytes": size}


def rows(only, size, repeats):
    with tempfile.TemporaryDirectory() as folder:
        for name, make in DATA.items():
            b = make(Path(folder), size)
            for stage in only:
                for row in STAGES[stage](b, repeats): yield {"stage": stage, "data": name, "net": b.net.name} | row


def command(doc, parts, rows):
    "What is typed: rows(names of parts, size in percent, repeats), each shown when it is there, and kept."
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--only", nargs="*", default=list(parts), choices=list(parts))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", help="write the table here, .csv or .parquet")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    made, size, repeats = [], *((5, 1) if asked.quick else (100, asked.repeats))
    for row in rows(asked.only, size, repeats):
        made.append(row)
        print(pd.Series(row).to_string(), "\n", flush=True)
    if asked.out: save_table(pd.DataFrame(made).assign(repeats=repeats, threads=1, **machine()), asked.out)


if __name__ == "__main__": command(__doc__, STAGES, rows)
