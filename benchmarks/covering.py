"""Radius, proven bound, seconds and memory of k-MCS (joint, l2, raw pixels; with `--families` the k-center families of
the literature as tests/test_covering_instances.py makes them), side by side on one machine, each method and instance
in a process of its own:

    naive      Algorithm 1 as written: bisection over real eta, each step a program on the whole N x N adjacency
               (scipy's milp). A step that runs out of time is unknown, and ends it. The distances come from our code;
               where the adjacency would pass 4 GB it is not run.
    gonzalez   farthest first, from one start, with the bound that k + 1 points give.
    deepcore   k-center greedy as DeepCore and active-learning programs do it: float features, the whole matrix
               chosen x N, its column minima in every step.
    ours       k_mcs under the time limit.

    python benchmarks/covering.py [--sizes 500 2000 ...] [--classes] [--cifar10] [--families] [--time-limit 120]
                                  [--methods ...]
                                  [--naive-limit 300] [--again METHOD ...] [--out benchmarks/covering.csv]

Every finished row is in the file at once; rows of the same settings on the same processor are kept, `--again` makes
those of some methods again. The radius is measured again, whatever a method says. Memory is the peak of a
process and all that it started; `base` is what the imports and the data take.
"""
import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from rdd_lib.core import BadArgument, generator_of
from rdd_lib.files import atomic
from rdd_lib.data import load
from rdd_lib.files import kept as folder_of

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_covering_instances import clustered, lattice, planar, pmed, roads    # noqa: E402

SIZES = (500, 2000, 5000, 20_000, 60_000)
SAME = ["data", "class", "N", "k", "method", "limit", "threads", "cpu"]          # what makes two rows the same row
COLUMNS = SAME[:5] + ["radius", "bound", "gap", "seconds", "peak MB", "base MB", "certificate", "certified",
                      "verify seconds", "note", "limit", "threads", "cpu", "cores", "versions", "date"]


# --- the methods: (points, k, limit, tell) -> what is known, besides the centres --------------------------------------

def naive(space, k, limit, tell, delta=1e-5):
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csc_matrix
    from rdd_lib.covering.distances import distances
    begin, points = time.monotonic(), space.get("points")
    if points is None: d = space["distances"].double().numpy()
    else: d = np.concatenate([distances(part, points).numpy() for part in points.split(2048)])
    n = len(d)
    low, high, centres, steps = 0., d[np.isfinite(d)].max(), None, 0
    while high - low > delta:
        eta, left = (low + high) / 2, limit - (time.monotonic() - begin)
        tell(centres, bound=low or None, note=f"stopped in step {steps + 1}, eta = {eta:.4f}: unknown")
        if left <= 0: break
        rows = [LinearConstraint(csc_matrix(d <= eta, dtype=float), 1, np.inf), LinearConstraint(np.ones((1, n)), k, k)]
        r = milp(np.zeros(n), integrality=np.ones(n), bounds=Bounds(0, 1), constraints=rows,
                 options={"time_limit": left})
        if r.x is not None: high, centres = eta, np.flatnonzero(r.x > .5)
        elif r.status == 2: low = eta
        else: break
        steps += 1
    else: tell(centres, bound=low or None, note=f"ended after {steps} steps")


def gonzalez(space, k, limit, tell):
    from rdd_lib.covering.distances import space_of
    from rdd_lib.covering.greedy import farthest_first
    from rdd_lib.covering.proofs import crowd_bound
    space = space_of(**space)
    order, _, _ = farthest_first(space, k + 1)
    tell(order[:k], bound=space.distance(crowd_bound(space, order, k)).item())


def deepcore(space, k, limit, tell):
    feature, chosen = space["points"].flatten(1).float() / 255, [0]
    matrix = torch.zeros(k, len(feature))
    for step in range(k):
        matrix[step] = torch.cdist(feature[chosen[-1:]], feature)[0]
        if step + 1 < k: chosen.append(int(matrix[:step + 1].min(0).values.argmax()))
    tell(chosen)


def ours(space, k, limit, tell):
    from rdd_lib.covering.k_center import k_mcs
    cover = k_mcs(**space, k=k, budget="joint", time_limit=limit, progress=False)
    tell(cover.indices, bound=cover.lower_bound, certificate=cover.certificate, note="optimal" if cover.optimal else "")


METHODS = {"naive": naive, "gonzalez": gonzalez, "deepcore": deepcore, "ours": ours}


# --- one row, in a process of its own ---------------------------------------------------------------------------------

