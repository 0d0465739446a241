"""What must hold of every coreset method in the registry, and of what they are made of, against plain restatements:
greedy by trying everything on the full matrix, gradients from autograd or really formed as outer products, apricot's
facility location, scikit-learn's OMP, scipy's NNLS. One small proxy is trained once."""
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from importlib.util import find_spec
from itertools import combinations
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, assume, given, settings, strategies as st
from rdd_lib.published import load_compressed
from rdd_lib.compressor import methods
from rdd_lib.compressed import save
from rdd_lib.core import BadArgument, generator_of
from rdd_lib.files import kept
from rdd_lib.coresets import signals as signals_module
from rdd_lib.coresets.random import Coreset
from rdd_lib.coresets.gradmatch import Glister, GradMatch, nonnegative_omp
from rdd_lib.coresets.herding import herd
from rdd_lib.coresets.scores import CCS, SCORES, Ranked
from rdd_lib.coresets.signals import Gradients, Proxy, SignalCoreset, Signals, read, signals
from rdd_lib.coresets.submodular import Similarities, cosines, facility_location, graph_cut, nearness
from rdd_lib.data import ImageSet, load, sample, shares
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trainer import Trainer

NAMES = [name for name, m in methods().items() if issubclass(m.make, Coreset)]
SIGNAL = [name for name in NAMES if issubclass(methods()[name].make, SignalCoreset)]
DRAWN = ("random", "k_center_greedy", "ccs")       # chance decides more than ties here
FAST = Proxy(Net("mlp", dict(width=32)), Trainer(epochs=3, lr=.05, batch=32))
SIZES = (60, 40, 30, 25, 20, 15, 12, 10, 8, 6)     # of the classes of the lopsided set
every = pytest.mark.parametrize("name", NAMES)
some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 10**6)


# --- what is tested on --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def store(tmp_path_factory): return tmp_path_factory.mktemp("coresets") / "cells"


@pytest.fixture(autouse=True)
def own_store(store, monkeypatch):
    "One for this file, so that the proxy is trained once."
    monkeypatch.setenv("RDD_STORE", str(store))


@pytest.fixture(scope="module")
def mnist5k(): return load("mnist5k")


@pytest.fixture(scope="module")
def lopsided(mnist5k):
    "226 digits: 60 zeros ... 6 nines, in any order."
    rows = torch.cat([own[:n] for own, n in zip(mnist5k.per_class, SIZES)])
    return mnist5k.subset(rows[torch.randperm(len(rows), generator=generator_of(0))])


@pytest.fixture(scope="module")
def seen(lopsided): return signals(lopsided, FAST, device="cpu", keep=False)


@pytest.fixture
def told(monkeypatch):
    "A function: from now on, all methods hear the signals that it is given."
    return lambda s: monkeypatch.setattr(signals_module, "signals", lambda *args, **settings: s)


def coreset(name, **settings):
    make = methods()[name].make
    return make(**({"proxy": FAST} if issubclass(make, SignalCoreset) else {}), **settings)


def run(name, data, ipc=None, total=None, seed=0, **settings):
    return coreset(name, **settings).compress(data, ipc=ipc, total=total, seed=seed, device="cpu")


def pictures(made): return Counter(image.numpy().tobytes() for image in made.x)


def is_part_of(made, data, per_class):
    assert [len(rows) for rows in made.per_class] == list(per_class)
    assert len(made.indices.unique()) == len(made) == sum(per_class)
    assert torch.equal(made.x, data.x[made.indices]) and torch.equal(made.y, data.y[made.indices])
    assert made.weights is None or bool((made.weights >= 0).all()) and bool(made.weights.isfinite().all())


def alike(n, classes=10, per=20, sure=False):
    "Signals that say the same about all images of a class; `sure`: so sure of them that every gradient is zero."
    y = torch.arange(classes).repeat_interleave(per)
    logits = F.one_hot(y, classes).float() * (1000 if sure else 1)
    ones = torch.ones(n, len(y))
    return Signals(torch.ones(len(y), 7), logits, y, ones.bool(), ones, ones)


