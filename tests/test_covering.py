"""Covering on instances small enough to try everything: ties, equal points, bytes and floats, hurried runs, matrices
that are no metric."""
import _thread, itertools, logging, random, signal
from dataclasses import replace
from math import inf
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from conftest import FULL, many
from rdd_lib.core import BadArgument, UnknownName, generator_of
from rdd_lib.covering import certificate as C, distances as D, guarantee as G, k_center as K
from rdd_lib.covering import programs as P, set_cover as S

NORMS = (1, 2, inf)


def points(seed, n=None, kind=None):
    "A few points: floats, floats on a grid (ties, equal points), bytes on a grid, or all equal."
    g = generator_of(seed, "points")
    n, d, kind = n or 4 + seed % 5, 1 + seed % 3, seed % 4 if kind is None else kind
    if kind == 0: return torch.rand(n, d, generator=g)
    grid = torch.randint(0, 4, (n, d), generator=g)
    return (grid.double() / 10, grid.to(torch.uint8), torch.ones(n, d))[kind - 1]


def best_radius(space, k):
    keys = D.full(space)
    return space.distance(min(keys[:, c].min(1).max() for c in itertools.combinations(range(len(keys)), k))).item()


def best_size(space, eta):
    near = D.full(space) <= space.key_of(eta)
    covers = lambda k: any(near[:, c].any(1).all() for c in itertools.combinations(range(len(near)), k))
    return next(k for k in range(1, len(near) + 1) if covers(k))


def close(a, b): return a == b or abs(a - b) <= 1e-9 * max(1, abs(b))


# --- distances --------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from((1, 3, 784, 3072)), st.integers(0, 10**6),
       st.sampled_from(NORMS))
def test_bytes_are_exact(n, m, d, seed, norm):
    rng = random.Random(seed)
    a, b = (np.array([rng.choices((0, 1, 127, 254, 255), k=d) for _ in range(r)], np.uint8) for r in (n, m))
    diff = [[[abs(int(x) - int(y)) for x, y in zip(p, q)] for q in b] for p in a]
    plain = {1: sum, 2: lambda v: sum(x * x for x in v), inf: max}[norm]
    found = D.key_block(torch.from_numpy(a), torch.from_numpy(b), norm)
    assert found.tolist() == [[plain(v) for v in row] for row in diff]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("offset", (0, 50, 1e4))
def test_floats_are_close(norm, offset):
    x = torch.rand(40, 300, generator=generator_of(0), dtype=torch.float64) + offset
    x[1:3] = x[0]
    x[2, 0] += 1e-5
    d, direct = D.distances(x, x, norm), torch.linalg.vector_norm(x[:, None] - x, norm, dim=2)
    assert torch.allclose(d, direct, rtol=1e-9, atol=0)
    assert d[0, 1] == 0 and not d.diagonal().any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("block", (1, 100, 2**23))
def test_nearest_does_not_depend_on_blocks(norm, block):
    x = torch.randint(0, 256, (90, 12), generator=generator_of(1), dtype=torch.uint8)
    d, i = D.nearest(x, x[:9], norm, block=block)
    full = D.distances(x, x[:9], norm)
    assert torch.equal(d, full.min(1).values) and torch.equal(full[torch.arange(90), i], d)


@pytest.mark.parametrize("bad, says", [
    (dict(points=torch.zeros(0, 3)), "non-empty"),
    (dict(points=torch.tensor([[torch.nan]])), "no NaN"),
    (dict(points=torch.tensor([[inf]])), "no infinity"),
    (dict(points=torch.rand(3, 2), norm=3), "norm must be"),
    (dict(points=torch.rand(3)), "shape"),
    (dict(), "one of the two"),
    (dict(points=torch.rand(2, 2), labels=[0]), "one for each"),
    (dict(distances=torch.rand(2, 3)), "square"),
    (dict(distances=[[0, 1], [2, 0]]), "symmetric"),
    (dict(distances=[[0, -1], [-1, 0]]), ">= 0"),
    (dict(distances=[[1, 1], [1, 0]]), "itself"),
    (dict(points=torch.rand(2, 2), labels=[.5, 1.]), "whole numbers"),
    (dict(points="x"), "array of numbers"),
    (dict(distances="x"), "matrix of numbers")])
