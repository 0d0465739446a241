"""The k-center instances of the p-center literature, made here from fixed seeds: planar, clustered, with ties, and on
networks; 100 to 1,800 points.

Every optimum below was proven twice, by `benchmarks/prove_instances.py` (integer programs over the distances that
occur, its own code) and by `k_mcs`."""
from math import inf, sqrt
from typing import Callable, NamedTuple
import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import shortest_path
from rdd_lib.core import generator_of
from rdd_lib.covering.certificate import verify_certificate
from rdd_lib.covering.k_center import k_mcs


# --- the instances ----------------------------------------------------------------------------------------------------

def planar(n, seed=0): return dict(points=torch.rand(n, 2, generator=generator_of(seed, "planar"), dtype=torch.float64))


def clustered(n, clusters, seed=0):
    "Towns of different sizes."
    g = generator_of(seed, "clustered")
    town = (clusters * torch.rand(n, generator=g) ** 2).long()
    towns = torch.rand(clusters, 2, generator=g, dtype=torch.float64)
    return dict(points=towns[town] + .03 * torch.randn(n, 2, generator=g, dtype=torch.float64))


def lattice(n, side, seed=0, dtype=torch.int64):
    "Whole coordinates below `side`: many equal distances and some equal points."
    return dict(points=torch.randint(0, side, (n, 2), generator=generator_of(seed, "lattice")).to(dtype))


def _all_pairs(i, j, length, n, method):
    "Shortest ways in a graph; of parallel edges the shortest counts."
    order = np.lexsort((-length, j, i))
    keep = np.ones(len(order), bool)
    keep[:-1] = (np.diff(i[order]) != 0) | (np.diff(j[order]) != 0)
    edges = order[keep]
    graph = coo_matrix((length[edges].astype(float), (i[edges], j[edges])), shape=(n, n)).tocsr()
    return shortest_path(graph, method=method, directed=False)


def roads(n, reach, seed=0, unit=1000):
    "Towns with a road to every other within `reach`, of rounded length; distances along the roads (inf: no way)."
    x = planar(n, seed)["points"]
    d = torch.linalg.vector_norm(x[:, None] - x, dim=2).numpy()
    i, j = np.nonzero(np.triu(d <= reach, 1))
    return dict(distances=torch.from_numpy(_all_pairs(i, j, np.maximum(1, np.rint(unit * d[i, j])), n, "D")))


def pmed(n, seed=0):
    "As the OR-Library's p-median networks: n^2 / 50 edges between any two nodes, of costs 1 to 100; all shortest ways."
    g, edges = generator_of(seed, "pmed"), n * n // 50
    i, j = torch.randint(0, n, (edges,), generator=g), torch.randint(1, n, (edges,), generator=g)
    j = (i + j) % n                                                             # never itself
    cost = torch.randint(1, 101, (edges,), generator=g)
    method = "FW" if n <= 500 else "D"
    ways = _all_pairs(torch.minimum(i, j).numpy(), torch.maximum(i, j).numpy(), cost.numpy(), n, method)
    return dict(distances=torch.from_numpy(ways).long())                         # so many edges leave no node alone


class Instance(NamedTuple):
    make: Callable      # -> dict(points=...) or dict(distances=...)
    k: int
    optimum: float      # the smallest covering radius
    norm: float = 2


INSTANCES = {
    "planar 100": Instance(lambda: planar(100), 10, 0.19795482574603745),
    "planar 300": Instance(lambda: planar(300), 20, 0.13762324256671712),
    "planar 1500": Instance(lambda: planar(1500), 500, 0.02442351953710879),
    "planar 1800": Instance(lambda: planar(1800), 10, 0.20998848546054677),
    "clustered 500": Instance(lambda: clustered(500, 15), 20, 0.07394814121832793),
    "clustered 1500": Instance(lambda: clustered(1500, 30), 50, 0.06397422076180548),
    "lattice 400": Instance(lambda: lattice(400, 60), 5, sqrt(340)),
    "lattice 1000, bytes": Instance(lambda: lattice(1000, 30, dtype=torch.uint8), 20, sqrt(18) / 255),
    "lattice 800, l1": Instance(lambda: lattice(800, 100, 1), 20, 18, 1),
    "lattice 800, l_inf": Instance(lambda: lattice(800, 100, 1), 20, 12, inf),
    "roads 600, not connected": Instance(lambda: roads(600, .045), 100, 81),
    "roads 1500": Instance(lambda: roads(1500, .05), 200, 42),
    "pmed 200": Instance(lambda: pmed(200), 20, 52),
    "pmed 900": Instance(lambda: pmed(900), 180, 9),
    "pmed 1500": Instance(lambda: pmed(1500), 50, 11),
}


# --- the tests --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", INSTANCES)
def test_optimum(name):
    make, k, optimum, norm = INSTANCES[name]
    space = make()
    cover = k_mcs(**space, k=k, norm=norm, time_limit=3600, progress=False)         # until it is proven
    assert cover.optimal and len(cover) == k and cover.radius == pytest.approx(optimum, rel=1e-9) == cover.lower_bound
    cover.check(**space)
    if cover.certificate is not None:
        proven = verify_certificate(space.get("points"), cover.certificate, distances=space.get("distances"))
        assert .9 * optimum < proven <= optimum * (1 + 1e-9)


def test_the_instances_are_what_they_are_called():
    parts = INSTANCES["roads 600, not connected"].make()["distances"]
    grid = INSTANCES["lattice 1000, bytes"].make()["points"]
    assert parts.isinf().any() and 0 < pmed(200)["distances"].max() < 1000
    assert len(grid.unique(dim=0)) < len(grid) and grid.dtype == torch.uint8
