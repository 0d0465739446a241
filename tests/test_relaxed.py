"""The relaxed cover and the separation report on sets small enough to try everything: ties, equal points, bytes,
matrices, hurried runs, large-set code on small sets."""
import itertools
from dataclasses import replace
from math import inf
import pytest
import torch
from hypothesis import given, settings, strategies as st
from conftest import many
from rdd_lib.core import BadArgument, generator_of
from rdd_lib.covering import distances as D, guarantee as G, relaxed as R

NORMS = (1, 2, inf)


def points(seed, n, kind):
    "A few points: floats, floats on a grid (ties, equal points), bytes on a grid, all equal, or far from the origin."
    g, d = generator_of(seed, "points"), 1 + seed % 3
    if kind in (0, 4): return torch.rand(n, d, generator=g) + (1000 if kind == 4 else 0)
    grid = torch.randint(0, 4, (n, d), generator=g)
    return (grid.double() / 10, grid.to(torch.uint8), torch.ones(n, d))[kind - 1]


def best_mean(space, k):
    d = space.distance(torch.from_numpy(D.full(space)))
    return min(d[list(c)].min(0).values.mean().item() for c in itertools.combinations(range(len(d)), k))


def close(a, b): return a == b or abs(a - b) <= 1e-9 * max(1, abs(b))


# --- relaxed MCS ------------------------------------------------------------------------------------------------------

@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 4), st.sampled_from(NORMS),
       st.sampled_from((0, 5, 300)))
def test_between_the_bound_and_the_best(seed, n, k, kind, norm, steps):
    x, k = points(seed, n, kind), min(n, k)
    r = R.relaxed_mcs(x, k, norm=norm, seed=seed % 7, steps=steps).check(x)
    best = best_mean(D.space_of(x, norm=norm), k)
    assert len(r) == k and r.swept and r.indices.tolist() == sorted(set(r.indices.tolist()))
    assert r.lower_bound <= best * (1 + 1e-9) + 1e-12 and best <= r.value * (1 + 1e-9) + 1e-12
    assert r.value <= 5 * best * (1 + 1e-9) + 1e-12          # a choice that no exchange improves (Arya et al. 2004)
    if k in (1, n): assert close(r.value, best) and r.gap < 1e-5
    assert r.weights().sum() == n and r.radius >= r.value * (1 - 1e-12)
    assert close(R.relaxed_hausdorff(x, x[r.indices], norm), r.hausdorff)


def test_mostly_the_best():
    misses = 0
    for seed in many(60):
        x = points(seed, 9, seed % 3)
        misses += not close(R.relaxed_mcs(x, 3, seed=seed).value, best_mean(D.space_of(x), 3))
    assert misses <= len(many(60)) // 20


@pytest.mark.parametrize("seed", range(15))
def test_label_by_label(seed):
    x, y = points(seed, 10, seed % 4), torch.tensor([5, 0, 0, 5, 5, 0, 0, 5, 9, 9])
    r = R.relaxed_mcs(x, 2, labels=y, seed=seed).check(x, y)
    parts = [D.space_of(x[y == c]) for c in (0, 5, 9)]
    assert torch.equal(y[r.indices[r.assignment]], y) and len(r) == 6 and r.by_label
    best = sum(best_mean(p, 2) * len(p) for p in parts) / 10
    assert r.lower_bound <= best + 1e-9 and best <= r.value + 1e-9
    joint = R.relaxed_mcs(x, 6, labels=y, budget="joint", seed=seed).check(x)
    assert not joint.by_label and len(joint) == 6 and joint.lower_bound <= best_mean(D.space_of(x), 6) + 1e-9
    with pytest.raises(BadArgument, match="of label 9"): R.relaxed_mcs(x, 3, labels=y)


@pytest.mark.parametrize("seed", many(30))
def test_matrices_need_no_triangle_inequality(seed):
    d = torch.triu(torch.randint(1, 9, (8, 8), generator=generator_of(seed, "matrix")), 1)
    d = d + d.T
    if seed % 2: d = d.double() / 10
    if seed % 6 == 1: d = d.masked_fill(d >= .7, inf)                        # no way between some
    for k in (1, 2, 4, 7, 8):
        r, best = R.relaxed_mcs(distances=d, k=k, seed=seed).check(distances=d), best_mean(D.space_of(distances=d), k)
        assert r.lower_bound <= best * (1 + 1e-9) and best <= r.value * (1 + 1e-9)


def test_points_and_their_matrix_give_the_same():
    x = torch.rand(80, 3, generator=generator_of(2), dtype=torch.float64)
    a, b = R.relaxed_mcs(x, 7), R.relaxed_mcs(distances=D.distances(x, x), k=7)
    assert torch.equal(a.indices, b.indices) and close(a.value, b.value) and close(a.lower_bound, b.lower_bound)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 12), st.integers(1, 5), st.integers(1, 6))
def test_swap_changes_are_what_swaps_do(seed, n, k, b):
    g, k = generator_of(seed, "swaps"), min(k, n)
    d = torch.randint(0, 5, (n, n), generator=g).double()
    centres, tried = torch.randperm(n, generator=g)[:k].tolist(), torch.randint(0, n, (b,), generator=g)
    first, second, which = R.two_nearest(d[centres])
    got = R.swap_changes(d[tried], first, second, torch.nn.functional.one_hot(which, k).double())
    for i, j in enumerate(tried.tolist()):
        for m in range(k):
            change = d[centres[:m] + [j] + centres[m + 1:]].min(0).values.sum() - first.sum()
            assert close(got[i, m].item(), change.item())


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.integers(1, 4), st.floats(0, 3))
def test_any_prices_are_a_bound(seed, n, k, scale):
    x, k = points(seed, n, seed % 5), min(k, n)
    space, prices = D.space_of(x), torch.rand(n, generator=generator_of(seed, "prices"), dtype=torch.float64) * scale
    assert R.median_bound(space, prices, torch.arange(k)) <= best_mean(space, k) * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("labelled", (False, True))
