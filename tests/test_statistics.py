"""Paired comparisons against scipy and hand-made examples, their promises by simulation, and what they refuse."""
from itertools import combinations
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binom, binomtest
from rdd_lib.core import BadArgument, UnknownName
from rdd_lib.reproduce.tables import summary
from rdd_lib.evaluation.comparison import (Pairs, _drawn, beard, compare, difference, hits, holm, images_needed,
                                           mcnemar, paired_power, pairs, resampled)
from rdd_lib.evaluation.outcome import Outcome, Score
from rdd_lib.intervals import wilson, wilson_columns


def outcome(survived, y=None, correct=None, classes=tuple("0123456789")):
    "An `Outcome` with these survivors."
    survived = torch.as_tensor(np.asarray(survived, bool))
    correct = survived if correct is None else torch.as_tensor(np.asarray(correct, bool))
    y = torch.zeros(len(survived), dtype=torch.int64) if y is None else torch.as_tensor(y)
    by = torch.where(survived, -1, torch.where(correct, 1, 0))
    predicted, distance = torch.where(correct, y, (y + 1) % 10), torch.zeros(len(y), dtype=torch.float64)
    return Outcome(y, predicted, by, by, distance, ("clean", "pgd"), 0, classes)


def tossed(rng, skill, students, images, spread):
    shown = 1.2 + 3 * rng.standard_normal(images)
    def hits_of(s):
        tosses = rng.random((students, images))
        return tosses < 1 / (1 + np.exp(-(shown + s + spread * rng.standard_normal((students, 1)))))
    return [hits_of(s) for s in skill]


def truth(skill, spread):
    z, weight = np.polynomial.hermite_e.hermegauss(100)
    chance = [1 / (1 + np.exp(-(1.2 + s + np.hypot(3, spread) * z))) for s in skill]
    return np.subtract(*(weight @ c / weight.sum() for c in chance))