def drawn(seed, n=9, classes=3, features=4, dtype=torch.float64):
    "Signals of normal draws."
    g = generator_of(seed, "drawn")
    y = torch.randint(classes, (n,), generator=g)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=dtype)
    return Signals(normal(n, features), 2 * normal(n, classes), y)


def outer(s):
    "(N, C (D + 1)) last-layer gradients, really formed, float64."
    e = s.logits.double().softmax(1) - F.one_hot(s.y, s.logits.shape[1])
    h = torch.cat([s.features.double(), torch.ones(len(s), 1)], 1)
    return (e[:, :, None] * h[:, None]).flatten(1)


# --- every method in the registry ---------------------------------------------------------------------------------

def test_the_registry_knows_the_methods():
    assert {"random", "k_center_greedy", "herding", "grand", "el2n", "forgetting", "aum", "moderate", "ccs",
            "submodular", "craig", "gradmatch", "glister"} <= set(NAMES)
    assert set(DRAWN) <= set(NAMES) and all(methods()[name].paper for name in NAMES)


@every
def test_the_budget_is_exact(name, lopsided):
    is_part_of(run(name, lopsided, ipc=3), lopsided, [3] * 10)
    is_part_of(run(name, lopsided, ipc=6), lopsided, [6] * 10)                                  # all nines
    is_part_of(run(name, lopsided, total=37), lopsided, shares([1] * 10, 37))
    is_part_of(run(name, lopsided, total=37, balance="proportional"), lopsided, shares(SIZES, 37))
    is_part_of(run(name, lopsided, ipc=3, balance="proportional"), lopsided, shares(SIZES, 30))
    is_part_of(run(name, lopsided, total=226, balance="proportional"), lopsided, SIZES)
    for budget in (dict(total=37), dict(ipc=3), dict(total=1), dict(total=226)):
        made = run(name, lopsided, balance=None, **budget)
        is_part_of(made, lopsided, [int((made.y == c).sum()) for c in range(10)])
        assert len(made) == budget.get("total", 30)


@every
def test_the_same_seed_gives_the_same_bytes_and_they_can_be_read_again(name, lopsided, tmp_path):
    first, again = (save(run(name, lopsided, total=37, seed=5), tmp_path / n) for n in "ab")
    assert first.read_bytes() == again.read_bytes()
    made, back = run(name, lopsided, total=37, seed=5), load_compressed(first)
    assert torch.equal(made.indices, back.indices) and torch.equal(made.x, back.x)
    assert made.provenance == back.provenance
    assert (made.weights is None) == (back.weights is None)
    assert made.weights is None or torch.equal(made.weights, back.weights)


@every
def test_the_global_generators_are_left_alone(name, lopsided):
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    made = coreset(name)
    if name in SIGNAL:                                                    # a training of its own
        made = replace(made, proxy=replace(FAST, seed=3, trainer=replace(FAST.trainer, epochs=2)))
    made.compress(lopsided, ipc=2, device="cpu")
    assert torch.equal(before[0], torch.get_rng_state()) and random.getstate() == before[2]
    assert all(np.array_equal(a, b) for a, b in zip(before[1], np.random.get_state()))


@every
@pytest.mark.parametrize("balance", ["equal", None])
def test_the_order_of_the_data_does_not_matter(name, balance, lopsided, seen, told):
    """With the signals in the new order, too. Equal scores may change places: then the scores of what was taken are the
    same. Sums in another order differ in the last digits, so a greedy method may see two nearly equal gains the other
    way round: one image in twenty may differ."""
    told(seen)
    first = run(name, lopsided, total=60, balance=balance)
    for seed in range(3):
        p = torch.randperm(len(lopsided), generator=generator_of(seed, "rows"))
        told(seen.take(p))
        other = run(name, lopsided.subset(p), total=60, balance=balance, seed=seed)
        if name == "random": assert len(other) == 60
        elif name == "k_center_greedy":
            assert max(first.radius, other.radius) <= 2 * min(first.radius, other.radius)
            assert other.lower_bound <= first.radius
        elif name == "ccs": assert strata(seen, first.indices, balance) == strata(seen, p[other.indices], balance)
        elif isinstance(coreset(name), Ranked):
            score = coreset(name).rank(seen)
            assert torch.equal(score[first.indices].sort().values, score[p[other.indices]].sort().values)
        else: assert (pictures(first) & pictures(other)).total() >= 57, name