def test_refusals(bad, says):
    with pytest.raises(BadArgument, match=says): D.space_of(**bad)


# --- eta-MCS ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", many(60))
def test_fewest_balls(seed):
    x, norm = points(seed), NORMS[seed % 3]
    space = D.space_of(x, norm=norm)
    every = space.distance(torch.from_numpy(np.unique(D.full(space)))).tolist()
    for eta in {every[0], every[len(every) // 2], every[-1], every[len(every) // 2] * 1.01}:
        c = S.eta_mcs(x, eta, norm=norm).check(x)
        assert (len(c), c.lower_bound, c.optimal) == (best_size(space, eta),) * 2 + (True,)
        assert c.radius <= eta * (1 + 1e-9) and c.weights("assigned").sum() == len(x) <= c.weights("ball").sum()


@pytest.mark.parametrize("seed", many(20))
def test_fewest_balls_label_by_label(seed):
    x, y = points(seed, n=9), torch.arange(9) % 3
    y[8] = 7                                                                    # a class of one point
    middle = np.median(D.full(D.space_of(x)))
    eta = D.space_of(x).distance(int(middle) if x.dtype == torch.uint8 else float(middle)).item()
    c = S.eta_mcs(x, eta, labels=y).check(x, y)
    assert len(c) == best_size(D.space_of(x, labels=y), eta) == sum(p.size for p in c.per_class) and c.optimal
    assert torch.equal(y[c.indices[c.assignment]], y)


def test_ball_weights_are_definition_5():
    x, y = points(4, n=30, kind=0), torch.arange(30) % 2
    c = S.eta_mcs(x, .3, labels=y)
    d = D.distances(x, x[c.indices])
    assert c.weights().tolist() == ((d <= .3) & (y[:, None] == y[c.indices])).sum(0).tolist()


@pytest.mark.parametrize("solver", ("auto", "highs", "gurobi", "lp", "greedy"))
@pytest.mark.parametrize("time_limit", (0, .05, 60))
def test_any_solver_and_any_limit_tell_the_truth(solver, time_limit):
    for seed in range(6):
        x = torch.rand(70, 2, generator=generator_of(seed, "limit"), dtype=torch.float64)
        exact = S.eta_mcs(x, .12)
        c = S.eta_mcs(x, .12, solver=solver, time_limit=time_limit).check(x)
        assert exact.optimal and c.lower_bound <= len(exact) <= len(c) and c.optimal == (c.lower_bound == len(c))
        best = K.k_mcs(x, 7)
        c = K.k_mcs(x, 7, solver=solver, time_limit=time_limit).check(x)
        assert best.optimal and c.lower_bound <= best.radius * (1 + 1e-9) and best.radius <= c.radius * (1 + 1e-9)
        assert c.optimal == (c.lower_bound >= c.radius * (1 - 1e-9))


def test_gurobi_refuses_once_and_highs_takes_over(caplog):
    pytest.importorskip("gurobipy")
    P._say_once.cache_clear()
    rows = D.Rows(D.space_of(torch.arange(2100.)[:, None]), .5)
    with caplog.at_level(logging.WARNING):
        for _ in range(2): assert P.min_cover(rows, .5, range(2100), solver="gurobi")[1] == 2100
    assert len([r for r in caplog.records if "HiGHS takes over" in r.message]) <= 1


def test_a_limit_is_not_infeasible(monkeypatch):
    "A solver that always runs out of time must not change any claim."
    monkeypatch.setitem(P.PROGRAMS, "highs", lambda a, at_most, seconds, over: (None, 0))
    x = torch.rand(60, 2, generator=generator_of(3), dtype=torch.float64)
    c, exact = K.k_mcs(x, 5, solver="highs"), K.k_mcs(x, 5)
    assert c.lower_bound <= exact.radius <= c.radius
    c, exact = S.eta_mcs(x, .15, solver="highs"), S.eta_mcs(x, .15)
    assert c.lower_bound <= len(exact) <= len(c)


def test_a_wrong_cover_from_a_solver_is_not_believed(monkeypatch):
    monkeypatch.setitem(P.PROGRAMS, "highs", lambda a, at_most, seconds, over: (np.zeros(a.shape[1], bool), 0))
    x = torch.rand(60, 2, generator=generator_of(3), dtype=torch.float64)
    K.k_mcs(x, 5, solver="highs").check(x)
    S.eta_mcs(x, .15, solver="highs").check(x)


# --- k-MCS ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", many(120))
def test_smallest_radius(seed):
    x, norm = points(seed), NORMS[seed % 3]
    space = D.space_of(x, norm=norm)
    for k in (1, 2, len(x) - 1, len(x)):
        c = K.k_mcs(x, k, norm=norm, seed=seed).check(x)
        assert len(c) == k and c.optimal and close(c.radius, best_radius(space, k)) and close(c.lower_bound, c.radius)
    assert c.radius == 0


@pytest.mark.parametrize("seed", many(40))
def test_budgets(seed):
    x = points(seed, n=8)
    y = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2])                                           # the last class has one point
    per = K.k_mcs(x, 1, labels=y).check(x, y)
    total = K.k_mcs(x, 4, labels=y, budget="total").check(x, y)
    joint = K.k_mcs(x, 4, labels=y, budget="joint").check(x)
    assert close(per.radius, max(best_radius(D.space_of(x[y == c]), 1) for c in range(3)))
    assert close(total.radius, best_radius(D.space_of(x, labels=y), 4))
    assert close(joint.radius, best_radius(D.space_of(x), 4))
    assert per.optimal and total.optimal and joint.optimal and joint.radius <= total.radius + 1e-9
    assert [c.size for c in per.per_class] == [1, 1, 1] and close(max(c.radius for c in per.per_class), per.radius)
    with pytest.raises(BadArgument, match="label 2"): K.k_mcs(x, 2, labels=y)
    with pytest.raises(BadArgument, match="cannot cover 3 classes"): K.k_mcs(x, 2, labels=y, budget="total")