# --- McNemar ------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 2, 5, 12, 41, 400])
def test_mcnemar_is_the_two_sided_binomial_test(n):
    for k in range(0, n + 1, max(1, n // 20)):
        assert mcnemar(k, n - k) == pytest.approx(binomtest(k, n, .5).pvalue, rel=1e-9)
        few = min(k, n - k)
        wanted = min(1, 2 * sum(binom.pmf(range(few), n, .5)) + binom.pmf(few, n, .5))    # Fagerland et al. 2013, mid-p
        assert mcnemar(k, n - k, mid=True) == pytest.approx(wanted, rel=1e-9)
        assert mcnemar(k, n - k, mid=True) <= mcnemar(k, n - k)


def test_mcnemar_of_nothing_and_of_even():
    for mid in (False, True): assert mcnemar(0, 0, mid) == mcnemar(7, 7, mid) == 1


@pytest.mark.parametrize("counts", [(-1, 2), (1, -2), (.5, 1), (True, 1)])
def test_mcnemar_refuses(counts):
    with pytest.raises(BadArgument, match="whole number"): mcnemar(*counts)


def test_mcnemar_keeps_its_level():
    "Fair coins: exact stays below the level for every number of disagreements, mid-p near it."
    for n in (6, 13, 30, 100):
        k = np.arange(n + 1)
        found = {m: [i for i in k if mcnemar(int(i), int(n - i), m) <= .05] for m in (False, True)}
        exact, mid = (sum(binom.pmf(i, n, .5) for i in found[m]) for m in (False, True))
        assert exact <= .05 and exact <= mid <= .065


def test_pairs_counts_everything_once():
    a, b = np.array([1, 1, 1, 0, 0, 1], bool), np.array([1, 0, 0, 1, 0, 1], bool)
    assert pairs(a, b) == Pairs(2, 2, 1, 1) and pairs(a, b).n == 6
    assert pairs(a, b).difference == pytest.approx(1 / 6) and pairs(a, b).disagreement == pytest.approx(.5)
    assert pairs(a, b).p() == mcnemar(2, 1) and pairs(a, b).p(mid=True) == mcnemar(2, 1, mid=True)


# --- the bootstrap ------------------------------------------------------------

@pytest.mark.parametrize("students,images,spread,least,most", [
    (1, 100, 0, .90, .99), (1, 1000, 0, .91, .985), (2, 1000, .3, .78, .95), (3, 1000, .3, .85, .97),
    (5, 1000, .3, .90, .99), (3, 500, 0, .95, 1)])
def test_share_of_intervals_that_hold_the_truth(students, images, spread, least, most):
    "95 % are promised. Few students that differ much cannot keep that; students that do not differ more than keep it."
    rng, skill = np.random.default_rng(11), (.5, 0)
    found = [difference(*tossed(rng, skill, students, images, spread), draws=400) for _ in range(200)]
    assert least <= np.mean([d.lo <= truth(skill, spread) <= d.hi for d in found]) <= most


def test_an_interval_where_models_hardly_disagree():
    "Four and one disagreements in 500 are expected: a bootstrap of the images alone is often of no width at all."
    rng, d = np.random.default_rng(0), []
    for both, a, b, none in rng.multinomial(500, [.9, .008, .002, .09], size=300):
        x, y = (np.repeat(v, [both, a, b, none]) for v in ([1, 1, 0, 0], [1, 0, 1, 0]))
        d.append(difference(x, y, draws=400))
    assert np.mean([v.lo <= .006 <= v.hi for v in d]) >= .92 and all(v.hi > v.lo for v in d)


def test_false_claims_of_the_hierarchical_bootstrap():
    """Three students of two methods that are the same: few false claims where students hardly differ, more where they
    differ a lot."""
    rng = np.random.default_rng(5)
    def claim(spread): return difference(*tossed(rng, (0, 0), 3, 400, spread), draws=400).p <= .05
    rate = {spread: np.mean([claim(spread) for _ in range(150)]) for spread in (0, .3)}
    assert rate[0] <= .05 and rate[.3] <= .15


def test_patterns_draw_what_images_draw():
    "Counts of patterns have the spread of resampled images and students, done the slow way."
    rng = np.random.default_rng(0)
    a, b = tossed(rng, (.5, 0), 3, 60, .3)
    def mixed(v): return v[rng.integers(3, size=2)].mean()
    slow = [mixed(a[:, i]) - mixed(b[:, i]) for i in (rng.integers(60, size=60) for _ in range(20_000))]
    fast = _drawn(a, b, 20_000, np.random.default_rng(1))
    assert fast.std() == pytest.approx(np.std(slow), rel=.06) and fast.mean() == pytest.approx(np.mean(slow), abs=.005)


def test_the_spread_over_students_is_that_of_their_mean():
    "Without images to resample (each student gets all or, once, none), S - 1 of S give sd / sqrt(S) of the mean."
    a = np.repeat(np.array([[1], [1], [0], [1]], bool), 2000, 1)
    d = resampled(a, np.zeros((1, 2000), bool), draws=20_000)
    assert d.std() == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2, rel=.03)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**16), st.floats(.05, .95))
def test_invariances(sa, sb, n, seed, rate):
    rng = np.random.default_rng(seed)
    a, b, order = rng.random((sa, n)) < rate, rng.random((sb, n)) < rate, rng.permutation(n)
    ab, ba = difference(a, b, draws=200), difference(b, a, draws=200)
    swapped = -ba.value, -ba.hi, -ba.lo, ba.p
    assert (ab.value, ab.lo, ab.hi, ab.p) == pytest.approx(swapped, abs=1e-12)                 # the sign flips
    assert difference(a[:, order], b[:, order], draws=200) == ab                               # the order of the images
    assert difference(a, b, draws=200) == ab and 0 < ab.p <= 1 and ab.lo <= ab.hi
    assert ab.value == pytest.approx(a.mean() - b.mean(), abs=1e-12)


def test_as_many_draws_as_asked_for():
    rng = np.random.default_rng(0)
    a, b = tossed(rng, (1, 0), 2, 100, 0)
    for draws in (100, 101, 333):
        for x, y in ((a, b), (b, a), (a, a), (a[:1], a[:1])): assert resampled(x, y, draws=draws).shape == (draws,)
        d = np.sort(resampled(a, a, draws=draws))
        assert np.array_equal(d, np.sort(-d)) and d.std() > 0                                 # nothing tells them apart


def test_other_seeds_other_draws_and_nothing_global():
    rng = np.random.default_rng(0)
    a, b = tossed(rng, (1, 0), 1, 100, 0)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    one, two = difference(a, b, seed=0), difference(a, b, seed=1)
    assert one.lo != two.lo or one.hi != two.hi
    assert abs(one.lo - two.lo) < .02 and one.value == two.value and one.p == two.p
    assert torch.equal(torch.get_rng_state(), state) and np.random.get_state()[1].tolist() == numpy_state