def strata(s, taken, balance, ccs=CCS()):
    "How many were taken of each stratum (of each class)."
    score, counts = SCORES[ccs.by]().rank(s).double(), Counter()
    for c in (None,) if balance is None else range(10):
        rows = torch.arange(len(s)) if c is None else torch.nonzero(s.y == c).flatten()
        low = score[rows].sort().values[:len(rows) - int(ccs.drop * len(rows))]
        parts = ((score - low[0]) / (low[-1] - low[0]) * ccs.strata).long().clamp_max(ccs.strata - 1)
        counts.update((c, int(parts[i])) for i in taken if c is None or s.y[i] == c)
    return counts


@every
def test_seeds_decide_between_equals_and_only_there(name, lopsided, seen, told):
    """When all images of a class are alike, chance decides; where signals differ, a method that does not draw takes the
    same images for every seed."""
    data = ImageSet(torch.full((200, 1, 28, 28), 7, dtype=torch.uint8), alike(3).y, tuple("0123456789"))
    for s in (alike(3), alike(3, sure=True)):
        told(s)
        for balance in ("equal", None):
            made = [run(name, data, total=23, seed=seed, balance=balance) for seed in range(3)]
            for one in made:
                counts = torch.bincount(one.y, minlength=10).tolist() if balance is None else shares([1] * 10, 23)
                is_part_of(one, data, counts)
            assert len({tuple(one.indices.sort().values.tolist()) for one in made}) == 3, "the seed decides nothing"
    told(seen)
    if name not in (*DRAWN, "forgetting"):
        first, other = (run(name, lopsided, total=60, seed=seed) for seed in (0, 1))
        assert (pictures(first) & pictures(other)).total() >= 57


@every
def test_a_set_of_one_image_many_times(name):
    "With a proxy that is trained on it."
    data = ImageSet(torch.full((60, 1, 28, 28), 99, dtype=torch.uint8), torch.arange(60) % 3, tuple("abc"), name="grey")
    made = run(name, data, total=10)
    is_part_of(made, data, [4, 3, 3])
    assert run(name, data, total=10, seed=1).indices.tolist() != made.indices.tolist()


MISTAKES = ((dict(ipc=7), "ipc=7 .* class 9 .* has 6"), (dict(ipc=0), "ipc .* 0"), (dict(ipc=-3), "ipc .* -3"),
            (dict(ipc=2.5), "ipc .* 2.5"), (dict(total="9"), "total .* '9'"), (dict(total=9), "total .* 10, got 9"),
            (dict(total=227), "total=227 .* class"), (dict(total=227, balance=None), "total=227 .* 226"),
            (dict(total=227, balance="proportional"), "total=227 .* 226"),
            (dict(ipc=23, balance=None), "ipc=23 .* 230 .* 226"), (dict(ipc=1, balance="even"), "balance .* 'even'"),
            (dict(), "either ipc .* or total"), (dict(ipc=1, total=10), "ipc=1, total=10"),
            (dict(ipc=1, seed=-1), "seed .* -1"), (dict(ipc=1, seed="x"), "seed .* 'x'"))