def test_large_sets_on_small_ones(monkeypatch, labelled):
    for seed in range(8):
        x = torch.rand(90, 3, generator=generator_of(seed, "many"), dtype=torch.float64)
        if seed % 2: x = (x * 255).to(torch.uint8)
        y = torch.arange(90) % 2 if labelled else None
        good = R.relaxed_mcs(x, 5, labels=y)
        with monkeypatch.context() as m:
            for name, size in (("FULL", 20), ("SAMPLE", 40), ("TILE", 32)): m.setattr(R, name, size)
            r = R.relaxed_mcs(x, 5, labels=y).check(x, y)
            hurried = R.relaxed_mcs(x, 5, labels=y, time_limit=0).check(x, y)
        assert not r.swept and 0 < r.lower_bound <= good.value and good.lower_bound <= r.value <= 1.15 * good.value
        assert r.gap < .4 and hurried.lower_bound == 0 and hurried.gap == 1 and len(hurried) == len(r)


def test_no_time_is_still_the_truth():
    x = torch.rand(200, 3, generator=generator_of(4), dtype=torch.float64)
    r = R.relaxed_mcs(x, 9, time_limit=0).check(x)
    assert not r.swept and 0 < r.lower_bound <= R.relaxed_mcs(x, 9).value <= r.value


def test_same_seed_same_choice_and_nothing_else_is_touched():
    x = torch.rand(300, 4, generator=generator_of(6))
    before, state = x.clone(), torch.get_rng_state()
    a, b = (R.relaxed_mcs(x, 9, seed=3) for _ in range(2))
    assert torch.equal(a.indices, b.indices) and torch.equal(a.multipliers, b.multipliers)
    assert a.lower_bound == b.lower_bound
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, before)


def test_spread_finds_k_different_points():
    for n, k in ((5, 5), (40, 40), (100, 64)):
        for x in (torch.ones(n, 2), torch.rand(n, 2, generator=generator_of(n))):
            assert len(set(R.spread(D.space_of(x), k))) == k


@pytest.mark.parametrize("change, says", [
    (dict(value=1.), "value is"), (dict(lower_bound=9.), "prove a lower_bound of"), (dict(radius=9.), "radius is"),
    (dict(assignment=torch.zeros(40, dtype=torch.int64)), "not its nearest"),
    (dict(indices=torch.tensor([3, 3, 3])), "different points"),
    (dict(multipliers=torch.full((40,), -1.).double()), "prices must be")])
def test_a_false_claim_is_found(change, says):
    x = torch.rand(40, 2, generator=generator_of(8), dtype=torch.float64)
    with pytest.raises(BadArgument, match=says): replace(R.relaxed_mcs(x, 3), **change).check(x)


@pytest.mark.parametrize("bad, says", [
    (dict(k=0), "k must be from 1"), (dict(k=9), "k must be from 1 to 8"), (dict(k=True), "whole number"),
    (dict(k=None), "whole number"), (dict(k=2, budget="x"), "budget"), (dict(k=2, time_limit=-1), "time_limit"),
    (dict(k=2, steps=-1), "steps"), (dict(k=2, norm=0), "norm"), (dict(k=2, labels=[0]), "labels must be one"),
    (dict(k=2, seed=-1), "seed")])
def test_relaxed_refuses(bad, says):
    with pytest.raises(BadArgument, match=says): R.relaxed_mcs(torch.rand(8, 2), **bad)


# --- the separation report --------------------------------------------------------------------------------------------

@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 14), st.integers(0, 4), st.sampled_from(NORMS), st.integers(1, 30),
       st.sampled_from((1, 3, 5, 2048)))
def test_separation_report(seed, n, kind, norm, most, tile):
    x, y = points(seed, n, kind), torch.randint(0, 4, (n,), generator=generator_of(seed, "labels")) * 3
    d = D.distances(x, x, norm)
    every = sorted((d[i, j].item(), i, j) for i in range(n) for j in range(i + 1, n) if y[i] != y[j])
    radius = every[len(every) // 2][0] / 2 if every else 1.
    s = G.separation(x, y, radius, norm, most=most, tile=tile)
    assert s.pairs == len(every) and s.touching == sum(e <= 2 * radius * (1 + 1e-9) for e, *_ in every)
    assert len(s.closest) == min(most, len(every)) and len(s.violations) == min(most, s.touching)
    for pair, (e, *_) in zip(s.closest, every):
        assert close(pair.distance, e) and close(d[pair.i, pair.j].item(), e) and pair.i < pair.j
        assert pair.labels == (y[pair.i], y[pair.j]) and pair.labels[0] != pair.labels[1]
    assert len({(p.i, p.j) for p in s.closest}) == len(s.closest)
    assert s.classes == tuple(y.unique().tolist())
    assert torch.equal(s.between, s.between.T) and s.between.diagonal().isinf().all()
    for a, b in itertools.combinations(range(len(s.classes)), 2):
        assert close(s.between[a, b].item(), d[y == s.classes[a]][:, y == s.classes[b]].min().item())
    assert s.distance == s.between.min() and s.limit == s.distance / 2
    if every and s.limit > 0:
        assert G.separation(x, y, s.limit * (1 - 1e-6), norm).holds and not G.separation(x, y, s.limit, norm).holds
