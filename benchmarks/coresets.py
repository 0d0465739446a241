"""Seconds and memory of choosing a coreset, side by side on one machine, each method and instance in a process of its
own. The proxy is trained once, kept, and has a row of its own; the others begin with its signals in memory.

    every coreset method of the registry   50 of each class; `submodular` as graph_cut and facility_location, which is
                                           also asked for 50 and 500 of all (joint)
    naive_facility_location      the whole float32 matrix, all gains in every step
    apricot_lazy, apricot_two_stage      apricot-select on the same matrix, joint; it compiles its loops in every fit:
                                         part of its seconds, and told apart
    dense_...      what DeepCore's design costs: last-layer gradients formed, N x C (D + 1), the similarity of a class a
                   whole float32 matrix, then its way of choosing: graph_cut by argmax over all, facility_location and
                   craig by lazy greedy of one bound at a time, gradmatch by OMP, glister by steps

    python benchmarks/coresets.py [--data mnist|mnist5k] [--sizes 5000 60000] [--methods ...] [--threads 4]
                                  [--again METHOD ...] [--out benchmarks/coresets.csv]

A row has the seconds of the similarity, where a method has one, and of the choice after it: `seconds` is both. `peak
MB` is the largest that the process was while it chose, `base MB` what it held before: imports, images, signals.
`objective` is measured again in float64 from the images chosen (higher is better). Every finished row is in the file at
once; rows of the same settings on the same processor are kept, `--again` makes those of some methods again, the proxy's
included: it is trained anew for that.
"""
import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from covering import machine, rss
from rdd_lib.compressor import methods
from rdd_lib.files import atomic, kept
from rdd_lib.coresets import signals as signals_module
from rdd_lib.coresets.random import Coreset
from rdd_lib.coresets.signals import Proxy, SignalCoreset, signals
from rdd_lib.coresets.submodular import Submodular, cosines, facility_location
from rdd_lib.data import load, shares
from rdd_lib.models import Net

SAME = ["data", "proxy", "N", "k", "of", "method", "threads", "cpu"]          # what makes two rows the same row
COLUMNS = SAME[:6] + ["seconds", "similarity seconds", "compile seconds", "runs", "peak MB", "base MB", "objective",
                      "images", "note", "threads", "cpu", "cores", "versions", "date"]
REPEAT, RUNS = 2., 5          # short ones are repeated, up to so many seconds and runs; the median counts


# --- ours ---------------------------------------------------------------------------------------------------------

def ours(name, settings):
    """A method of the registry, with the signals that are there: (data, signals, k, joint) -> rows chosen, their
    weights, seconds of the similarity."""
    def choose(data, s, k, joint, note):
        signals_module.signals = lambda *args, **kw: s
        make = methods()[name].make(balance=None if joint else "equal", **settings)
        made = make.compress(data, total=k if joint else None, ipc=None if joint else k, device="cpu")
        return made.indices, made.weights, None
    return choose


def timed(run):
    begin = time.perf_counter()
    return run(), time.perf_counter() - begin


# --- the others ---------------------------------------------------------------------------------------------------

def by_class(choose_one):
    """Class by class, or all at once: `choose_one(signals of the group, k, note)` gives positions, weights or None,
    seconds of the similarity."""
    def choose(data, s, k, joint, note):
        taken, weights, spent = [], [], 0.
        for rows in [torch.arange(len(data))] if joint else data.per_class:
            chosen, w, seconds = choose_one(s.take(rows), k, note)
            taken.append(rows[torch.as_tensor(np.array(chosen))])
            weights.append(w)
            spent += seconds
        weights = None if weights[0] is None else torch.cat([torch.as_tensor(w) for w in weights])
        return torch.cat(taken), weights, spent or None
    return choose


def same_matrix(s):
    "The similarity that ours uses, as one matrix in the precision of the signals."
    unit = s.gradients.unit()
    return unit.dot(unit).add_(1).div_(2).clamp_min_(0).numpy()


def in_double(s): return replace(s, features=s.features.double(), logits=s.logits.double())