@every
def test_mistakes_are_named(name, lopsided, mnist5k):
    for wrong, message in MISTAKES:
        with pytest.raises(BadArgument, match=message): run(name, lopsided, **wrong)
    with pytest.raises(BadArgument, match="balance .* 'even'"): coreset(name, balance="even")
    zeros = mnist5k.subset(mnist5k.per_class[0][:20])
    with pytest.raises(BadArgument, match=r"class 1 \(1\) has no images"): run(name, zeros, ipc=1)
    alone = ImageSet(zeros.x, zeros.y, ("0",), "alone")
    if name not in SIGNAL: assert len(run(name, alone, ipc=2)) == 2
    else:
        with pytest.raises(BadArgument, match="two classes, alone/train has 1"): run(name, alone, ipc=2)
        with pytest.raises(BadArgument, match="two classes, mnist5k/train has 1"):
            run(name, zeros, total=2, balance=None)
        wild = replace(coreset(name), proxy=replace(FAST, trainer=replace(FAST.trainer, lr=1e30)))
        with pytest.raises(BadArgument, match=r"diverged.* lr=1e\+30"): wild.compress(lopsided, ipc=1, device="cpu")


def test_signals_that_are_no_numbers_are_refused(seen):
    for name in ("features", "logits"):
        for wrong in (float("nan"), float("inf")):
            t = getattr(seen, name).clone()
            t[3, 2] = wrong
            with pytest.raises(BadArgument, match=f"{name} .*finite"): replace(seen, **{name: t})
    with pytest.raises(BadArgument, match="logits .*225"): replace(seen, logits=seen.logits[1:])
    with pytest.raises(BadArgument, match=r"margin .*226.*225"): replace(seen, margin=seen.margin[:, 1:])


def test_the_proxy_is_trained_once(lopsided, monkeypatch):
    run("el2n", lopsided, ipc=1)
    monkeypatch.setattr(Trainer, "__call__", lambda *args, **settings: pytest.fail("trained again"))
    for name in SIGNAL: run(name, lopsided, ipc=1)
    other = replace(lopsided, y=lopsided.y.roll(1))
    with pytest.raises(pytest.fail.Exception): run("el2n", other, ipc=1)   # other labels: other signals