@pytest.mark.parametrize("seed", many(40))
def test_matrices_need_no_triangle_inequality(seed):
    g = generator_of(seed, "matrix")
    d = torch.randint(1, 9, (7, 7), generator=g)
    d = torch.triu(d, 1)
    d = d + d.T
    if seed % 2: d = d.double() / 10
    if seed % 5 == 0: d = d.double().masked_fill(d >= d.max(), inf)                      # no way between some
    space = D.space_of(distances=d)
    for k in (1, 2, 3):
        c = K.k_mcs(distances=d, k=k).check(distances=d)
        assert c.optimal and close(c.radius, best_radius(space, k))
    eta = d[d > 0].min().item()
    assert len(S.eta_mcs(distances=d, eta=eta)) == best_size(space, eta)


@pytest.mark.parametrize("labelled", (False, True))
def test_many_points_look_at_few_balls(monkeypatch, labelled):
    "The way for large sets, on small ones: its covers are covers, its bounds are bounds."
    for seed in range(12 if FULL else 4):
        x = torch.rand(60, 3, generator=generator_of(seed, "many"), dtype=torch.float64)
        if seed % 2: x = (x * 255).to(torch.uint8)
        y = torch.arange(60) % 2 if labelled else None
        best = K.k_mcs(x, 6, labels=y, budget="total")
        with monkeypatch.context() as m:
            m.setattr(K, "WIDE", 9)
            m.setattr(D, "FEW", 3)
            c = K.k_mcs(x, 6, labels=y, budget="total", solver="lp")
        c.check(x, y)
        assert best.optimal and c.lower_bound <= best.radius + 1e-9 and best.radius <= c.radius + 1e-9 and len(c) == 6


def test_bytes_and_floats_give_the_same_radius():
    x = torch.randint(0, 256, (80, 10), generator=generator_of(5), dtype=torch.uint8)
    for norm in NORMS: assert close(K.k_mcs(x, 5, norm=norm).radius, K.k_mcs(x.double() / 255, 5, norm=norm).radius)