def test_degenerate_inputs():
    ones, none = np.ones(50, bool), np.zeros(50, bool)
    for v in (ones, none):
        d = difference(v, v)
        assert d.value == 0 and d.p == 1 and d.lo < 0 < d.hi and d.lo == pytest.approx(-d.hi)
    d = difference(ones, none)
    assert d.value == 1 and d.hi <= 1 and d.lo < 1 and d.p == pytest.approx(2 / 2**50)
    assert difference([True], [False]).value == 1 and difference([True], [False]).p == 1   # a single image says nothing
    several = difference(np.ones((3, 50)), np.zeros((2, 50)), draws=1000)
    assert several.p == pytest.approx(2 / 1001) and several.students == (3, 2)


def test_many_students_and_many_draws_come_in_parts():
    rng = np.random.default_rng(0)
    a, b = tossed(rng, (1, 0), 8, 3000, .2)
    assert len(resampled(a, b, draws=5001)) == 5001


# --- what is compared ------------------------------------------------------------

def test_outcomes_scores_lists_and_arrays_are_one():
    rng = np.random.default_rng(0)
    correct = rng.random((2, 80)) < .8
    survived = correct & (rng.random((2, 80)) < .6)
    os = [outcome(s, correct=c) for s, c in zip(survived, correct, strict=True)]
    score = Score(tuple(o.rob for o in os), tuple(os))
    for form in (os, tuple(os), score, survived, torch.tensor(survived), survived.astype(float)):
        assert np.array_equal(hits(form), survived)
    assert np.array_equal(hits(os, "std"), correct) and np.array_equal(hits(os[0]), survived[:1])
    assert difference(score, correct[:1]).value == pytest.approx(survived.mean() - correct[0].mean())
    assert summary(score.values).mean == pytest.approx(survived.mean())


@pytest.mark.parametrize("bad", [[], [[True], [True, False]], np.zeros((2, 0)), np.zeros((1, 2, 3)), [.5], [2], ["yes"],
                                 None, [float("nan")]], ids=str)
def test_hits_refuses(bad):
    with pytest.raises(BadArgument, match="result must"): hits(bad)


def test_different_images_are_refused():
    v, y = np.ones(6, bool), [0, 1, 2, 3, 4, 5]
    with pytest.raises(BadArgument, match="labels of 2 of 6 differ"):
        difference(outcome(v, y), outcome(v, [1, 0, 2, 3, 4, 5]))
    with pytest.raises(BadArgument, match="got 6 and 5"): difference(outcome(v, y), outcome(v[:5], y[:5]))
    with pytest.raises(BadArgument, match="got 6 and 5"): pairs(v, v[:5])
    with pytest.raises(BadArgument, match="labels of 2"): hits([outcome(v, y), outcome(v, [1, 0, 2, 3, 4, 5])])
    with pytest.raises(BadArgument, match="labels of 2"):
        compare({"a": outcome(v, y), "b": [outcome(v, [1, 0, 2, 3, 4, 5])]})


def test_fingerprints_are_compared_where_there_are_any():
    v = np.ones(6, bool)
    a, b, c = outcome(v), outcome(v), outcome(v)
    for o, mark in ((a, "aa"), (b, "bb")): object.__setattr__(o, "fingerprint", mark)
    with pytest.raises(BadArgument, match="fingerprints are aa and bb"): difference(a, b)
    assert difference(a, a).value == difference(b, b).value == 0
    if not getattr(c, "fingerprint", ""): assert difference(a, c).value == 0


def test_arguments_are_refused():
    v = np.ones(6, bool)
    for kw in (dict(level=1.), dict(level=0), dict(draws=10), dict(which="both")):
        with pytest.raises(BadArgument, match=next(iter(kw))): difference(v, v, **kw)
    with pytest.raises(BadArgument, match="several"): pairs(np.ones((2, 6)), v)


# --- Holm and tables ------------------------------------------------------------