def test_an_offset_changes_nothing_where_only_distances_count(lopsided, seen, told):
    features = (seen.features * 64).round() / 64   # so that the sum below is exact
    for name in ("herding", "herding_deepcore", "moderate"):
        told(replace(seen, features=features))
        first = run(name, lopsided, total=60)
        told(replace(seen, features=features + 1000))
        assert run(name, lopsided, total=60).indices.tolist() == first.indices.tolist(), name
    dark = replace(lopsided, x=lopsided.x // 2)
    first, other = (run("k_center_greedy", data, total=60) for data in (dark, replace(dark, x=dark.x + 100)))
    assert first.indices.tolist() == other.indices.tolist()


def test_weights(lopsided, told):
    for budget in (dict(ipc=3), dict(ipc=6), dict(total=37), dict(total=37, balance="proportional"),
                   dict(total=37, balance=None), dict(total=226, balance=None)):
        craig, matched = run("craig", lopsided, **budget), run("gradmatch", lopsided, **budget)
        assert craig.weights.sum() == 226 and craig.weights.min() >= 1
        assert torch.equal(craig.weights, craig.weights.round())
        if budget.get("balance", "equal") is not None:                    # a cluster lies in one class
            assert all(craig.weights[rows].sum() == n for rows, n in zip(craig.per_class, SIZES))
        assert matched.weights.mean().item() == pytest.approx(1, abs=1e-5) and (matched.weights > 0).all()
        assert len(matched) == len(craig) == budget.get("total", 10 * budget.get("ipc", 0))
    for sure in (False, True):                                                              # equals
        told(alike(3, sure=sure))
        data = ImageSet(torch.zeros(200, 1, 28, 28, dtype=torch.uint8), alike(3).y, tuple("0123456789"))
        made = run("craig", data, ipc=3)
        assert made.weights.min() >= 1 and all(made.weights[rows].sum() == 20 for rows in made.per_class)


def test_scores(seen):
    "Image by image."
    n, T = len(seen), seen.epochs
    g, right, margin = outer(seen).numpy(), seen.correct.tolist(), seen.margin.numpy()
    e = g.reshape(n, 10, -1)[:, :, -1]   # the bias has the error for its gradient
    h = seen.features.double().numpy()
    flips = [sum(right[t][i] and not right[t + 1][i] for t in range(T - 1)) for i in range(n)]
    never = [not any(right[t][i] for t in range(T)) for i in range(n)]
    far = np.array([np.linalg.norm(h[i] - h[seen.y == seen.y[i]].mean(0)) for i in range(n)])
    own = [np.sort(far[seen.y == c]) for c in seen.y]
    middle = np.array([distances[(len(distances) - 1) // 2] for distances in own])   # of an even number, the lower one
    assert sum(never) and any(flips)
    for name, chosen, expected in (("grand", {}, np.linalg.norm(g, axis=1)), ("el2n", {}, np.linalg.norm(e, axis=1)),
                                   ("el2n", dict(epoch=2), seen.error[1]), ("aum", {}, -margin.mean(0)),
                                   ("forgetting", {}, [T if no else f for no, f in zip(never, flips)]),
                                   ("forgetting", dict(unlearned="zero"), flips), ("moderate", {}, -abs(far - middle))):
        rank = coreset(name, **chosen).rank(seen).double().numpy()
        expected = np.asarray(expected, float)
        assert rank == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, chosen)        # p - 1 in single precision
        if name == "moderate": continue
        assert (coreset(name, keep="easy", **chosen).rank(seen).double().numpy() == -rank).all()


# --- the pieces: facility location --------------------------------------------------------------------------------

def by_trying(k, n, value):
    "Greedy: (picks, their gains), each the first that raises value(list) most."
    taken, gains = [], []
    for _ in range(k):
        tried = [value([*taken, j]) if j not in taken else -np.inf for j in range(n)]
        gains.append(max(tried) - (value(taken) if taken else 0))
        taken.append(int(np.argmax(tried)))
    return taken, gains


def covered(s): return lambda taken: s[taken].max(0).sum()


def kept_and_not(n, rows_of, floor=0.):
    return Similarities(n, rows_of, floor=floor), Similarities(n, rows_of, block=3, stored=0, floor=floor)


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 4), st.sampled_from((1, 3, 50)), st.data())
def test_facility_location_takes_the_first_of_the_best(seed, n, batch, largest, data):
    "Whole numbers: every sum is exact, and ties are common."
    s = torch.randint(largest + 1, (n, n), generator=generator_of(seed)).numpy()
    s, k = np.maximum(s, s.T), data.draw(st.integers(1, n), "k")
    t = torch.from_numpy(s).float()
    for similar in kept_and_not(n, lambda j: t[j]):
        taken, gains = facility_location(similar, k, batch)
        assert (taken.tolist(), gains.tolist()) == by_trying(k, n, covered(s))


def is_greedy(taken, s):
    """Each one of them raises the objective as much as any could, up to rounding: two images that are nearest to each
    other often gain the same."""
    best = np.zeros(len(s))
    for j in taken:
        gain = np.maximum(s - best, 0).sum(1)
        assert gain[j] >= gain.max() - 1e-5 * s.sum(1).max(), (j, gain[j], gain.max())
        best = np.maximum(best, s[j])


@some
@given(seeds, st.sampled_from((torch.float32, torch.float64)))
def test_facility_location_on_gradients(seed, dtype):
    "CRAIG's and SubMod's similarities; greedy is within 1 - 1/e of the best set."
    s = drawn(seed, dtype=dtype)
    g = outer(s)
    unit, tol = F.normalize(g, dim=1), 1e-7 if dtype == torch.float64 else 1e-6
    for similar, full in ((cosines(s.gradients), .5 + .5 * unit @ unit.T),
                          (nearness(s.gradients), 2 * g.norm(dim=1).max() - torch.cdist(g, g))):
        full = full.numpy()
        off = tol ** .5 * full.max()   # of a distance near 0, from squares
        assert (similar[torch.arange(9)] - similar.floor).numpy() == pytest.approx(full, abs=off)
        taken, gains = facility_location(similar, 4)
        best = max(covered(full)(list(c)) for c in combinations(range(9), 4))
        assert covered(full)(taken.tolist()) == pytest.approx(gains.sum().item(), abs=9 * off)
        assert gains.sum() >= (1 - 1 / np.e) * best - 9 * off
        assert gains.tolist() == pytest.approx(by_trying(4, 9, covered(full))[1], abs=9 * off)


APRICOT = """
import sys, numpy as np, apricot
for k, name in zip((50, 30), sys.argv[1:]):
    for optimizer in ("lazy", "naive"):
        chosen = apricot.FacilityLocationSelection(k, metric="precomputed", optimizer=optimizer).fit(np.load(name))
        print(*chosen.ranking)
"""


@pytest.mark.skipif(find_spec("apricot") is None, reason="apricot-select is not installed")
def test_facility_location_against_apricot(mnist5k, tmp_path):
    "The same objective to 1e-5, and the same picks up to the first tie; rows kept or computed."
    features = signals(sample(mnist5k, 400), FAST, device="cpu", keep=False).gradients
    chance = Gradients(*(torch.randn(300, d, generator=generator_of(d)) for d in (5, 8)))
    full = [1 + cosines(gradients)[torch.arange(len(gradients))].double().numpy() for gradients in (features, chance)]
    full = [(s + s.T) / 2 for s in full]
    for name, s in zip("ab", full): np.save(tmp_path / f"{name}.npy", s)
    # apart: the threads of its parallel loops would slow torch down from here on
    done = subprocess.run([sys.executable, "-c", APRICOT, "a.npy", "b.npy"], cwd=tmp_path, check=True,
                          capture_output=True, text=True, env=os.environ | {"NUMBA_NUM_THREADS": "1"})
    theirs = [list(map(int, line.split())) for line in done.stdout.splitlines()]
    for gradients, k, s, rankings in ((features, 50, full[0], theirs[:2]), (chance, 30, full[1], theirs[2:])):
        for similar in kept_and_not(len(gradients), cosines(gradients).rows_of, floor=-1.):
            taken = facility_location(similar, k)[0].tolist()
            is_greedy(taken, s)
            for other in rankings:
                is_greedy(other, s)
                assert covered(s)(taken) == pytest.approx(covered(s)(other), rel=1e-5)
                first = next((i for i in range(k) if taken[i] != other[i]), None)
                if first is None: continue
                tied = [covered(s)([*taken[:first], j]) for j in (taken[first], other[first])]
                assert first > k // 2 and tied[0] == pytest.approx(tied[1], rel=1e-9), "no tie"


@every
def test_large_groups_get_the_same(name, lopsided, seen, told, monkeypatch):
    "Above `STORED` images nothing is kept, and nothing changes."
    told(seen)
    first = run(name, lopsided, total=37)
    monkeypatch.setattr(Similarities.__init__, "__defaults__", (16, 0, 0.))
    assert (pictures(first) & pictures(run(name, lopsided, total=37))).total() >= 36


# --- graph cut, herding, GLISTER ----------------------------------------------------------------------------------

@some
@given(seeds, st.sampled_from((.5, 1., 2., 10.)))
def test_graph_cut(seed, lam):
    s = drawn(seed)
    unit = F.normalize(outer(s), dim=1)
    full = (.5 + .5 * unit @ unit.T).numpy()
    expected, _ = by_trying(5, 9, lambda taken: lam * full[taken].sum() - full[np.ix_(taken, taken)].sum())
    assert graph_cut(s.gradients.unit(), 5, lam).tolist() == expected


@some
@given(seeds, st.booleans())
def test_herding(seed, farthest):
    x = drawn(seed).features
    off = lambda taken: ((len(taken) * x.mean(0) - x[taken].sum(0)) ** 2).sum().item()
    expected, _ = by_trying(6, 9, lambda taken: off(taken) * (1 if farthest else -1))
    assert herd(x, 6, farthest).tolist() == expected
    assert herd(x.float() + 300, 6, farthest).tolist() == herd((x.float() + 300).double(), 6, farthest).tolist()


@some
@given(seeds, st.sampled_from((.01, .1, 1.)), st.booleans())
def test_glister(seed, eta, refresh):
    """The last layer is really changed, by a step along the gradient of what was taken; the next gain is the gradient's
    part along that of everybody's loss."""
    s = drawn(seed, n=12)
    g, h = outer(s), torch.cat([s.features, torch.ones(12, 1, dtype=torch.float64)], 1)
    change, taken = torch.zeros(3, 5, dtype=torch.float64), []
    for _ in range(5):
        theta = change.clone().requires_grad_()
        loss = F.cross_entropy(s.logits + h @ theta.T, s.y, reduction="sum")
        gain = g @ torch.autograd.grad(loss, theta)[0].flatten()
        gain[taken] = -torch.inf
        taken.append(int(gain.argmax()))
        if refresh: change -= eta * g[taken[-1]].view(3, 5)
    assert Glister(eta=eta, refresh=refresh).choose(s, 5, None).tolist() == taken


# --- matching pursuit ---------------------------------------------------------------------------------------------

def plain(rows): return Gradients(rows.new_ones(len(rows), 1), rows, bias=False)        # one class: g is h


def residual(rows, taken, w, target): return (target - w @ rows[taken]).norm().item()


@some
@given(seeds, st.integers(1, 8))
def test_omp_against_scikit_learn(seed, k):
    "On problems whose coefficients are positive in every step, the sign makes no difference."
    from sklearn.linear_model import orthogonal_mp
    g = generator_of(seed, "omp")
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    rows = F.normalize(torch.eye(40, 60, dtype=torch.float64) + .08 * normal(40, 60), dim=1)
    target = (1 + torch.rand(8, generator=g, dtype=torch.float64)) @ rows[:8] + .01 * normal(60)
    path = orthogonal_mp(rows.T.numpy(), target.numpy(), n_nonzero_coefs=k, return_path=True).reshape(40, -1)
    assume((path >= 0).all())
    taken, w = nonnegative_omp(plain(rows), target[None], k)
    found = np.zeros(40)
    found[taken] = w
    assert found == pytest.approx(path[:, -1], abs=1e-8)
    theirs = residual(rows, range(40), torch.from_numpy(path[:, -1]), target)
    assert residual(rows, taken, w, target) == pytest.approx(theirs, abs=1e-9)


@some
@example(9922, .3, torch.float64)   # where a stop at 1e-6 of the first gain left something to gain
@given(seeds, st.sampled_from((0., .3, 5.)), st.sampled_from((torch.float32, torch.float64)))
def test_omp_against_nnls(seed, lam, dtype):
    "On its own support, and, where it stops by itself, among all rows; the conditions of Karush, Kuhn and Tucker."
    from scipy.optimize import nnls
    s = drawn(seed, n=30, dtype=dtype)
    g, target = outer(s), s.gradients.total()
    b, tol = target.flatten().double(), 1e-4 if dtype == torch.float32 else 1e-8
    scale = g.norm(dim=1).max().item() * b.norm().item()

    def best(rows):
        a = np.vstack([g[rows].T.numpy(), lam ** .5 * np.eye(len(rows))])
        return nnls(a, np.r_[b.numpy(), np.zeros(len(rows))])[1]
    for k in (1, 3, 8, 30):
        taken, w = nonnegative_omp(s.gradients, target, k, lam)
        assert len(taken) == len(taken.unique()) <= k and (w > 0).all() and w.dtype == torch.float64
        left = b - w @ g[taken]
        value = (left.square().sum() + lam * w.square().sum()).sqrt().item()
        assert value == pytest.approx(best(taken), abs=tol * b.norm().item())
        slope = g @ left
        assert (slope[taken] - lam * w).abs().max() <= tol * scale   # on the support: nothing to gain
        if len(taken) < k or k == 30:
            assert value == pytest.approx(best(torch.arange(30)), abs=10 * tol * b.norm().item())
            slope[taken] = -torch.inf
            assert slope.max() <= 10 * tol * scale   # off it: nothing that a weight > 0 could gain


def test_gradmatch_fills_up_what_the_pursuit_leaves_empty():
    s = drawn(0, n=30)
    few, w = nonnegative_omp(s.gradients, s.gradients.total(), 25, 0.)
    assert len(few) < 25
    taken, weights = GradMatch(lam=0.).choose(s, 25, None)
    assert torch.equal(taken[:len(few)], few) and len(taken.unique()) == 25
    assert weights[:len(few)] / weights[0] == pytest.approx((w / w[0]).numpy(), rel=1e-9)
    assert (weights[len(few):] == weights.min()).all()


# --- gradients without forming them -------------------------------------------------------------------------------

@pytest.mark.parametrize("net", [Net("convnet", dict(width=8)), Net("resnet18")], ids=["convnet", "resnet18"])
@pytest.mark.parametrize("attack", [None, PGD(Linf(.1), 2), PGD(L2(1.), 1)], ids=["clean", "linf", "l2"])
def test_factors_against_autograd(net, attack, mnist5k):
    data = sample(mnist5k, 10)
    model = net(data, 0)
    s = Signals(*read(model, data, attack, seed=4), data.y)
    x = data.images() if attack is None else attack(model, data.images(), data.y, generator_of(4, "attack"))
    layer = model.model.classifier
    loss = F.cross_entropy(model(x), data.y, reduction="none")
    own = lambda one: torch.autograd.grad(one, (layer.weight, layer.bias), retain_graph=True)
    g = torch.stack([torch.cat([weight, bias[:, None]], 1) for weight, bias in map(own, loss)])
    mine, flat, scale = s.gradients, g.flatten(1), g.flatten(1).norm(dim=1).max().item()
    close = lambda a, b, power=1: torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * scale ** power)
    close(mine.dot(mine), flat @ flat.T, 2)
    close(mine.norms, flat.norm(dim=1))
    close(mine.total(), g.sum(0))
    close(mine.total(torch.arange(10.)), (g * torch.arange(10.)[:, None, None]).sum(0))
    close(mine.along(g[3]), flat @ flat[3], 2)
    close(mine.take([4, 2]).dot(mine.take([7])), flat[[4, 2]] @ flat[[7]].T, 2)
    close(mine.unit().dot(mine), F.normalize(flat, dim=1) @ flat.T)
    if attack is not None: assert not torch.allclose(s.logits, read(model, data)[1], atol=1e-4)


