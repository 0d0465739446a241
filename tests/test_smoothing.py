"""Smoothing: the interval of Clopper and Pearson, radii whose truth is known, streams that do not depend on batches,
and the vote's own sandwich."""
from math import inf
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.stats import binomtest, norm
from torch import nn
from rdd_lib.core import BadArgument, BrokenFile, RddError, describe, digest, generator_of
from rdd_lib.models import seeded
from rdd_lib.data import load, sample
from rdd_lib.files import read_tensors
from rdd_lib.intervals import clopper_pearson
from rdd_lib.models import Net, build
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.certificates.smoothing import Smoothed, SoftVote
from rdd_lib.evaluation.sandwich import Sandwich, sandwich_smoothed
from rdd_lib.training.certified import Noisy
from rdd_lib.training.objectives import Standard
from rdd_lib.training.trainer import Trainer


def line(normal, offset):
    "Two classes either side of normal . x = offset."
    net = nn.Sequential(nn.Flatten(), nn.Linear(len(normal), 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([0 * normal, normal]))
        net[1].bias.copy_(torch.tensor([0., -offset]))
    return net


@given(n=st.integers(1, 3000), share=st.floats(0, 1), alpha=st.floats(1e-6, .5))
@settings(max_examples=100, deadline=None)
def test_clopper_pearson_is_scipy_s(n, share, alpha):
    k = round(share * n)
    theirs = binomtest(k, n, alternative="greater").proportion_ci(1 - alpha, method="exact").low
    assert clopper_pearson(k, n, alpha) == pytest.approx(theirs, abs=1e-9)
    assert clopper_pearson(k, n, alpha) <= k / n + 1e-12


def test_clopper_pearson_refuses():
    for bad in ((-1, 5, .1), (6, 5, .1), (1, 0, .1), (1, 5, 0.), (1, 5, 1.)):
        with pytest.raises(BadArgument): clopper_pearson(*bad)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10 ** 6), sigma=st.sampled_from([.1, .25, 1.]))
def test_radii_of_a_linear_classifier(seed, sigma):
    """The vote is the classifier itself, its radius the distance to the line, and what is certified is the analytic
    radius of the bound."""
    g = generator_of(seed)
    normal, x = torch.randn(9, generator=g), torch.rand(6, 1, 3, 3, generator=g)
    net = line(normal, float(normal.sum()) / 2)
    signed = (x.flatten(1) @ normal - normal.sum() / 2).double() / normal.norm().double()
    r = Smoothed(net, sigma).certify(x, n0=1000, n=10_000, alpha=1e-7, seed=seed, device="cpu")
    sure = r.predicted >= 0
    assert (r.radius <= signed.abs() + 1e-6).all()                      # wrong with probability .0000001 an image
    assert torch.equal(r.predicted[sure], net(x).argmax(1)[sure])
    far = signed.abs() > .15 * sigma
    assert sure[far].all()        # a share of 56 %: 8 standard deviations of the vote above a half, 4 of the first look
    true = torch.from_numpy(norm.cdf(signed.abs().numpy() / sigma))       # share of the vote, exactly
    expected = sigma * torch.from_numpy(norm.ppf(clopper_pearson((true * 10_000).round().numpy(), 10_000, 1e-7)))
    assert ((r.radius - expected).abs()[far] < .35 * sigma).all()


def test_streams_do_not_depend_on_neighbours():
    net, x = line(torch.ones(4), 2.), torch.rand(5, 1, 2, 2, generator=generator_of(0))
    s = Smoothed(net, .3, batch=100)
    whole = s.certify(x, 20, 300, device="cpu")
    parts = [s.certify(x[:2], 20, 300, device="cpu"), s.certify(x[2:], 20, 300, first=2, device="cpu")]
    assert torch.equal(whole.share, torch.cat([p.share for p in parts]))
    assert torch.equal(whole.predicted, torch.cat([p.predicted for p in parts]))
    assert torch.equal(whole.share, s.certify(x, 20, 300, device="cpu").share)
    assert not torch.equal(whole.share, s.certify(x, 20, 300, seed=1, device="cpu").share)
    state = torch.get_rng_state()
    s.certify(x, 20, 300, device="cpu")
    assert torch.equal(state, torch.get_rng_state())