def uniform(n, seed, dimensions=10):
    "Points in ten dimensions, where every ball holds something that no other does."
    return dict(points=torch.rand(n, dimensions, generator=generator_of(seed, "uniform"), dtype=torch.float64))


FAMILIES = {"planar": (planar, (300, 20), (1000, 50), (1800, 100)),
            "clustered": (lambda n, seed: clustered(n, n // 40, seed), (500, 20), (1500, 50)),
            "rounded": (lambda n, seed: lattice(n, 60, seed), (400, 5), (1000, 20)),
            "roads": (lambda n, seed: roads(n, .05, seed), (600, 100), (1500, 50), (1500, 200)),
            "network": (pmed, (500, 50), (900, 180), (1500, 50)),
            "uniform, 10 dimensions": (uniform, (500, 20), (2000, 50))}


def space_of(data, label, n):
    "What the methods get: points, or distances."
    if data in FAMILIES: return FAMILIES[data][0](n, label)
    images = load(data)
    x = images.x if label is None else images.x[images.y == label]
    return dict(points=x[:n].clone())                                          # not a view that keeps the whole set


def one(data, label, n, k, method, limit, report):
    "Runs one method and writes what it tells, each time it does, to `report`."
    from rdd_lib.covering import distances as D
    space, spent = space_of(data, label, n), 0.
    known = D.space_of(**space)
    base, begin, last = rss(), time.time(), {}

    def write(told):
        with atomic(report) as tmp: tmp.write_text(json.dumps(told))

    def tell(centres, certificate=None, **told):
        nonlocal spent, last
        now = time.time()
        if centres is not None: told["radius"] = known.distance(known.nearest(torch.as_tensor(centres))[0].max()).item()
        last = told | dict(began=begin + spent, seconds=now - begin - spent, base=base, certificate=certificate)
        write(last | dict(certificate=None))
        spent += time.time() - now                                         # telling is no part of the method

    write(dict(began=begin, seconds=None, base=base))
    METHODS[method](space, k, limit, tell)
    last["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    last["seconds"] = last["seconds"] if method != "naive" else time.time() - begin - spent
    write(last | proven(space, k, last["certificate"]))


def proven(space, k, certificate):
    "The bound that the certificate proves, computed again, and how long that took."
    if certificate is None: return dict(certificate="none")
    from rdd_lib.covering.certificate import verify_certificate
    begin = time.time()
    try: certified = verify_certificate(space.get("points"), certificate, k=k, distances=space.get("distances"))
    except BadArgument as e: return dict(certificate="no", note=str(e))
    return {"certified": certified, "certificate": "yes", "verify seconds": time.time() - begin}


def rss(pid="self"):
    "MB that a process holds; 0 where the system does not say."
    try: said = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError: return 0.
    return next((int(line.split()[1]) / 1024 for line in said if line.startswith("VmRSS")), 0.)


def tree(pid):
    "A process and those that it started."
    try: below = " ".join((task / "children").read_text() for task in Path(f"/proc/{pid}/task").iterdir())
    except OSError: below = ""
    return [pid, *(p for child in below.split() for p in tree(int(child)))]


def row(data, label, n, k, method, limit, patience):
    "Starts the process, watches its memory, stops it `patience` seconds after its limit; what it told."
    with tempfile.TemporaryDirectory() as folder:
        report, begin, peak = Path(folder) / "report.json", time.time(), 0.
        task = json.dumps([data, label, n, k, method, limit, str(report)])
        child = subprocess.Popen([sys.executable, __file__, "--one", task], start_new_session=True,
                                 stderr=subprocess.PIPE, text=True)
        errors = []
        reader = threading.Thread(target=lambda: errors.extend(child.stderr), daemon=True)
        reader.start()
        told, stopped = {}, False
        try:
            while child.poll() is None and not stopped:
                time.sleep(.05)
                peak = max(peak, sum(map(rss, tree(child.pid))))
                if report.exists(): told = json.loads(report.read_text())
                stopped = time.time() > told.get("began", begin + 60) + limit + patience and "peak" not in told
        finally:
            if child.poll() is None: os.killpg(child.pid, signal.SIGKILL)
            child.wait()
            reader.join(5)
        if report.exists(): told = json.loads(report.read_text())
    if stopped:
        note = f"{told.get('note', '')}; had to be stopped".strip("; ")
        told |= dict(seconds=time.time() - told.get("began", begin), note=note)
    elif child.returncode:
        told["note"] = f"failed ({child.returncode}): {(errors or ['no message'])[-1].strip()[:200]}"
    return told | dict(peak=max(peak, told.get("peak", 0.)))


# --- the table --------------------------------------------------------------------------------------------------------

def machine():
    try:
        said = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":")[1].strip() for line in said if line.startswith("model name"))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    names = ("python", "rdd_lib", "torch", "numpy", "scipy", "numba", "highspy")
    versions = " ".join(f"{n} {v}" for n in names if (v := _version(n)))
    return dict(cpu=cpu, cores=os.cpu_count(), versions=versions, date=date.today().isoformat())


def _version(name):
    if name == "python": return platform.python_version()
    try: return version(name)
    except Exception: return None


def instances(args):
    "(data, class, N, k); of a family the seed instead of a class"
    if args.families: return [(name, 0, n, k) for name, (_, *sizes) in FAMILIES.items() for n, k in sizes]
    full = (folder_of("data") / "mnist" / "train.npz").exists()
    data, most = ("mnist", 60_000) if full else ("mnist5k", 4000)
    sizes = [n for n in dict.fromkeys(min(n, most) for n in args.sizes)]
    out = [(data, None, n, k) for n in sizes for k in ((5, 50) if n == 500 else (50,))]
    if args.classes: out += [(data, 0, int((load(data).y == 0).sum()), k) for k in (5, 50)]
    if args.cifar10: out += [("cifar10", 0, 5000, 50), ("cifar10", None, 50_000, 50)]
    return out


def same(row): return tuple("" if pd.isna(row[c]) else str(row[c]) for c in SAME)


def kept(path, again, wanted):
    "Rows of earlier runs, without those of the wanted instances that are to be made again."
    if not path.exists(): return []
    rows = pd.read_csv(path, dtype={c: str for c in SAME}).to_dict("records")
    name = lambda values: tuple("" if pd.isna(v) else str(v) for v in values)
    old = {name(values) for values in wanted}
    repeated = lambda r: r["method"] in again and name(r[c] for c in ("data", "class", "N", "k")) in old
    return [r for r in rows if not repeated(r) and not str(r["note"]).startswith("failed")]


def columns_of(told):
    "What a process told, as columns of the table."
    radius, bound = told.get("radius"), told.get("bound")
    if radius is None or bound is None: gap = None
    else: gap = max(0., 1 - bound / radius) if radius else 0.
    return dict(radius=radius, bound=bound, gap=gap, certificate=told.get("certificate") or "none",
                note=told.get("note", "")) | {
        "seconds": told.get("seconds"), "certified": told.get("certified"), "peak MB": told.get("peak"),
        "base MB": told.get("base"), "verify seconds": told.get("verify seconds")}


def main(args):
    path, here, threads = Path(args.out), machine(), torch.get_num_threads()
    rows = kept(path, args.again, instances(args))
    for data, label, n, k in instances(args):
        for method in args.methods:
            limit = {"naive": args.naive_limit, "ours": args.time_limit}.get(method)
            new = {"data": data, "class": label, "N": n, "k": k, "method": method,
                   "limit": "" if limit is None else f"{limit:g}", "threads": threads} | here
            if same(new) in map(same, rows) or method == "deepcore" and data in FAMILIES: continue
            size = 12 * n * n / 1e9
            too_large = method == "naive" and size > 4
            if too_large: told = dict(note=f"not run: the adjacency would take up to {size:.0f} GB")
            else: told = row(data, label, n, k, method, limit or 3600, 30 if method == "naive" else 600)
            new |= columns_of(told)
            rows.append(new)
            with atomic(path) as tmp: pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp, index=False, float_format="%.9g")
            shown = {c: v for c, v in new.items() if c not in here and v not in (None, "")}
            print({c: f"{v:.5g}" if isinstance(v, float) else v for c, v in shown.items()}, flush=True)
    table = pd.DataFrame(rows, columns=COLUMNS).drop(columns=list(here))
    print(table.to_string(index=False, na_rep="", float_format="%.4f"))


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    p.add_argument("--classes", action="store_true", help="one class of about 6000, k = 5 and 50")
    p.add_argument("--cifar10", action="store_true", help="one class and all of CIFAR-10, k = 50")
    p.add_argument("--families", action="store_true", help="the families of the literature instead of digits")
    p.add_argument("--time-limit", type=float, default=120.)
    p.add_argument("--naive-limit", type=float, default=300.)
    p.add_argument("--again", nargs="*", choices=METHODS, default=[])
    p.add_argument("--out", default="benchmarks/covering.csv")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one: one(*json.loads(args.one))
    else: main(args)
