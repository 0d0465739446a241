"""Seconds and peak memory of one iteration of every distiller that matches, ours beside a plain re-statement of its
published loop; and what a robust objective adds to DC's gradients of real data.

    dc, dsa   classes in a loop, gradients of all parameters, `backward()` through images and network; inner training
              between steps on the images (--loops)
    dm        classes in a loop, features of a frozen random network
    tm        MTT: --steps of SGD on a flat parameter vector, the graph of all kept; the learning rate is learned
    dd        --steps of gradient descent with one learned rate each, the graph of all of them kept; Adam
    real      no distiller: the gradients of one real batch of every class as our DC takes them, plain; with GUARD's
              curvature penalty; with PGD-10 adversarial training

    python benchmarks/distill.py [--quick] [--methods dc dsa dm tm dd real] [--data mnist cifar10] [--ipc 1 10]
                                 [--repeats 5] [--device cpu|cuda] [--out benchmarks/distill.csv]

ConvNet-D3. Every cell (method, data, ipc, side) runs in a fresh process; the sides alternate, --repeats times each. A
process makes one iteration to warm up, then others for --seconds. Time on a CPU is processor time on one thread; `time`
is plain / ours, the median of the pairs, beside the lowest and the highest (above 1: ours is quicker). Memory is what
the process takes beyond its state before the first iteration (CPU: ru_maxrss; GPU: max_memory_allocated); `memory` is
plain / ours. `moved` is how far a pixel moves at most in one iteration (normalised units, float64, at most 10 unrolled
steps), `apart` the largest difference between both sides' images after it, begun with the same images, network and
batches, `gradients apart` that between their last gradients, over the largest gradient: above 1e-4 the two are not the
same computation, and the benchmark ends with an error. --heap ours leaves the plain loop with the C library's own ways:
our loops let it keep freed blocks (`models.keep_heap`), and by default it is told so for both.
"""
import argparse
import ctypes
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
import pandas as pd
import torch
import torch.nn.functional as F
from torch.func import functional_call
from covering import machine
from rdd_lib.augmentation import DSA, OPERATIONS, Scale, Siamese
from rdd_lib.compressed import Compressed, save
from rdd_lib.published import load_compressed
from rdd_lib.core import MissingData, drawn, generator_of, subseed
from rdd_lib.models import keep_heap
from rdd_lib.data import ImageSet, load, pixels, sample
from rdd_lib.distill.backprop import BackpropThroughTraining
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.gradient import GradientMatching
from rdd_lib.distill.synthetic import RealBatches, State
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import PGD
from rdd_lib.training.curvature import VARIANTS, Curvature
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.attacks.threats import Linf
from rdd_lib.training.unrolled import functional

PRELOAD = ["rdd_lib.distill.backprop", "rdd_lib.distill.trajectory", "rdd_lib.distill.gradient",
           "rdd_lib.distill.distribution", "pandas"]       # imported once, before the processes part
OPERATIONS["shift"] = lambda u, r: u.roll(2, -1)           # an augmentation without a draw: to compare one iteration
EPS = {"mnist": .1, "cifar10": 8 / 255}


