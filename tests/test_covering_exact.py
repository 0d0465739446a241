"""The exact solver: what is dropped, forced, split and cut changes no answer; what it proves can be checked, and what
was tampered with is refused or true."""
import itertools
from dataclasses import replace
from math import inf
import numpy as np
import pytest
import torch
from conftest import FULL, many
from rdd_lib.core import BadArgument, generator_of
from rdd_lib.covering import warm as W
from rdd_lib.covering.certificate import Cut, verify_certificate
from rdd_lib.covering.distances import Rows, space_of
from rdd_lib.covering.k_center import k_mcs
from rdd_lib.covering.question import Question
from rdd_lib.covering.reduce import reduce
from rdd_lib.covering.set_cover import eta_mcs
from test_covering_instances import clustered, lattice, planar, pmed, roads


# --- what is dropped, forced and split --------------------------------------------------------------------------------

def fewest(masks, rows):
    "Size of the smallest set of columns, as bits of rows, that hold all rows."
    of = lambda k: itertools.combinations(masks, k)
    return next(k for k in range(len(masks) + 1) if any(union(c) & rows == rows for c in of(k)))


def union(masks):
    every = 0
    for m in masks: every |= m
    return every


def csr(a): return np.cumsum([0, *a.sum(1)]), np.nonzero(a)[1].astype(np.int32)


def masks_of(start, balls, n):
    masks = [0] * n
    for r in range(len(start) - 1):
        for b in balls[start[r]:start[r + 1]]: masks[b] |= 1 << r
    return masks


def size_of(island, n):
    masks = masks_of(island.start, island.held_by, n)
    return fewest([m for m in masks if m], (1 << len(island.points)) - 1)


@pytest.mark.parametrize("seed", many(200))
def test_what_is_left_needs_as_many_balls(seed):
    draw = np.random.default_rng(seed)
    n, m = draw.integers(1, 15), draw.integers(1, 15)
    a = draw.random((m, n)) < draw.choice([.1, .2, .35, .5])
    a[np.arange(m), draw.integers(n, size=m)] = True                                # every point has a ball
    left = reduce(*csr(a), n)
    assert len(left.forced) + sum(size_of(i, n) for i in left.islands) == fewest(masks_of(*csr(a), n), (1 << m) - 1)
    for ball, witness in left.forced: assert a[witness, ball]
    for i in left.islands:
        again = reduce(i.start, i.held_by, n, i.points)
        assert not again.forced and [j.points.tolist() for j in again.islands] == [i.points.tolist()]
    twice = reduce(*csr(np.block([[a, np.zeros_like(a)], [np.zeros_like(a), a]])), 2 * n)
    assert (len(twice.forced), len(twice.islands)) == (2 * len(left.forced), 2 * len(left.islands))


def test_nothing_is_left_of_equal_points_one_ball_and_lonely_points():
    for a in (np.ones((6, 6), bool), np.eye(7, dtype=bool), np.ones((1, 5), bool)):
        left = reduce(*csr(a), a.shape[1])
        assert not left.islands and len(left.forced) == (7 if len(a) == 7 else 1)
    far = torch.tensor([[0, inf, 1], [inf, 0, inf], [1, inf, 0]]).double()
    assert len(eta_mcs(distances=far, eta=1, progress=False)) == 2


# --- islands and cuts -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("m", (1, 2, 5, 20))
def test_islands_are_rounded_up_one_by_one(m):
    "m circles of five: the linear program says 5 m / 3, the truth is 2 m, and no case is needed to see it."
    angle = torch.arange(5) * 2 * torch.pi / 5
    circle = torch.stack([angle.cos(), angle.sin()], 1).double()
    points = torch.cat([circle + torch.tensor([5. * i, 0]) for i in range(m)])
    rows = Rows(space_of(points), 1.44)
    question = Question(rows, 1.44, 2 * m - 1)
    assert question.weigh(lambda: False) and question.nodes == 0
    cover = eta_mcs(points, 1.2, progress=False)
    assert cover.optimal and len(cover) == 2 * m == cover.check(points).certified


# --- the same without the private door --------------------------------------------------------------------------------

def test_the_cold_way_proves_the_same(monkeypatch):
    sets = [(planar(120, seed)["points"], 8) for seed in range(3)]
    warm = [k_mcs(x, k, progress=False) for x, k in sets]
    monkeypatch.setattr(W, "highs", lambda: None)
    cold = [k_mcs(x, k, progress=False).check(x) for x, k in sets]
    for a, b in zip(warm, cold): assert a.optimal and b.optimal and a.radius == b.radius


# --- what can be checked ----------------------------------------------------------------------------------------------

def certified():
    "Covers whose certificates have cuts, cases and blocks between them."
    for make, k in ((lambda: planar(300, 1), 20), (lambda: planar(300, 3), 20), (lambda: clustered(500, 15), 20)):
        points = make()["points"]
        yield points, k, k_mcs(points, k, progress=False)


