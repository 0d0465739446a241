"""Proves the optima that tests/test_covering_instances.py asserts, by two routes: k_mcs, and integer programs (scipy,
no code of ours) over the distances that occur, on the whole matrix.

    python benchmarks/prove_instances.py [part of a name ...]
"""
import sys
import time
from math import inf
from pathlib import Path
import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from rdd_lib.covering.k_center import k_mcs

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from test_covering_instances import INSTANCES    # noqa: E402

TIE = 1e-9                                       # distances that differ by less, relatively, are one distance


def matrix_of(space, norm):
    "All distances, by scipy; bytes stand for pixels / 255."
    if "distances" in space: return space["distances"].double().numpy()
    x = space["points"].numpy()
    return cdist(x, x, {1: "cityblock", 2: "euclidean", inf: "chebyshev"}[norm]) / (255 if x.dtype == np.uint8 else 1)


def levels(d):
    "The different distances, ascending; of those that are equal but for rounding, the largest."
    v = np.unique(d[np.isfinite(d)])
    return v[np.diff(v, append=inf) > TIE * v]


def essential(near):
    "The program without rows that others imply and columns that others hold: k balls cover both or neither."
    while True:
        before, near = near.shape, np.unique(np.unique(near, axis=0), axis=1)
        t = near.astype(np.float32)
        near = near[~((t @ t.T == (size := t.sum(1))) & (size < size[:, None])).any(1)]   # a row that holds another
        t = near.astype(np.float32)
        near = near[:, ~((t.T @ t == (size := t.sum(0))[:, None]) & (size > size[:, None])).any(1)]
        if near.shape == before: return near


def covered(near, k):
    "Whether k balls hold all points; no time limit, so the answer is one. Any cover of at most k ends it."
    rows = essential(near)
    ones = np.ones(rows.shape[1])
    constraints = [LinearConstraint(csr_matrix(rows, dtype=float), 1, inf), LinearConstraint(ones[None], 0, k)]
    r = milp(ones, integrality=ones, bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 1e9})
    assert r.status in (0, 2), r.message
    return r.status == 0


def optimum(d, k, known):
    """The least distance at which k balls hold all points, by bisection below a known one; it is asked first whether
    the one before that is too small."""
    v = levels(d)
    low, high = 0, int(np.searchsorted(v, known * (1 - TIE)))
    mid = high - 1
    while low < high:
        if covered(d <= v[mid] * (1 + TIE / 2), k): high = mid
        else: low = mid + 1
        mid = (low + high) // 2
    return float(v[low])


def main(parts):
    for name, (make, k, written, norm) in INSTANCES.items():
        if parts and not any(p in name for p in parts): continue
        space, begin = make(), time.perf_counter()
        cover, d = k_mcs(**space, k=k, norm=norm, time_limit=600., progress=False), matrix_of(space, norm)
        ours, begin = time.perf_counter() - begin, time.perf_counter()
        known = d[:, cover.indices].min(1).max()                                 # that of a cover, whoever found it
        assert len(cover) == k and abs(known - cover.radius) <= TIE * known
        proven = optimum(d, k, known)
        theirs, doubt = time.perf_counter() - begin, "" if cover.optimal else " (not proven)"
        said = f"{cover.radius!r}{doubt} by k_mcs ({ours:.1f} s), {proven!r} by integer programs ({theirs:.1f} s)"
        agree = cover.optimal and abs(cover.radius - proven) <= TIE * proven
        other = "" if abs(written - proven) <= TIE * proven else f"; the test says {written!r}"
        print(f"{name}: N = {len(d)}, k = {k}: {said}: {'agree' if agree else 'DIFFER'}{other}", flush=True)


if __name__ == "__main__": main(sys.argv[1:])