def lazy_batches(s, k, note):
    "Ours, on rows that are kept, or for many images computed when asked for."
    similar, seconds = timed(lambda: cosines(s.gradients))
    return facility_location(similar, k)[0].numpy(), None, seconds


def naive(s, k, note):
    similar, seconds = timed(lambda: same_matrix(s))
    best, taken = np.zeros(len(s), np.float32), []
    for _ in range(k):
        parts = np.array_split(similar, max(1, len(s) // 512))
        gains = np.concatenate([np.maximum(part - best, 0).sum(1) for part in parts])
        gains[taken] = -np.inf
        taken.append(int(gains.argmax()))
        best = np.maximum(best, similar[taken[-1]])
    return taken, None, seconds


def apricot(optimizer):
    def choose(data, s, k, joint, note):
        from apricot import FacilityLocationSelection
        fit = lambda matrix, k: FacilityLocationSelection(k, metric="precomputed", optimizer=optimizer).fit(matrix)
        if not note:
            fit(np.eye(16), 2)
            note["compile seconds"] = timed(lambda: fit(np.eye(16), 2))[1]
        similar, seconds = timed(lambda: same_matrix(in_double(s)))
        return torch.from_numpy(fit(similar, k).ranking.astype(np.int64)), None, seconds
    return choose


def dense(s):
    "(n, C (D + 1)) last-layer gradients, formed."
    h = F.pad(s.features, (0, 1), value=1.)
    return (s.E[:, :, None] * h[:, None]).flatten(1).numpy()


def dense_cosines(s):
    g = dense(s)
    g /= np.maximum(np.linalg.norm(g, axis=1, keepdims=True), 1e-30)
    return .5 + .5 * (g @ g.T)


def dense_nearness(s):
    g = dense(s)
    square = (g ** 2).sum(1)
    d = np.sqrt(np.maximum(square[:, None] + square - 2 * (g @ g.T), 0))
    return d.max() - d


def lazily(similar, k):
    "Minoux's greedy, one bound at a time."
    bound, best, taken = similar.sum(1), np.zeros(len(similar), np.float32), []
    while len(taken) < k:
        fresh = set()
        while (j := int(bound.argmax())) not in fresh:
            bound[j] = np.maximum(similar[j] - best, 0).sum()
            fresh.add(j)
        taken.append(j)
        best = np.maximum(best, similar[j])
        bound[j] = -np.inf
    return taken


def dense_facility_location(s, k, note):
    similar, seconds = timed(lambda: dense_cosines(s))
    return lazily(similar, k), None, seconds


def dense_craig(s, k, note):
    similar, seconds = timed(lambda: dense_nearness(s))
    taken = lazily(similar, k)
    return taken, np.bincount(similar[taken].argmax(0), minlength=k), seconds


def dense_graph_cut(s, k, note):
    similar, seconds = timed(lambda: dense_cosines(s))
    total, taken = similar.sum(1), []
    for _ in range(k):
        gain = total - 2 * similar[taken].sum(0)
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
    return taken, None, seconds


def dense_gradmatch(s, k, note):
    from scipy.optimize import nnls
    g, taken, w = dense(s), [], np.zeros(0)
    left = target = g.sum(0)
    lam = .5 * float((g.astype(np.float64) ** 2).sum(1).mean())
    while len(taken) < k:
        gain = g @ left
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
        a = g[taken].astype(np.float64)
        w = np.linalg.solve(a @ a.T + lam * np.eye(len(a)), a @ target)
        if (w < 0).any():
            ridge = lam ** .5 * np.eye(len(a))
            w = nnls(np.vstack([a.T, ridge]), np.r_[target, np.zeros(len(a))])[0]
        left = target - (w @ a).astype(np.float32)
    return taken, w, 0.


def dense_glister(s, k, note):
    g, h, taken = dense(s), F.pad(s.features, (0, 1), value=1.).numpy(), []
    logits = s.logits.numpy().copy()
    label = np.eye(logits.shape[1], dtype=np.float32)[s.y.numpy()]
    for _ in range(k):
        p = np.exp(logits - logits.max(1, keepdims=True))
        gain = g @ ((p / p.sum(1, keepdims=True) - label).T @ h).ravel()
        gain[taken] = -np.inf
        taken.append(int(gain.argmax()))
        logits -= .1 * (h @ g[taken[-1]].reshape(label.shape[1], -1).T)
    return taken, None, 0.


REGISTRY = {name: ours(name, {}) for name, method in methods().items()
            if issubclass(method.make, Coreset) and method.make is not Submodular}
OURS = REGISTRY | {"graph_cut": ours("submodular", {}), "facility_location": by_class(lazy_batches)}
DENSE = (dense_facility_location, dense_craig, dense_graph_cut, dense_gradmatch, dense_glister)
OTHERS = {"naive_facility_location": by_class(naive), "apricot_lazy": apricot("lazy"),
          "apricot_two_stage": apricot("two-stage")} | {f.__name__: by_class(f) for f in DENSE}
METHODS = OURS | OTHERS
OBJECTIVES = ("facility_location", "graph_cut", "craig", "gradmatch", "glister")


def by_signals(method): return method not in REGISTRY or issubclass(methods()[method].make, SignalCoreset)


def twin(method):
    "What of ours another method is compared with."
    if method in OURS: return None
    return "facility_location" if "apricot" in method else method.split("_", 1)[1]


def runs_on(method, n, of, k, features, classes, limit):
    "'' or why not."
    if of == "joint" and "facility_location" not in method and "apricot" not in method: return None
    if of == "each" and "apricot" in method: return None
    group = n if of == "joint" else n * 1.2 / classes
    of_pairs = method in OTHERS and "match" not in method and "glister" not in method
    need = 4 * group ** 2 * of_pairs * (6 if "apricot" in method else 2)
    need += 8 * group * classes * (features + 1) * ("dense" in method)
    return f"not run: its matrices would take about {need / 1e9:.0f} GB" if need > limit * 1e9 else ""


# --- how good a choice is, in float64 -----------------------------------------------------------------------------

def objective(method, data, s, rows, weights, joint):
    "Of the images chosen, in the words of the method: summed over the classes, as a part of all images; or None."
    kind, total = twin(method) or method, 0.
    if kind not in OBJECTIVES: return None
    for group in [torch.arange(len(data))] if joint else data.per_class:
        mine = torch.isin(rows, group)
        w = None if weights is None else weights[mine].double()
        every, chosen = (in_double(s.take(some)).gradients for some in (group, rows[mine]))
        total += of_group(kind, every, chosen, w)
    return total / len(data)


def of_group(kind, every, chosen, w):
    "The objective of one group, times its number of images."
    if kind == "craig":
        square = chosen.norms[:, None] ** 2 + every.norms ** 2 - 2 * chosen.dot(every)
        return -square.clamp_min(0).sqrt().min(0).values.sum().item() / every.norms.mean().item()
    if kind == "gradmatch":
        a, b = chosen.total(w).flatten(), every.total().flatten()
        return len(every) * ((a @ b) / (a.norm() * b.norm()).clamp_min(1e-300)).item()
    if kind == "glister":
        return len(every) * chosen.along(every.total()).mean().item() / every.total().norm().item()
    similar = (chosen.unit().dot(every.unit()) + 1) / 2
    if kind == "facility_location": return similar.max(0).values.sum().item()
    return (similar.sum() - (chosen.unit().dot(chosen.unit()) + 1).sum() / 2).item() / len(chosen)


# --- one row, in a process of its own -----------------------------------------------------------------------------

def proxy_of(net, epochs):
    p = Proxy()
    return replace(p, net=Net(net), trainer=replace(p.trainer, epochs=epochs))


def part(data, n):
    "Rows of a stratified part: the first of each class."
    counts = shares([len(own) for own in data.per_class], n)
    return torch.cat([own[:k] for own, k in zip(data.per_class, counts)]).sort().values


def peak():
    "MB: the most this process held since `forget`, or, where the system cannot forget, since its start."
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def forget():
    "Let the peak begin here."
    try: Path("/proc/self/clear_refs").write_text("5")
    except OSError: pass


def one(name, net, epochs, n, k, of, method, threads, again, report):
    torch.set_num_threads(threads)
    data, proxy = load(name), proxy_of(net, epochs)
    if method == "proxy":
        files = lambda: set(kept("signals").glob("*")) if kept("signals").is_dir() else set()
        before, base = files(), rss()
        forget()
        s, seconds = timed(lambda: signals(data, proxy, device="cpu", keep=not again))
        note = "" if again or files() - before else "was there: the seconds of reading it"
        told = dict(seconds=seconds, runs=1, base=base, peak=peak(), images=len(s), note=note)
    else:
        s = signals(data, proxy, device="cpu") if by_signals(method) else None
        rows = part(data, n)
        data, s = data.subset(rows), s and s.take(rows)
        told = measured(method, data, s, k, of == "joint")
    with atomic(report) as tmp: tmp.write_text(json.dumps(told))


def measured(method, data, s, k, joint):
    note, seconds, similar = {}, [], []
    if method.startswith("apricot"): METHODS[method](data.subset(range(64)), s.take(torch.arange(64)), 2, joint, note)
    while not seconds or sum(seconds) < REPEAT and len(seconds) < RUNS:
        here = s and replace(s)             # without the errors and norms that a run before has worked out
        if not seconds:
            base = rss()
            forget()
        (rows, weights, spent), took = timed(lambda: METHODS[method](data, here, k, joint, note))
        if not seconds: most = peak()
        seconds.append(took)
        similar.append(spent)
    best = None if s is None else objective(method, data, s, rows, weights, joint)
    similarity = None if similar[0] is None else median(similar)
    return {"seconds": median(seconds), "similarity seconds": similarity, "runs": len(seconds), "base": base,
            "peak": most, "objective": best, "images": len(rows.unique())} | note


def row(job, threads, limit):
    "Starts the process, stops it after its limit; what it told."
    counts = {f"{name}_NUM_THREADS": str(threads) for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")}
    environment = os.environ | counts | {"TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        child = subprocess.Popen([sys.executable, __file__, "--one", json.dumps([*job, str(report)])],
                                 start_new_session=True, stderr=subprocess.PIPE, text=True, env=environment)
        try: errors = child.communicate(timeout=limit)[1]
        except subprocess.TimeoutExpired: return dict(note=f"failed: stopped after {limit:g} s")
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        if report.exists(): return json.loads(report.read_text())
    return dict(note=f"failed ({child.returncode}): {(errors.strip().splitlines() or ['no message'])[-1][:200]}")


# --- the table ----------------------------------------------------------------------------------------------------

def versions():
    found = machine()
    for name in ("apricot-select", "scikit-learn"):
        try: found["versions"] += f" {name} {version(name)}"
        except PackageNotFoundError: pass
    return found


def instances(args, name):
    "(N, k, of, method), the proxy first."
    most = {"mnist": 60_000, "mnist5k": 4000}[name]
    if "proxy" in args.again or any(map(by_signals, args.methods)): yield most, None, "all", "proxy"
    for n in dict.fromkeys(min(n, most) for n in args.sizes):
        for k, of in ((50, "each"), (50, "joint"), (500, "joint")):
            for method in args.methods:
                if of == "joint" and k > n: continue
                if runs_on(method, n, of, k, 512, 10, args.memory_limit) is not None: yield n, k, of, method


def text(value): return "" if value is None or pd.isna(value) else str(value)


def at_hand(name):
    "The name of the data set, or of what takes its place."
    if name != "mnist" or (kept("data") / "mnist" / "train.npz").exists(): return name
    print("MNIST in full is not at hand (set RDD_DATA): the 4,000 training digits of mnist5k in its place", flush=True)
    return "mnist5k"


def main(args):
    path, here, name = Path(args.out), versions(), at_hand(args.data)
    fixed = {"data": name, "proxy": f"{args.net}, {args.epochs} epochs", "threads": args.threads} | here
    rows = pd.read_csv(path, dtype={c: str for c in SAME}).to_dict("records") if path.exists() else []
    key = lambda r: tuple(text(r[c]) for c in SAME)
    wanted = [fixed | {"N": str(n), "k": text(k), "of": of, "method": method}
              for n, k, of, method in instances(args, name)]
    old = {key(w) for w in wanted}
    redone = lambda r: r["method"] in args.again or text(r["note"]).startswith(("failed", "not run"))
    rows = [r for r in rows if not (key(r) in old and redone(r))]
    for new in wanted:
        if key(new) in map(key, rows): continue
        n, k, of, method = int(new["N"]), int(new["k"] or 0), new["of"], new["method"]
        why = "" if method == "proxy" else runs_on(method, n, of, k, 512, 10, args.memory_limit)
        job = [name, args.net, args.epochs, n, k, of, method, args.threads, method in args.again]
        told = dict(note=why) if why else row(job, args.threads, args.time_limit)
        new |= {"peak MB": told.pop("peak", None), "base MB": told.pop("base", None)} | told
        rows.append(new)
        with atomic(path) as tmp: pd.DataFrame(rows, columns=COLUMNS).to_csv(tmp, index=False, float_format="%.6g")
        shown = {c: v for c, v in new.items() if c not in (*here, "data", "proxy", "threads") and v not in (None, "")}
        print({c: f"{v:.4g}" if isinstance(v, float) else v for c, v in shown.items()}, flush=True)
    show([r for r in rows if key(r) in old])


def show(rows):
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["extra MB"] = table["peak MB"] - table["base MB"]
    columns = ["N", "k", "of", "method", "seconds", "similarity seconds", "compile seconds", "runs", "peak MB",
               "extra MB", "objective", "note"]
    print(table[columns].to_string(index=False, na_rep="", float_format="%.4g"))
    for column in ("seconds", "similarity seconds", "compile seconds", "objective"):
        table[column] = table[column].astype(float)
    finished = [r for r in table.to_dict("records") if pd.notna(r["seconds"])]
    done = {(r["N"], text(r["k"]), r["of"], r["method"]): r for r in finished}
    found = []
    for (n, k, of, method), other in done.items():
        mine = None if method == "proxy" else done.get((n, k, of, twin(method)))
        if mine: found.append({"N": n, "k": k, "of": of, "ours": twin(method), "other": method} | ratios(mine, other))
    if not found: return
    print("\nours / other: below 1 ours is quicker, or smaller; the choice alone is without similarity and compiling")
    print(pd.DataFrame(found).to_string(index=False, na_rep="", float_format="%.4g"))


def ratios(mine, other):
    "One row by another."
    def choice(r):                                      # nan where it is not told apart
        return r["seconds"] - r["similarity seconds"] - (r["compile seconds"] if pd.notna(r["compile seconds"]) else 0)
    by = lambda column, ok: mine[column] / other[column] if ok else None
    alone = choice(mine) / choice(other) if min(choice(mine), choice(other)) > 0 else None
    return {"seconds": by("seconds", True), "choice alone": alone,
            "extra memory": by("extra MB", other["extra MB"] > 1), "objective": by("objective", other["objective"])}


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", choices=("mnist", "mnist5k"), default="mnist")
    p.add_argument("--sizes", type=int, nargs="+", default=(5000, 60_000))
    p.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD",
                   help=", ".join(METHODS))
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--again", nargs="*", choices=("proxy", *METHODS), default=[], metavar="METHOD",
                   help="any of --methods, or proxy")
    p.add_argument("--net", default="resnet18", help="of the proxy")
    p.add_argument("--epochs", type=int, default=10, help="of the proxy")
    p.add_argument("--memory-limit", type=float, default=4., help="GB: what needs larger matrices is not run")
    p.add_argument("--time-limit", type=float, default=7200., help="seconds for one row")
    p.add_argument("--out", default="benchmarks/coresets.csv")
    p.add_argument("--one", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.one: one(*json.loads(args.one))
    else: main(args)
