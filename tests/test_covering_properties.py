"""What must hold of every cover, against trying everything, on sets of at most nine points that hypothesis draws:
whole, byte and float points, matrices with ways that do not exist, labels in any order, every budget and norm.
Distances are measured again here, by plain numpy."""
import itertools
from math import inf, nan
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from rdd_lib.core import BadArgument
from rdd_lib.covering.certificate import CoverCertificate, Leaf, Part, verify_certificate
from rdd_lib.covering.k_center import k_mcs
from rdd_lib.covering.set_cover import eta_mcs

NORMS = st.sampled_from((1, 2, inf))
DTYPES = st.sampled_from((np.uint8, np.int64, np.int16, np.float32, np.float64))
few = settings(max_examples=40, deadline=None)
TIE = 1e-9


# --- what is drawn ----------------------------------------------------------------------------------------------------

@st.composite
def sets(draw, least=1, most=9):
    "Points on a coarse grid, so that equal distances and equal points are common; or floats anywhere."
    n, d, dtype = draw(st.integers(least, most)), draw(st.integers(1, 3)), draw(DTYPES)
    floats = draw(st.booleans()) and dtype in (np.float32, np.float64)
    number = st.floats(-2, 2, width=32) if floats else st.integers(0, draw(st.integers(0, 4)))
    return np.array(draw(st.lists(st.lists(number, min_size=d, max_size=d), min_size=n, max_size=n)), dtype)


@st.composite
def matrices(draw, least=1, most=9):
    "Symmetric, zero on the diagonal, no triangle inequality; between some points there may be no way (inf)."
    n = draw(st.integers(least, most))
    whole = draw(st.booleans())
    entry = st.integers(0, 6) if whole else st.one_of(st.sampled_from((.1, .3, .7)), st.floats(.001, 3), st.just(inf))
    d = np.zeros((n, n), np.int64 if whole else float)
    for i, j in itertools.combinations(range(n), 2): d[i, j] = d[j, i] = draw(entry)
    return d


@st.composite
def components(draw):
    "Two or three islands: (matrix, island of every point)."
    n = draw(st.integers(2, 9))
    island = np.array(draw(st.lists(st.integers(0, 2), min_size=n, max_size=n)))
    d = draw(matrices(n, n)).astype(float)
    d[~np.isfinite(d)] = 9.
    return np.where(island[:, None] == island, d, inf), island


def labels_for(n): return st.lists(st.sampled_from((-1, 0, 3, 10**12)), min_size=n, max_size=n).map(np.array)


# --- trying everything ------------------------------------------------------------------------------------------------

def measured(x, norm):
    "All distances; bytes stand for pixels / 255."
    diff = np.abs(x[:, None].astype(float) - x.astype(float))
    d = {1: diff.sum(2), 2: np.sqrt((diff ** 2).sum(2)), inf: diff.max(2)}[norm]
    return d / (255 if x.dtype == np.uint8 else 1)


def apart(d, y): return np.where(y[:, None] == y, d, inf)


def best_radius(d, k): return min(d[:, c].min(1).max() for c in itertools.combinations(range(len(d)), k))


def best_size(d, eta, tie=TIE):
    near = d <= eta * (1 + tie)
    covers = lambda k: any(near[:, c].any(1).all() for c in itertools.combinations(range(len(d)), k))
    return next(k for k in range(1, len(d) + 1) if covers(k))


def close(a, b): return a == b or abs(a - b) <= TIE * max(abs(a), abs(b))


def holds(cover, best, given, labels=None):
    "The cover is a best one, says so, and can be checked; a certificate claims no more than is true."
    labels = labels if cover.by_label else None
    cover.check(**given, labels=labels)
    reached = len(cover) if cover.problem == "eta" else cover.radius
    assert close(reached, best) and cover.optimal and close(cover.lower_bound, best) and cover.gap <= TIE
    if (certificate := getattr(cover, "certificate", None)) is not None:
        for c in (certificate, CoverCertificate.of(certificate.tensors())):
            proven = verify_certificate(given.get("points"), c, labels, distances=given.get("distances"))
            assert proven <= best * (1 + TIE)
        for part in certificate.parts if cover.problem == "k" else ():          # about more balls than there are
            assert part.size > (len(cover) if part.label is None else int((labels[cover.indices] == part.label).sum()))


# --- k-MCS ------------------------------------------------------------------------------------------------------------

@few
@given(sets(), NORMS, st.data())
def test_smallest_radius_of_any_points(x, norm, data):
    k = data.draw(st.integers(1, len(x)), "k")
    holds(k_mcs(x, k, norm=norm), best_radius(measured(x, norm), k), dict(points=x))


@few
@given(matrices(), st.data())
def test_smallest_radius_of_any_matrix(d, data):
    k = data.draw(st.integers(1, len(d)), "k")
    holds(k_mcs(distances=d, k=k), best_radius(d, k), dict(distances=d))