def votes_in(path): return read_tensors(path, "votes")[0]["votes"]


def test_a_killed_run_goes_on(tmp_path):
    net, x = line(torch.ones(4), 2.), torch.rand(6, 1, 2, 2, generator=generator_of(0))
    path, s, asked = tmp_path / "votes.safetensors", Smoothed(net, .3), []

    class Dies(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            asked.append(len(x))
            if len(asked) == 7: raise KeyboardInterrupt
            return self.net(x)
    dying = Smoothed(Dies(), .3)
    with pytest.raises(KeyboardInterrupt): dying.certify(x, 20, 200, device="cpu", checkpoint=path, every=0.)
    assert path.exists() and len(votes_in(path)) == 3
    again = dying.certify(x, 20, 200, device="cpu", checkpoint=path, every=0.)
    assert torch.equal(again.share, s.certify(x, 20, 200, device="cpu").share)
    assert len(asked) == 7 + 6                                           # the three that were done were not asked again
    bold = dying.certify(x, 20, 200, .1, device="cpu", checkpoint=path)
    assert torch.equal(bold.predicted, s.certify(x, 20, 200, .1, device="cpu").predicted)
    assert len(asked) == 7 + 6                                           # all votes stay in the file
    asked.clear()
    path.unlink()
    with pytest.raises(KeyboardInterrupt): dying.certify(x, 20, 200, device="cpu", checkpoint=path)
    assert len(votes_in(path)) == 1                              # at once, and then once a minute
    for bad in (0., 1., 5):
        for ask in (dying.certify, dying.predict):
            with pytest.raises(BadArgument, match="alpha must be in 0 ... 1"):
                ask(x, n=200, alpha=bad, device="cpu", checkpoint=path)
    assert path.exists() and len(asked) == 7                     # a mistake is seen before anything is asked or removed
    assert torch.equal(dying.certify(x, 20, 200, device="cpu", checkpoint=path).share, again.share)
    asked.clear()
    path.unlink()
    with pytest.raises(KeyboardInterrupt): dying.certify(x, 20, 200, device="cpu", checkpoint=path)
    for other in (x.flip(0), x.flip(3), x.transpose(2, 3)):              # the same sums, other images
        with pytest.raises(BadArgument, match="belongs to another run"):
            dying.certify(other, 20, 200, device="cpu", checkpoint=path)
    weight = net[1].weight.data.clone()
    net[1].weight.data = weight.flip(0)
    with pytest.raises(BadArgument, match="belongs to another run"):
        dying.certify(x, 20, 200, device="cpu", checkpoint=path)
    net[1].weight.data = weight
    with pytest.raises(BadArgument, match="belongs to another run"):
        dying.certify(x, 20, 201, device="cpu", checkpoint=path)
    path.write_bytes(b"PK")
    with pytest.raises(BrokenFile, match="is not the checkpoint"):
        dying.certify(x, 20, 200, device="cpu", checkpoint=path)


@pytest.fixture(scope="module")
def noisy():
    trainer = Trainer(steps=400, lr=.05, objective=Noisy(.4))
    return trainer(Net("mlp", dict(width=64)), load("mnist5k"), device="cpu"), sample(load("mnist5k", "test"), 30)


@pytest.mark.parametrize("threat", [L2(0.), L2(.2), L2(.8), Linf(.01), Linf(.1)], ids=str)
def test_certified_is_never_broken(noisy, threat):
    model, test = noisy
    s = sandwich_smoothed(Smoothed(model, .4), test, threat, n=400, device="cpu")
    assert not (s.certified & ~s.survived).any() and not (s.certified & ~s.correct).any() and s.floor <= s.ceiling
    if threat.eps == 0: assert torch.equal(s.certified, s.correct) and torch.equal(s.survived, s.correct)
    if threat == L2(.2): assert s.floor > .5
    if threat == Linf(.1): assert s.floor == 0 and s.ceiling < s.correct.double().mean()


def test_linf_is_l2_divided_by_the_root_of_the_pixels(noisy):
    model, test = noisy
    r = Smoothed(model, .4).certify(test.images()[:10], n=400, device="cpu")
    for eps in (.004, .01, .02):
        torch.testing.assert_close(r.spare(Linf(eps)), r.radius - 28 * eps, atol=1e-5, rtol=0)
        assert torch.equal(r.certified(test.y[:10], Linf(eps)), r.certified(test.y[:10], L2(28 * eps)))


def test_predict_abstains_where_it_cannot_tell():
    net = line(torch.ones(4), 2.)
    x = torch.tensor([.5, .9, .1])[:, None, None, None].expand(3, 1, 2, 2)
    assert Smoothed(net, .3).predict(x, 500, device="cpu").tolist() == [-1, 1, 0]
    r = Smoothed(net, .3).certify(x, 100, 500, device="cpu")
    assert r.predicted.tolist() == [-1, 1, 0] and r.radius[0] == 0 and (r.radius[1:] > 0).all()


def test_more_contradictions_than_chance_are_an_error():
    y, certified = torch.zeros(100, dtype=torch.long), torch.ones(100, dtype=torch.bool)
    def made(broken, chance):
        survived = torch.arange(100) >= broken
        return Sandwich(L2(.1), y, y, certified, survived, y.double(), "smoothing", "pgd", chance)
    made(1, .002)
    with pytest.raises(RddError, match="20 images are certified and broken"): made(20, .002)
    with pytest.raises(RddError, match="1 images are certified and broken"): made(1, 0.)


def test_the_stand_in_is_a_mean_of_probabilities(noisy):
    model, test = noisy
    x = test.images()[:3]
    soft = SoftVote(Smoothed(model, .4), (1, 28, 28), draws=5)
    by_hand = torch.stack([model(x + .4 * e).softmax(1) for e in soft.noise]).mean(0)
    torch.testing.assert_close(soft(x).exp(), by_hand)
    x_adv = PGD(L2(1.))(soft, x, test.y[:3])
    assert nn.functional.cross_entropy(soft(x_adv), test.y[:3]) > nn.functional.cross_entropy(soft(x), test.y[:3])


def test_smoothing_leaves_no_trace():
    with seeded(0): net = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3))
    net.train()[2].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    Smoothed(net, .3).certify(torch.rand(3, 1, 2, 2, generator=generator_of(0)), 10, 50, device="cpu")
    assert [m.training for m in net.modules()] == [True, True, True, False, True, True]
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_noisy_draws_from_its_generator():
    data = load("mnist5k").subset(range(0, 4000, 400))
    net, x, y = build("mlp", data), data.images(), data.y
    a, b = (Noisy(.3)(net, x, y, None, generator_of(s)) for s in (0, 1))
    assert a == Noisy(.3)(net, x, y, None, generator_of(0)) and a != b and Noisy(0.)(net, x, y) == Standard()(net, x, y)
    assert describe(Noisy(.3))["sigma"] == .3 and digest(Noisy(.3)) != digest(Noisy(.4))
    with pytest.raises(BadArgument, match="sigma must be >= 0"): Noisy(-1.)


def test_refusals(noisy):
    model, test = noisy
    with pytest.raises(BadArgument, match="sigma must be > 0"): Smoothed(model, 0.)
    with pytest.raises(BadArgument, match="batch must be a whole number"): Smoothed(model, .1, batch=0)
    s = Smoothed(model, .1)
    with pytest.raises(BadArgument, match="n must be a whole number"): s.certify(test.images(), n=0)
    with pytest.raises(BadArgument, match=r"lie in \[0, 1\]"): s.certify(test.images() + 1)
    with pytest.raises(BadArgument, match="alpha must be in 0 ... 1"):
        s.certify(test.images()[:1], 10, 10, alpha=2., device="cpu")
    with pytest.raises(BadArgument, match="must be a Smoothed"): sandwich_smoothed(model, test, L2(.1))
    with pytest.raises(BadArgument, match="need one threat"): sandwich_smoothed(s, test, L2(.1), PGD(L2(.2)))
    with pytest.raises(BadArgument, match="an L2 or a Linf"):
        s.certify(test.images()[:1], 10, 10, device="cpu").spare(inf)