# --- the command line ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def rdd():
    from typer.testing import CliRunner
    from rdd_lib.cli import app
    run = dict(env={"TQDM_DISABLE": "1"}, catch_exceptions=False)
    return lambda *words: CliRunner().invoke(app, [str(w) for w in words], **run)


def test_the_list_says_where_each_method_comes_from(rdd):
    done = rdd("list", "methods")
    lines = {line.split()[0]: line for line in done.stdout.splitlines()[1:] if line.strip()}
    assert done.exit_code == 0
    for name in NAMES:
        method = methods()[name]
        assert method.paper in lines[name] and (not method.alias or f"({method.alias})" in lines[name])


def test_each_method_runs_from_the_command_line(rdd, tmp_path, monkeypatch, mnist5k):
    monkeypatch.setattr("rdd_lib.data.load", lambda *how: mnist5k)                           # read once for all
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "cells"))
    for name in NAMES:
        small = ["--set", "proxy.net.name=mlp", "--set", "proxy.trainer.epochs=2"] if name in SIGNAL else []
        called = methods()[name].alias or name
        done = rdd("compress", called, "mnist5k", "--ipc", 2, *small, "-o", tmp_path / name, "--device", "cpu")
        assert done.exit_code == 0 and "20 images of 1x28x28, 10 classes, 2, 2" in done.stdout, (name, done.output)
        is_part_of(load_compressed(tmp_path / name), mnist5k, [2] * 10)
    assert len(list(kept("signals").iterdir())) == 1   # one training for all of them