@few
@given(sets(2), NORMS, st.sampled_from(("per_class", "total", "joint")), st.data())
def test_every_budget(x, norm, budget, data):
    y = data.draw(labels_for(len(x)), "labels")
    d, sizes = measured(x, norm), np.unique(y, return_counts=True)[1]
    ks = {"per_class": (1, sizes.min()), "total": (len(sizes), len(x)), "joint": (1, len(x))}
    k = data.draw(st.integers(*ks[budget]), "k")
    cover = k_mcs(x, k, labels=y, norm=norm, budget=budget)
    if budget == "per_class": best = max(best_radius(d[y == c][:, y == c], k) for c in np.unique(y))
    else: best = best_radius(d if budget == "joint" else apart(d, y), k)
    holds(cover, best, dict(points=x), y)
    assert len(cover) == k * (len(sizes) if budget == "per_class" else 1)
    if budget != "joint": assert np.array_equal(y[cover.indices[cover.assignment]], y)
    if budget == "per_class": assert [(p.label, p.size) for p in cover.per_class] == [(c, k) for c in np.unique(y)]


@few
@given(sets(2), NORMS, st.data())
def test_one_ball_for_every_class_and_one_for_every_point(x, norm, data):
    "The least and the most that a total budget may be; the last point is alone in its class."
    y = data.draw(labels_for(len(x)), "labels")
    y[-1] = 7
    d, classes = apart(measured(x, norm), y), len(np.unique(y))
    holds(k_mcs(x, classes, labels=y, norm=norm, budget="total"), best_radius(d, classes), dict(points=x), y)
    holds(k_mcs(x, len(x), labels=y, norm=norm, budget="total"), 0, dict(points=x), y)
    with pytest.raises(BadArgument, match="k"): k_mcs(x, classes - 1, labels=y, norm=norm, budget="total")
    holds(k_mcs(x, 1, labels=y, norm=norm), best_radius(d, classes), dict(points=x), y)


@few
@given(components(), st.data())
def test_islands(islands, data):
    "Fewer balls than islands leave someone infinitely far away; from there on the radius is finite."
    (d, island), least = islands, len(np.unique(islands[1]))
    k = data.draw(st.integers(1, len(d)), "k")
    cover = k_mcs(distances=d, k=k)
    holds(cover, best_radius(d, k), dict(distances=d))
    assert np.isfinite(cover.radius) == (k >= least)
    whole = k_mcs(distances=np.where(np.isfinite(d), d, 1), k=least, labels=island, budget="total")
    assert whole.radius == pytest.approx(best_radius(d, least))
    holds(eta_mcs(distances=d, eta=9.), best_size(d, 9.), dict(distances=d))


@few
@given(st.integers(1, 9), st.integers(1, 3), DTYPES, NORMS, st.data())
def test_all_points_equal(n, dim, dtype, norm, data):
    value = data.draw(st.integers(0, 200 if dtype == np.uint8 else 10**4))
    x, k = np.full((n, dim), value, dtype), data.draw(st.integers(1, n))
    cover = k_mcs(x, k, norm=norm)
    holds(cover, 0, dict(points=x))
    assert len(cover) == k and cover.weights("assigned").sum() == n and (cover.weights("ball") == n).all()
    holds(eta_mcs(x, 0, norm=norm), 1, dict(points=x))
    y = np.arange(n) % 2
    if n > 1: holds(eta_mcs(x, 0, norm=norm, labels=y), 2, dict(points=x), y)


@settings(max_examples=25, deadline=None)
@given(sets(2, 7), NORMS, st.data())
def test_order_place_scale_and_copies_do_not_matter(x, norm, data):
    k, p = data.draw(st.integers(1, len(x)), "k"), data.draw(st.permutations(range(len(x))), "order")
    radius, x = k_mcs(x, k, norm=norm).radius * (255 if x.dtype == np.uint8 else 1), x.astype(float)
    for other in (x[p], x + 3, -x, np.concatenate([x, x[p[:2]]])):
        assert k_mcs(other, k, norm=norm).radius == pytest.approx(radius, rel=1e-9, abs=1e-12)
    assert k_mcs(x * 8, k, norm=norm).radius == pytest.approx(8 * radius, rel=1e-9)


# --- eta-MCS ----------------------------------------------------------------------------------------------------------

@few
@given(sets(), NORMS, st.booleans(), st.data())
def test_fewest_balls_of_any_points(x, norm, labelled, data):
    y = data.draw(labels_for(len(x)), "labels") if labelled else None
    d = measured(x, norm) if y is None else apart(measured(x, norm), y)
    one = data.draw(st.sampled_from(sorted({*measured(x, norm).ravel()})), "a distance")
    eta = float(one * data.draw(st.sampled_from((1, 1, 1.01, .99, 3)), "times"))
    cover = eta_mcs(x, eta, norm=norm, labels=y)
    holds(cover, best_size(d, eta), dict(points=x), y)
    assert cover.radius <= eta * (1 + TIE) and cover.eta == eta
    if y is not None: assert sum(p.size for p in cover.per_class) == len(cover)