def test_same_seed_same_cover_and_the_global_generator_is_left_alone():
    x, state = torch.rand(200, 4, generator=generator_of(6)), torch.get_rng_state()
    a, b = (K.k_mcs(x, 9, seed=3, solver="lp") for _ in range(2))
    assert torch.equal(a.indices, b.indices) and a.lower_bound == b.lower_bound
    assert torch.equal(torch.get_rng_state(), state)


def test_ctrl_c_keeps_the_best_so_far(monkeypatch):
    x, prove = torch.rand(3000, 30, generator=generator_of(8), dtype=torch.float64), K._prove

    def proves(task, part):
        "Ctrl-C as soon as there is a first bound."
        known = task.now.lower > 0
        prove(task, part)
        if task.now.lower > 0 and not known: _thread.interrupt_main()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)   # some shells start programs with Ctrl-C ignored
    with monkeypatch.context() as m:
        m.setattr(K, "_prove", proves)
        try: c = K.k_mcs(x, 30, time_limit=3600)
        finally: signal.signal(signal.SIGINT, before)
    c.check(x)
    assert c.interrupted and "interrupted" in repr(c) and len(c) == 30 and 0 < c.lower_bound < c.radius
    assert not K.k_mcs(x[:50], 3).interrupted


def test_an_error_in_a_class_is_not_swallowed(monkeypatch):
    monkeypatch.setattr(K, "_one_centre", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): K.k_mcs(torch.rand(20, 2), 1, labels=torch.arange(20) % 2)


def test_more_classes_than_cores():
    x, y = torch.rand(240, 2, generator=generator_of(9), dtype=torch.float64), torch.arange(240) % 24
    c = K.k_mcs(x, 2, labels=y).check(x, y)
    assert c.optimal and len(c) == 48 and all(p.optimal for p in c.per_class)


def test_distances_between_features():
    x = torch.randint(0, 256, (60, 1, 4, 4), generator=generator_of(10), dtype=torch.uint8)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(.5), torch.nn.Linear(16, 3)).double()
    embed = torch.nn.Sequential(torch.nn.Identity(), net).train()
    features = net.eval()(x.double() / 255).detach()
    net.train()
    double = lambda t: embed(t.double())
    net.eval()
    c, direct = K.k_mcs(x, 5, embed=double), K.k_mcs(features, 5)
    c.check(x, embed=double)
    assert c.optimal and abs(c.radius - direct.radius) < 1e-6 * direct.radius
    net.train()
    S.eta_mcs(x, c.radius, embed=net.float()).check(x, embed=net)                # in evaluation mode, and put back
    assert net.training
    with pytest.raises(BadArgument, match="embed needs points"): K.k_mcs(distances=torch.zeros(3, 3), k=1, embed=net)


# --- certificates -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(8))
def test_a_tampered_certificate_is_refused(seed):
    "More radius than any choice allows cannot be certified, whatever else is changed."
    x = torch.rand(60, 3, generator=generator_of(seed, "tampered"), dtype=torch.float64)
    if seed % 2: x = (x * 255).to(torch.uint8)
    y = torch.arange(60) % 2 if seed % 4 > 1 else None
    c = K.k_mcs(x, 4, labels=y, budget="total")
    assert c.optimal and close(C.verify_certificate(x, c.certificate, y, k=4), c.radius)
    t = c.certificate.tensors()
    again = C.CoverCertificate.of(t)
    assert C.verify_certificate(x, again, y) == C.verify_certificate(x, c.certificate, y)
    def forged(**changes): C.verify_certificate(x, t | changes, y)
    more = t["keys"] * 1.1 if t["keys"].is_floating_point() else t["keys"] + 50
    nothing = dict(pairs=t["pairs"][:0], weights=t["weights"][:0], leaf_length=t["leaf_length"] * 0)
    for changes in (dict(keys=more), dict(sizes=t["sizes"] + 40), dict(weights=-t["weights"]),
                    dict(weights=t["weights"].double()), dict(pairs=t["pairs"] + 60), nothing,
                    dict(leaf_length=t["leaf_length"] + 1)):
        with pytest.raises(BadArgument): forged(**changes)
    with pytest.raises(BadArgument, match="not 5"): C.verify_certificate(x, c.certificate, y, k=5)
    with pytest.raises(BadArgument): C.verify_certificate(x.roll(1, 0) * 0, c.certificate, y)
    part, = c.certificate.parts
    less = tuple((size, n - (at == 0)) for at, (size, n) in enumerate(part.blocks))
    forged = replace(part, leaves=part.leaves[1:], blocks=less)                                 # a case or a block less
    what = "all cases" if len(part.split[0][1]) > 1 else "a block" if part.blocks else ""
    with pytest.raises(BadArgument, match=what): C.verify_certificate(x, replace(c.certificate, parts=(forged,)), y)