def test_holm_by_hand():
    assert holm([.01, .04, .03, .005]) == pytest.approx([.03, .06, .06, .02])
    assert holm([.001] * 5) == pytest.approx([.005] * 5)
    assert holm([1, 0]).tolist() == [1, 0] and holm([]).tolist() == []
    assert holm(pd.Series([.01, .02], index=[5, 3])) == pytest.approx([.02, .02])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_properties(p, random):
    adjusted, order = holm(p), list(range(len(p)))
    random.shuffle(order)
    bonferroni = np.minimum(1, len(p) * np.array(p))
    assert (adjusted >= p).all() and (adjusted <= bonferroni + 1e-15).all()
    assert holm([p[i] for i in order]).tolist() == [adjusted[i] for i in order]
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    rejected, left = 0, sorted(p)                                                          # step down, as Holm wrote it
    while left and left[0] <= .05 / len(left): left, rejected = left[1:], rejected + 1
    assert abs(int((adjusted <= .05).sum()) - rejected) <= (np.isclose(adjusted, .05)).sum()


@pytest.mark.parametrize("bad", [[-.1], [1.1], [float("nan")], [[.1, .2]]], ids=str)
def test_holm_refuses(bad):
    with pytest.raises(BadArgument, match="p must be"): holm(bad)


def test_compare():
    rng = np.random.default_rng(0)
    made = dict(zip("abcd", tossed(rng, (0, 0, 1.5, 3), 1, 600, 0)))
    every, against = compare(made, draws=200), compare(made, "a", draws=200)
    assert [*zip(every.method, every.against)] == [*combinations("abcd", 2)]
    assert [*zip(against.method, against.against)] == [("b", "a"), ("c", "a"), ("d", "a")]
    assert every.p_holm.tolist() == holm(every.p).tolist() and (every.images == 600).all()
    for r in every.itertuples():
        d = difference(made[r.method], made[r.against], draws=200)
        assert (r.difference, r.difference_lo, r.difference_hi, r.p) == (d.value, d.lo, d.hi, d.p)
        better = r.method if r.difference > 0 else r.against
        assert r.verdict.startswith(f"{better} is better" if r.p_holm <= .05 else "not told apart")
    assert every.verdict[2].startswith("d is better") and every.verdict[0].startswith("not told apart")


def test_compare_which_level_and_mid():
    survived, correct = np.repeat([1, 0], [13, 87]), np.ones(100)
    made = {"x": outcome(survived, correct=correct),
            "y": outcome(np.roll(survived, 0) * (np.arange(100) >= 6), correct=correct)}
    assert compare(made, which="std").difference[0] == 0 and compare(made).difference[0] == pytest.approx(.06)
    assert "x is better, by 6.0 points" == compare(made).verdict[0]                                   # 6 to 0: p = .031
    assert compare(made, level=.99).verdict[0].startswith("not told apart")
    assert compare(made, mid=True).p[0] == pytest.approx(1 / 64) and compare(made).p[0] == pytest.approx(1 / 32)


def test_compare_refuses():
    v = np.ones(6, bool)
    with pytest.raises(UnknownName, match="reference"): compare({"a": v, "b": v}, "c")
    with pytest.raises(BadArgument, match="at least two"): compare({"a": v})
    with pytest.raises(BadArgument, match="at least two"): compare([v, v])


# --- power ------------------------------------------------------------