@few
@given(matrices(), st.data())
def test_fewest_balls_of_any_matrix(d, data):
    eta = float(data.draw(st.sampled_from(sorted({*d[np.isfinite(d)].ravel()})), "eta"))
    holds(eta_mcs(distances=d, eta=eta), best_size(d, eta), dict(distances=d))


@few
@given(sets(), NORMS, st.data())
def test_the_two_problems_are_one(x, norm, data):
    "The radius of k balls needs at most k of them, a smaller one more; the balls that eta needs reach no farther."
    k = data.draw(st.integers(1, len(x)), "k")
    best = k_mcs(x, k, norm=norm)
    assert len(eta_mcs(x, best.radius, norm=norm)) <= k
    if best.radius > 0: assert len(eta_mcs(x, best.radius * (1 - 1e-6), norm=norm)) > k
    fewest = eta_mcs(x, eta := best.radius * 1.5, norm=norm)
    assert k_mcs(x, len(fewest), norm=norm).radius <= eta * (1 + TIE)


# --- certificates -----------------------------------------------------------------------------------------------------

@settings(max_examples=300, deadline=None)
@given(matrices(2, 7), st.booleans(), st.data())
def test_a_certificate_that_passes_is_true(d, closed, data):
    "Whatever is written into one: it is refused, or no smaller number of balls is enough."
    n, whole = len(d), d.dtype == np.int64
    point, y = st.integers(0, n - 1), data.draw(st.one_of(st.none(), labels_for(n)), "labels")

    def leaf(path=()):
        together = [(i, j) for i, j, side in path if side]
        named = st.one_of(point.map(lambda i: (i, i)), *([st.sampled_from(together)] if together else []))
        pairs = data.draw(st.lists(named, min_size=1, max_size=n, unique=True))
        weights = data.draw(st.lists(st.integers(1, 3), min_size=len(pairs), max_size=len(pairs)))
        return Leaf(torch.tensor(pairs), torch.tensor(weights), path)

    def leaves(depth=0, path=()):
        if depth == 2 or data.draw(st.booleans()): return [leaf(path)]
        i, j = sorted((data.draw(point), data.draw(point)))
        return [one for side in (True, False) for one in leaves(depth + 1, (*path, (i, j, side)))]

    key = data.draw(st.sampled_from(sorted({*d[np.isfinite(d)].ravel().tolist()})), "key")
    label = None if y is None else int(data.draw(st.sampled_from(y.tolist()), "label"))
    part = Part(label, data.draw(st.integers(1, 4), "size"), key if whole else float(key), tuple(leaves()))
    certificate = CoverCertificate((part,), "eta" if closed else "k", None, y is not None)
    try: verify_certificate(None, certificate, y, distances=d)
    except BadArgument: return
    mine = np.arange(n) if label is None else np.flatnonzero(y == label)
    inside = d[mine][:, mine] <= key if closed else d[mine][:, mine] < key
    for c in itertools.combinations(range(len(mine)), min(part.size - 1, len(mine))):
        assert not inside[:, c].any(1).all()


# --- refusals ---------------------------------------------------------------------------------------------------------

@few
@given(matrices(2).map(lambda d: np.minimum(d.astype(float), 9)),
       st.sampled_from(("asymmetric", "negative", "diagonal", "nan", "-inf", "one-sided inf")), st.data())
def test_what_is_no_matrix_of_distances_is_refused(d, wrong, data):
    i = data.draw(st.integers(0, len(d) - 1))
    j = data.draw(st.integers(0, len(d) - 1).filter(lambda j: j != i))
    before = d.copy()
    if wrong == "asymmetric": d[i, j] = d[j, i] + 1
    if wrong == "one-sided inf": d[i, j] = inf
    if wrong == "negative": d[i, j] = d[j, i] = -1e-300
    if wrong == "-inf": d[i, j] = d[j, i] = -inf
    if wrong == "diagonal": d[i, i] = 1e-300
    if wrong == "nan": d[i, j] = d[j, i] = nan
    for refuses in (lambda: k_mcs(distances=d, k=1), lambda: eta_mcs(distances=d, eta=1.)):
        with pytest.raises(BadArgument, match="distances must"): refuses()
    k_mcs(distances=before, k=1)


@few
@given(sets(), st.one_of(st.integers(max_value=0), st.integers(10, 10**20), st.floats(1, 3),
                         st.sampled_from((True, "2", nan, inf))))
def test_what_is_no_number_of_points_is_refused(x, k):
    for budget, y in (("joint", None), ("total", np.zeros(len(x), int)), ("per_class", np.zeros(len(x), int))):
        with pytest.raises(BadArgument, match="k"): k_mcs(x, k, labels=y, budget=budget)


@few
@given(sets(2).filter(lambda x: x.dtype.kind == "f"), st.sampled_from((nan, inf, -inf)), st.data())
def test_points_that_are_nowhere_are_refused(x, wrong, data):
    x[data.draw(st.integers(0, len(x) - 1)), 0] = wrong
    for refuses in (lambda: k_mcs(x, 1), lambda: eta_mcs(x, 1.)):
        with pytest.raises(BadArgument, match="no NaN and no infinity"): refuses()