@dataclass(frozen=True)
class Job:
    "One cell, as plain data: it travels to another process."
    method: str
    data: str
    ipc: int
    images: str          # file of the real images
    width: int = 32
    batch_real: int = 256
    outer: int = 2       # DC, DSA at ipc 10: steps on the images in an iteration
    inner: int = 25      # ... and epochs of training between two of them
    steps: int = 30      # TM, DD: unrolled steps
    batch_outer: int = 1024  # DD: real images
    device: str = "cpu"
    seconds: float = 1.
    heap: str = "both"
    same: bool = False   # the same network, real batches, augmentation, pixels kept in [0, 1]: to compare, not to time

    @property
    def walks(self): return max(1, self.steps // self.ipc)      # DD: how often the `ipc` batches come

    @property
    def loops(self): return (self.outer, self.inner) if self.ipc > 1 else (1, 1)


class Bench:
    "What both sides start from."
    def __init__(self, job):
        self.job, self.data = job, load_compressed(job.images)
        self.classes, self.net = self.data.n_classes, (Same if job.same else Net)(settings=dict(width=job.width))
        self.scale, self.g = Scale(self.data, job.device), generator_of(0, "benchmark")
        if job.same: self.scale.mean, self.scale.std = self.scale.mean.double(), self.scale.std.double()
        self.augment = "shift" if job.same else DSA
        if job.method in ("dc", "dd"): self.augment = ""
        self.y = torch.arange(self.classes, device=job.device).repeat_interleave(job.ipc)
        self.u = torch.randn(len(self.y), *self.data.shape, generator=generator_of(0, "images")).to(self.scale.mean)
        self.scale.clamp_(self.u)

    def fresh(self):
        "A new network, which sees normalised images."
        return self.net(self.data, subseed(drawn(self.g))).model.to(self.job.device).train()

    def path(self):
        "The weights of a network, and others not far from them, as an expert's are some epochs later."
        start = flat(self.net(self.data, 0).model)
        way = .01 * torch.randn(start.shape, generator=generator_of(0, "expert"))
        return torch.stack([start, start + way]).to(self.job.device)

    def operation(self, images=None): return Siamese(self.augment, self.data.name, self.g, images)


@dataclass(frozen=True)
class Same(Net):
    "A network in float64, whose weights do not depend on the seed."
    def __call__(self, data, seed=0): return super().__call__(data, 0).double()


# --- the published loops, re-stated -------------------------------------------------------------------------------

class Plain:
    "All real images as normalised floats; the images are a parameter of a torch optimiser."
    def __init__(self, bench):
        self.b, self.job = bench, bench.job
        self.x, self.rows = bench.scale.normalise(bench.data.images(self.job.device)), bench.data.per_class
        self.u = bench.u.clone().requires_grad_()
        self.parts = {"dc": self.gradient_matching, "dsa": self.gradient_matching, "dm": self.distribution_matching,
                      "tm": self.trajectory_matching, "dd": self.backprop}
        getattr(self, f"start_{self.job.method}", lambda: None)()

    def __call__(self): self.parts[self.job.method]()

    def real(self, c):
        rows, size = self.rows[c], self.job.batch_real
        return self.x[rows[:size] if self.job.same else rows[torch.randperm(len(rows), generator=self.b.g)[:size]]]

    def step(self, loss, *optimisers):
        for o in optimisers: o.zero_grad()
        loss.backward()
        for o in optimisers: o.step()
        if self.job.same:
            with torch.no_grad(): self.b.scale.clamp_(self.u)

    # DC and DSA

    def start_dc(self): self.opt = torch.optim.SGD([self.u], .1, .5)
    start_dsa = start_dc

    def gradient_matching(self):
        b, (outer, inner) = self.b, self.job.loops
        net = b.fresh()
        parameters, net_opt = list(net.parameters()), torch.optim.SGD(net.parameters(), .01)
        for k in range(outer):
            loss = torch.tensor(0., device=self.u.device)
            for c in range(b.classes):
                op, x, u = b.operation(), self.real(c), self.u[c * self.job.ipc:(c + 1) * self.job.ipc]
                x, u = op(x), op(u)
                fit = lambda z: F.cross_entropy(net(z), torch.full((len(z),), c, device=z.device))
                goal = [g.detach().clone() for g in torch.autograd.grad(fit(x), parameters)]
                got = torch.autograd.grad(fit(u), parameters, create_graph=True)
                loss = loss + sum(distance(p, q) for p, q in zip(got, goal))
            self.step(loss, self.opt)
            if k < outer - 1: self.train(net, net_opt, inner)

    def train(self, net, opt, epochs):
        u = self.u.detach().clone()
        for _ in range(epochs):
            for i in torch.randperm(len(u), generator=self.b.g).split(256):
                i = i.to(u.device)
                loss = F.cross_entropy(net(self.b.operation(len(i))(u[i])), self.b.y[i])
                opt.zero_grad()
                loss.backward()
                opt.step()

    # DM

    def start_dm(self): self.opt = torch.optim.SGD([self.u], 1., .5)

    def distribution_matching(self):
        b = self.b
        net = b.fresh()
        for p in net.parameters(): p.requires_grad = False
        loss = torch.tensor(0., device=self.u.device)
        for c in range(b.classes):
            op, x, u = b.operation(), self.real(c), self.u[c * self.job.ipc:(c + 1) * self.job.ipc]
            x, u = op(x), op(u)
            goal, got = net.embed(x).detach(), net.embed(u)
            loss = loss + ((goal.mean(0) - got.mean(0)) ** 2).sum()
        self.step(loss, self.opt)

    # TM

    def start_tm(self):
        self.shell = self.b.fresh()
        self.start, self.goal = self.b.path()
        self.alpha = torch.tensor(.01).to(self.u).requires_grad_()
        self.opt, self.alpha_opt = torch.optim.SGD([self.u], 100., .5), torch.optim.SGD([self.alpha], 1e-5, .5)

    def trajectory_matching(self):
        theta = [self.start.clone().requires_grad_()]
        for _ in range(self.job.steps):            # ipc 1 and 10: a batch is the whole set, in a random order
            i = torch.randperm(len(self.u), generator=self.b.g).to(self.u.device)
            u = self.b.operation(len(i))(self.u[i])
            loss = F.cross_entropy(functional_call(self.shell, unflatten(theta[-1], self.shell), u), self.b.y[i])
            grad, = torch.autograd.grad(loss, theta[-1], create_graph=True)
            theta.append(theta[-1] - self.alpha * grad)
        miss = lambda end: F.mse_loss(end, self.goal, reduction="sum")
        loss = miss(theta[-1]) / miss(self.start)
        self.step(loss, self.opt, self.alpha_opt)

    # DD

    def start_dd(self):
        rates = torch.full((self.job.ipc * self.job.walks,), .02).to(self.u)
        self.raw = rates.expm1().log().requires_grad_()                                       # softplus of it is .02
        self.opt = torch.optim.Adam([self.u, self.raw], .01, (.5, .999))
        rows = torch.arange(len(self.u), device=self.u.device)
        self.batches = rows.view(self.b.classes, self.job.ipc).T            # `ipc` ordered batches of one image a class

    def backprop(self):
        shell, lrs = self.b.fresh(), F.softplus(self.raw)
        theta = flat(shell).requires_grad_()
        for t in range(len(lrs)):
            i = self.batches[t % self.job.ipc]
            loss = F.cross_entropy(functional_call(shell, unflatten(theta, shell), self.u[i]), self.b.y[i])
            grad, = torch.autograd.grad(loss, theta, create_graph=True)
            theta = theta - lrs[t] * grad
        order = torch.arange(len(self.x)) if self.job.same else torch.randperm(len(self.x), generator=self.b.g)
        rows = order[:self.job.batch_outer]
        logits = functional_call(shell, unflatten(theta, shell), self.x[rows])
        self.step(F.cross_entropy(logits, self.b.data.y[rows].to(self.u.device)), self.opt)


def distance(got, goal):
    "Sum over output rows of 1 - cosine; biases and the weights of norms do not count."
    if goal.dim() < 2: return 0.
    got, goal = got.flatten(1), goal.flatten(1)
    return (1 - (got * goal).sum(1) / (got.norm(dim=1) * goal.norm(dim=1) + 1e-6)).sum()


def flat(net): return torch.cat([p.detach().flatten() for p in net.parameters()])


def unflatten(theta, net):
    "A flat vector as the parameters of `net`, by name."
    shapes = {n: p.shape for n, p in net.named_parameters()}
    parts = theta.split([shape.numel() for shape in shapes.values()])
    return {n: part.view(shape) for (n, shape), part in zip(shapes.items(), parts)}


# --- ours ---------------------------------------------------------------------------------------------------------

class Ours:
    "A distiller of the library, in the library's own loop."
    def __init__(self, bench):
        self.b, self.method = bench, self.of(bench)
        more = self.method.more_leaves(bench.data, [bench.job.ipc] * bench.classes, bench.job.device)
        self.s = State(bench.u, bench.y, bench.scale, bench.classes, **more)
        rates = self.method.rates()
        groups = [{"params": [leaf], "lr": rates[name]} for name, leaf in self.s.leaves.items()]
        self.opt = self.method.optimiser(self.s, groups)
        if bench.job.method == "tm":
            model = bench.fresh()
            self.s.prepared = Expert(bench.path()), model, functional(model)
        else: self.s.prepared = self.method.prepare(self.s, bench.data, 0, bench.job.device)
        self.real = First(bench) if bench.job.same else RealBatches(bench.data, bench.scale)

    @staticmethod
    def of(bench):
        job, shared = bench.job, dict(net=bench.net, augment=bench.augment, init="noise")
        classes = dict(shared, batch_real=job.batch_real)
        if job.method == "dm": return DistributionMatching(lr=1., **classes)
        if job.method in ("dc", "dsa"):
            outer, inner = job.loops
            return GradientMatching(lr=.1, outer=outer, inner=inner, **classes)
        if job.method == "dd": return BackpropThroughTraining(epochs=job.walks, batch_real=job.batch_outer, **shared)
        if job.method == "tm":
            return TrajectoryMatching(lr=100., lr_alpha=1e-5, alpha=.01, student_steps=job.steps, max_start=1,
                                      expert_epochs=1, **shared)

    @property
    def u(self): return self.s.u

    def __call__(self):
        for losses in self.method.steps(self.s, self.real, self.b.data, self.b.g):
            self.method._descend(self.s, self.opt, losses)


class Expert:
    "One expert in memory, with two epochs."
    def __init__(self, path): self.path = path
    def __len__(self): return 1
    def read(self, expert, epochs, device): return self.path


class First:
    "Real batches that are not drawn: the first images of a class, or of all."
    def __init__(self, bench): self.b = bench
    def __call__(self, c, size, g): return self.at(self.b.data.per_class[c][:size])[0]
    def mixed(self, size, g): return self.at(torch.arange(size))
    def at(self, rows):
        x, y = (t[rows].to(self.b.job.device) for t in (self.b.data.x, self.b.data.y))
        return self.b.scale.normalise(pixels(x)), y


# --- gradients of real data ---------------------------------------------------------------------------------------

def objectives(job):
    attack = PGD(Linf(EPS[job.data]), 10, EPS[job.data] / 4)
    curvature = {f"curvature, {v}": Curvature(variant=v) for v in VARIANTS}
    return {"standard": Standard(), "adversarial, PGD-10": Adversarial(attack)} | curvature


class RealGradients:
    "The gradients that DC's images are to match: one batch of every class through `objective`, pixels in."
    def __init__(self, bench, objective):
        self.b, self.method = bench, GradientMatching(real_objective=objective)
        self.x, self.rows = bench.data.images(bench.job.device), bench.data.per_class
        self.net = bench.net(bench.data).to(bench.job.device).train()

    def __call__(self):
        weights = [p for p in self.net.parameters() if p.dim() > 1]
        for c, rows in enumerate(self.rows):
            x = self.x[rows[torch.randperm(len(rows), generator=self.b.g)[:self.b.job.batch_real]]]
            self.method._real_gradient(self.net, weights, x, c, self.b.g)


# --- a process of its own -----------------------------------------------------------------------------------------

def side(bench, name):
    "One iteration, to be called again and again; `.u` are its images."
    if bench.job.method == "real": return RealGradients(bench, objectives(bench.job)[name])
    return Plain(bench) if name == "plain" else Ours(bench)


def compare(job):
    """One iteration of both from the same images, network and batches: largest difference of the images, and of their
    last gradients over the largest gradient."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bench = Bench(job)
    sides = [side(bench, name) for name in ("plain", "ours")]
    for iterate in sides: iterate()
    (u, grad), (v, other) = ((s.u.detach(), s.u.grad) for s in sides)
    return {"moved": (u - bench.u).abs().max().item(), "apart": (u - v).abs().max().item(),
            "gradients apart": ((grad - other).abs().max() / grad.abs().max()).item()}


def warm_up(bench):
    "Libraries are loaded, nothing is left: a double backward of a tiny network."
    tiny = Net(settings=dict(width=2))(bench.data).model.to(bench.job.device)
    u = bench.u[:1].clone().requires_grad_()
    grads = torch.autograd.grad(tiny(u).sum(), list(tiny.parameters()), create_graph=True)
    torch.autograd.grad(sum(g.square().sum() for g in grads), u)


def settle():
    "Give freed memory back, and let the peak begin anew where the system allows it."
    try: ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError): pass
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass


def peak(device):
    "MB."
    if device == "cuda": return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def measure(job, name):
    "Seconds of an iteration, and the MB it takes."
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if name != "plain" or job.heap == "both": keep_heap()
    bench = Bench(job)
    iterate = side(bench, name)
    warm_up(bench)
    settle()
    cuda = job.device == "cuda"
    if cuda: torch.cuda.reset_peak_memory_stats()
    clock, before, times = time.perf_counter if cuda else time.process_time, peak(job.device), []
    while len(times) < 2 or sum(times[1:]) < job.seconds:
        if cuda: torch.cuda.synchronize()
        start = clock()
        iterate()
        if cuda: torch.cuda.synchronize()
        times.append(clock() - start)
    return {"seconds": statistics.median(times[1:]), "MB": peak(job.device) - before}


def alone(context, work, *args):
    "`work(*args)` in a process that nothing ran in before."
    with ProcessPoolExecutor(1, context) as pool: return pool.submit(work, *args).result()


# --- rows ---------------------------------------------------------------------------------------------------------

METHODS = ("dc", "dsa", "dm", "tm", "dd", "real")
QUICK = dict(width=8, batch_real=16, outer=2, inner=3, steps=10, batch_outer=64, seconds=.2)


def real_images(name, job, folder):
    """A file with as many real images of every class as a batch needs, and some more; random ones where the data set is
    not at hand."""
    wanted = 10 * max(2 * job.batch_real, -(-job.batch_outer // 10))
    try: data = load("mnist5k") if name == "mnist" else load(name)
    except MissingData:
        x = torch.randint(256, (wanted, 3, 32, 32), dtype=torch.uint8, generator=generator_of(0, name))
        data = ImageSet(x, torch.arange(wanted) % 10, tuple(map(str, range(10))), name)
    part = sample(data, min(wanted, len(data)))
    images = Compressed(part.x, part.y, part.classes, part.name, part.split)
    return str(save(images, Path(folder) / f"{name}.safetensors"))


def pairs(context, job, first, second, repeats):
    "Both sides in turns, who begins alternates: [(first, second), ...]."
    found = []
    for k in range(repeats):
        order = (first, second) if k % 2 else (second, first)
        done = {name: alone(context, measure, job, name) for name in order}
        found.append((done[first], done[second]))
    return found


def ratios(found, first, second):
    "Columns of a row: seconds and MB of each, and second / first."
    columns = {}
    for of, unit in (("seconds", "s"), ("MB", "MB")):
        for k, name in enumerate((first, second)):
            columns[f"{name} {unit}"] = statistics.median(pair[k][of] for pair in found)
    for of, name, prefix in (("seconds", "time", ""), ("MB", "memory", "memory ")):
        by = [b[of] / a[of] if a[of] else float("nan") for a, b in found]
        columns |= {name: statistics.median(by), f"{prefix}lowest": min(by), f"{prefix}highest": max(by)}
    return columns


def distiller_row(context, job, repeats):
    compared = alone(context, compare, replace(job, same=True, steps=min(job.steps, 10)))
    found = ratios(pairs(context, job, "ours", "plain", repeats), "ours", "plain")
    return {"table": "plain / ours", "method": job.method, "data": job.data, "ipc": job.ipc} | found | compared


def real_rows(context, job, repeats):
    for name in objectives(job):
        if name == "standard": continue
        found = ratios(pairs(context, job, "standard", name, repeats), "plain", "objective")
        yield {"table": "objective / plain", "method": f"real gradients, {name}", "data": job.data} | found


def rows(args, context, folder):
    base = Job("", "", 1, "", args.width, args.batch_real, *args.loops, args.steps, args.batch_outer, args.device,
               args.seconds, args.heap)
    for name in args.data:
        base = replace(base, data=name, images=real_images(name, base, folder))
        for method in args.methods:
            job = replace(base, method=method)
            if method == "real": yield from real_rows(context, job, args.repeats)
            else: yield from (distiller_row(context, replace(job, ipc=ipc), args.repeats) for ipc in args.ipc)


def main(args):
    context, made = multiprocessing.get_context("forkserver"), []
    context.set_forkserver_preload(PRELOAD)
    names = ("device", "width", "batch_real", "loops", "steps", "batch_outer", "heap", "repeats")
    settings = {name: getattr(args, name) for name in names} | {"loops": "{} {}".format(*args.loops)}
    out = args.out or (None if args.quick else Path(__file__).with_suffix(".csv"))
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(args, context, folder):
            made.append(row)
            print({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            table = pd.DataFrame(made)
            if out: table.assign(**settings, **machine()).to_csv(out, index=False, float_format="%.4g")
    print("\n" + ", ".join(f"{k} {v}" for k, v in settings.items()))
    for name, part in table.groupby("table", sort=False):
        part = part.drop(columns="table").dropna(axis=1, how="all")
        print("\n" + part.to_string(index=False, na_rep="", float_format="%.3g"))
    if "apart" in table and (table[["apart", "gradients apart"]] > 1e-4).any(axis=None):
        sys.exit("ours and the plain loop do not compute the same: see `apart`")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="tiny sizes, one pair of each: does it run?")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, metavar="METHOD", help=", ".join(METHODS))
    p.add_argument("--data", nargs="+", choices=tuple(EPS), help="mnist: the digits of mnist5k; cifar10: random pixels "
                                                                 "where it is not at hand; both, with --quick mnist")
    p.add_argument("--ipc", nargs="+", type=int, default=(1, 10))
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--width", type=int, default=Job.width, help="of the ConvNet")
    p.add_argument("--batch-real", type=int, default=Job.batch_real, help="real images of a class in a batch")
    p.add_argument("--loops", nargs=2, type=int, default=(Job.outer, Job.inner), metavar=("OUTER", "INNER"),
                   help="DC, DSA above ipc 1: steps on the images in an iteration, epochs of training between two "
                        "(published at ipc 10: 10 50)")
    p.add_argument("--steps", type=int, default=Job.steps,
                   help="TM, DD: unrolled steps (DD: in whole walks through the batches)")
    p.add_argument("--batch-outer", type=int, default=Job.batch_outer, help="DD: real images that judge")
    p.add_argument("--seconds", type=float, default=Job.seconds, help="of iterations, for a process")
    p.add_argument("--heap", choices=("both", "ours"), default="both", help="who keeps freed memory")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--out", help="where the table is written; benchmarks/distill.csv, with --quick nowhere")
    args = p.parse_args()
    if args.quick:
        small = {k: v for k, v in QUICK.items() if k in vars(args)}
        vars(args).update(small, loops=(QUICK["outer"], QUICK["inner"]), repeats=1)
    args.data = args.data or (("mnist",) if args.quick else tuple(EPS))
    main(args)