def changed(part, draw):
    "The part with one thing changed that it rests on."
    at = draw.integers(len(part.leaves))
    leaf = part.leaves[at]
    kind = draw.integers(6)
    if kind == 0: leaf = replace(leaf, weights=leaf.weights + (torch.arange(len(leaf.weights)) == 0))
    elif kind == 1: leaf = replace(leaf, weights=leaf.weights[1:], pairs=leaf.pairs[1:])
    elif kind == 2 and leaf.cuts:
        leaf = replace(leaf, cuts=tuple(replace(c, divisor=3) for c in leaf.cuts))
    elif kind == 3 and leaf.cuts:
        leaf = replace(leaf, cuts=tuple(replace(c, points=c.points[1:]) for c in leaf.cuts))
    elif kind == 4:
        other = torch.full((1, 2), draw.integers(300).item())
        leaf = replace(leaf, pairs=torch.cat([leaf.pairs[1:], other]))
    else: leaf = replace(leaf, cuts=(*leaf.cuts, Cut(torch.arange(4), 2, int(leaf.weights.sum()))))
    return replace(part, leaves=(*part.leaves[:at], leaf, *part.leaves[at + 1:]))


def test_what_was_tampered_with_is_refused_or_true():
    draw, refused, kinds = np.random.default_rng(0), 0, set()
    for points, k, cover in certified():
        part, = cover.certificate.parts
        kinds |= {"cuts"} if any(leaf.cuts for leaf in part.leaves) else set()
        kinds |= {"blocks"} if part.blocks else set()
        kinds |= {"cases"} if any(leaf.path for leaf in part.leaves) else set()
        assert verify_certificate(points, cover.certificate, k=k) == pytest.approx(cover.radius, rel=1e-8)
        for _ in range(40):
            forged = replace(cover.certificate, parts=(changed(part, draw),))
            try: assert verify_certificate(points, forged, k=k) <= cover.radius * (1 + 1e-9)
            except BadArgument: refused += 1
        if len(part.leaves) > 1:
            forged = replace(cover.certificate, parts=(replace(part, leaves=part.leaves[1:], blocks=()),))
            with pytest.raises(BadArgument): verify_certificate(points, forged, k=k)
    assert refused > 20 and kinds >= {"blocks"}, kinds


# --- from points to proof ---------------------------------------------------------------------------------------------

def mirrored(seed):
    "A set, and its mirror image far away."
    x = planar(130, seed)["points"]
    return dict(points=torch.cat([x, torch.stack([4 - x[:, 0], x[:, 1]], 1)]))


FAMILIES = {"planar": (lambda s: planar(300, s), 20), "clustered": (lambda s: clustered(500, 15, s), 20),
            "lattice": (lambda s: lattice(400, 60, s), 5), "roads": (lambda s: roads(600, .045, s), 100),
            "pmed": (lambda s: pmed(500, s), 50), "mirrored": (mirrored, 40)}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(5 if FULL else 2))
def test_proven_and_certified(family, seed):
    "A certificate that holds and meets the radius of a cover that holds: there is nothing else to believe."
    make, k = FAMILIES[family]
    space = make(seed)
    cover = k_mcs(**space, k=k, time_limit=3600, progress=False).check(**space)
    assert cover.optimal and len(cover) == k
    proven = verify_certificate(space.get("points"), cover.certificate, k=k, distances=space.get("distances"))
    assert proven == pytest.approx(cover.radius, rel=1e-8) and cover.lower_bound == pytest.approx(proven, rel=1e-8)


def test_order_and_scale_change_nothing():
    x = planar(200, 1)["points"]
    order = torch.randperm(200, generator=generator_of(0, "order"))
    best = k_mcs(x, 12, progress=False)
    assert best.optimal
    assert k_mcs(x[order], 12, progress=False).radius == pytest.approx(best.radius, rel=1e-12)
    assert k_mcs(8 * x, 12, progress=False).radius == pytest.approx(8 * best.radius, rel=1e-12)


@pytest.mark.skipif(not FULL, reason="half a minute and three")
@pytest.mark.parametrize("make, k, radius", ((lambda: roads(1500, .05), 50, 95), (lambda: planar(1000), 50, .0875317)))
def test_large_ones_to_proof(make, k, radius):
    space = make()
    cover = k_mcs(**space, k=k, time_limit=3600, progress=False).check(**space)
    assert cover.optimal and cover.radius == pytest.approx(radius, rel=1e-6)
    proven = verify_certificate(space.get("points"), cover.certificate, k=k, distances=space.get("distances"))
    assert proven == pytest.approx(cover.radius, rel=1e-8)


# --- the same steps on every machine ----------------------------------------------------------------------------------

@pytest.mark.parametrize("solve", (lambda x, **o: k_mcs(x, 25, **o), lambda x, **o: eta_mcs(x, .3, **o)))
def test_a_work_limit_ends_at_the_same_step_on_one_core_and_on_two(solve):
    x, threads = torch.rand(700, 3, generator=generator_of(4), dtype=torch.float64), torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 1):
            torch.set_num_threads(n)
            found.append(solve(x, work_limit=.4, time_limit=3600, seed=2, progress=False).check(x))
    finally: torch.set_num_threads(threads)
    assert not found[0].optimal
    for other in found[1:]:
        assert found[0].indices.tolist() == other.indices.tolist() and found[0].lower_bound == other.lower_bound


def test_no_work_is_a_cover_and_more_work_is_no_worse():
    x = torch.rand(400, 3, generator=generator_of(5), dtype=torch.float64)
    covers = [k_mcs(x, 15, work_limit=w, progress=False).check(x) for w in (0, .2, 2)]
    assert all(a.radius >= b.radius and a.lower_bound <= b.lower_bound for a, b in zip(covers, covers[1:]))
    with pytest.raises(BadArgument, match="work_limit must be a number >= 0, got -1"): k_mcs(x, 15, work_limit=-1)
    with pytest.raises(BadArgument, match="work_limit must be a number >= 0, got 'much'"):
        eta_mcs(x, .1, work_limit="much")