@pytest.mark.parametrize("mid", [False, True])
@pytest.mark.parametrize("n,d,psi", [(20, .3, .4), (60, .1, .2), (150, .05, .05), (300, .04, .3)])
def test_power_is_the_sum_over_all_outcomes(n, d, psi, mid):
    slow, q = 0., (psi - d) / (2 * psi)
    for m in range(n + 1):
        won = [w for w in range((m + 1) // 2) if mcnemar(m - w, w, mid) <= .05]
        slow += binom.pmf(m, n, psi) * binom.pmf(won, m, q).sum()
    assert paired_power(n, d, psi, mid=mid) == pytest.approx(slow, abs=1e-6)


@pytest.mark.parametrize("d,psi", [(.01, .05), (.02, .1), (.05, .05), (.2, .6), (1., 1.)])
@pytest.mark.parametrize("power", [.5, .8, .95])
def test_images_needed_suffice_and_are_not_many_too_many(d, psi, power):
    n = images_needed(d, psi, power)
    assert paired_power(n, d, psi) >= power and (n == 1 or paired_power(n - 1, d, psi) < power)
    if n > 150: assert paired_power(int(.95 * n), d, psi) < power
    assert images_needed(d, psi, power, mid=True) <= n


@pytest.mark.parametrize("args", [(0, .1), (.2, .1), (-.1, .1), (.1, 1.2)])
def test_power_refuses(args):
    with pytest.raises(BadArgument, match="difference <= disagreement"): images_needed(*args)
    with pytest.raises(BadArgument, match="difference <= disagreement"): paired_power(100, *args)


def test_power_refuses_levels():
    for kw in (dict(level=1), dict(level=0)):
        with pytest.raises(BadArgument, match="level"): images_needed(.01, .1, **kw)
    for power in (0, 1):
        with pytest.raises(BadArgument, match="power"): images_needed(.01, .1, power)


# --- Wilson's columns ------------------------------------------------------------

def test_wilson_columns():
    index = pd.MultiIndex.from_tuples([("m", 1), ("m", 2), ("k", 1)], names=["method", "ipc"])
    hits_ = pd.Series([3., 7.5, np.nan], index=index)
    table = wilson_columns(hits_, pd.Series([10, 20, 10]), "std", level=.9, scale=100)
    assert list(table.columns) == ["std_lo", "std_hi"] and table.index.equals(hits_.index)
    assert table.iloc[:2].values == pytest.approx(100 * np.array([wilson(3, 10, .9), wilson(7.5, 20, .9)]))
    assert table.iloc[2].isna().all()
    assert list(wilson_columns([1], 2).columns) == ["lo", "hi"] and len(wilson_columns([], [])) == 0
    with pytest.raises(BadArgument, match="got k=3, n=2"): wilson_columns([3], 2)
    with pytest.raises(BadArgument, match="one a row"): wilson_columns([1, 2], [9])


# --- BEARD ------------------------------------------------------------

def test_beard_by_hand():
    "The formulas of the benchmark: 1 - (90 - 30) / (90 - 10), (6.5 - 1) / (11 - 1)."
    b = beard(.9, {"fgsm": .5, "pgd": .1}, 1, {"fgsm": 2, "pgd": 11})
    assert (b.rr, b.ae, b.crei) == pytest.approx((.25, .55, .4))
    assert beard(.9, {"fgsm": .5, "pgd": .1}, 1, {"fgsm": 2, "pgd": 11}, alpha=1).crei == pytest.approx(.25)


@settings(max_examples=100, deadline=None)
@given(st.floats(.2, 1), st.lists(st.floats(0, 1), min_size=1, max_size=8), st.floats(1e-3, 1e3))
def test_beard_bounds(clean, shares, scale):
    "0 <= RR <= 1 - 1/k wherever attacks do not help, and AE does not know a unit of time."
    accuracies = {f"a{i}": clean * s for i, s in enumerate(shares)}
    times = {f"a{i}": 2 + i for i in range(len(shares))}
    one = beard(clean, accuracies, 1, times)
    two = beard(clean, accuracies, scale, {k: scale * t for k, t in times.items()})
    assert np.isnan(one.rr) == (min(accuracies.values()) >= clean)
    if clean - min(accuracies.values()) > 1e-6: assert -1e-9 <= one.rr <= 1 - 1 / len(shares) + 1e-9
    assert one.ae == pytest.approx(two.ae)


def test_beard_where_it_says_nothing():
    for clean, left in ((.9, {"a": .9, "b": .9}), (.1, {"a": .1}), (.5, {"a": .6})):
        assert np.isnan(beard(clean, left).rr)
    assert np.isnan(beard(.9, {"a": .1}, 2, {"a": 2}).ae) and np.isnan(beard(.9, {"a": .1}).ae)
    assert beard(.9, {"only": .2}).rr == 0


@pytest.mark.parametrize("args", [
    (90., {"a": 10.}), (.9, {}), (.9, {"a": -.1}), (.9, {"a": float("nan")}), (.9, {"a": .1}, 1.),
    (.9, {"a": .1}, None, {"a": 1}), (.9, {"a": .1}, 1., {"b": 1.}), (.9, {"a": .1}, -1., {"a": 1.}),
    (.9, {"a": .1}, 1., {"a": float("inf")}), (.9, {"a": .1}, 1., {"a": 2.}, 2.), (.9, [.1])], ids=str)
def test_beard_refuses(args):
    with pytest.raises(BadArgument): beard(*args)