def test_input_is_left_alone():
    x = points(0, n=30, kind=0)
    before = x.clone()
    K.k_mcs(x, 3)
    S.eta_mcs(x, .2)
    d = D.distances(x, x)
    keep = d.clone()
    K.k_mcs(distances=d, k=3)
    assert torch.equal(x, before) and torch.equal(d, keep)


def test_vacuous_l_inf_is_said(caplog):
    with caplog.at_level(logging.WARNING): K.k_mcs(torch.eye(6) * 255 // 1, 2, norm=inf)
    assert "says nothing" in caplog.text


@pytest.mark.parametrize("bad, says", [
    (dict(k=0), "k must be from 1"), (dict(k=9), "k must be from 1"), (dict(k=True), "whole number"),
    (dict(k=None), "whole number"), (dict(k=2, budget="x"), "budget"), (dict(k=2, gap=1), "gap"),
    (dict(k=2, starts=0), "starts"), (dict(k=2, time_limit=-1), "time_limit"),
    (dict(k=2, solver="x"), "unknown solver"), (dict(k=2, norm=0), "norm")])
def test_k_mcs_refuses(bad, says):
    with pytest.raises(BadArgument, match=says): K.k_mcs(torch.rand(8, 2), **bad)


@pytest.mark.parametrize("eta", (-1, -1e-9, float("nan"), inf, None, "1"))
def test_eta_mcs_refuses(eta):
    with pytest.raises(BadArgument, match="eta must be"): S.eta_mcs(torch.rand(8, 2), eta)


# --- the guarantee ----------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.floats(0, 2), st.integers(1, 5))
def test_proposition_2(seed, norm, epsilon, k):
    g = generator_of(seed, "prop")
    x, y = torch.randn(24, 3, generator=g, dtype=torch.float64), torch.randint(0, 2, (24,), generator=g) * 2 - 1
    y[:5], y[5:10] = -1, 1
    w, b = torch.randn(3, generator=g, dtype=torch.float64) * 3, torch.randn((), generator=g, dtype=torch.float64)
    c = K.k_mcs(x, k, labels=y, norm=norm, solver="greedy")
    loss, robust = (lambda model, *a, f=f: f(w, b, *a, norm) for f in (G.linear_worst_case, G.linear_robust))
    ball, assigned = (G.proposition2(loss, None, x, y, c, epsilon, kind) for kind in ("ball", "assigned"))
    assert ball.holds and assigned.holds and assigned.rhs <= ball.rhs + 1e-12
    assert G.corollary1(robust, None, x, y, c, epsilon).holds


@pytest.mark.parametrize("seed", range(12))
def test_separation_counts_pairs(seed):
    x, norm = points(seed, n=9), NORMS[seed % 3]
    y, d = torch.arange(9) % 3, D.distances(points(seed, n=9), points(seed, n=9), NORMS[seed % 3])
    other = y[:, None] != y
    r = d[other].median().item() / 2
    s = G.separation(x, y, r, norm)
    assert s.pairs == other.sum() // 2 and close(s.distance, d[other].min().item())
    assert s.touching == (other & (d <= 2 * r * (1 + 1e-9))).sum() // 2 and s.holds == (s.touching == 0)


def test_weights_have_two_kinds():
    with pytest.raises(UnknownName, match="assigned"): K.k_mcs(torch.rand(5, 2), 2).weights("assign")
