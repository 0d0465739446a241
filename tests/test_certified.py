"""Bounds hold: at random points, at attacked points, for every layer; they are exact where they can be; and no
certified image is ever broken."""
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from rdd_lib.core import BadArgument, RddError, UnknownName, describe, generator_of
from rdd_lib.models import seeded
from rdd_lib.data import load, sample
from rdd_lib.models import Net, Normalized, build, eval_mode
from rdd_lib.attacks.autoattack import autoattack
from rdd_lib.attacks.pgd import APGD, PGD
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.certificates.bounds import LAYERS, Level, MaxPool, Relu, Standardise, gamma, propagate, region, steps_of
from rdd_lib.certificates.certificate import METHODS, _levels, certify, logit_bounds, margin_bounds
from rdd_lib.evaluation.sandwich import Sandwich, sandwich
from rdd_lib.training.certified import CertifiedTraining
from rdd_lib.training.objectives import Standard
from rdd_lib.training.trainer import Trainer


def shaken(net, seed, scale=1.):
    "Random weights, batch statistics and norm weights, so that no layer is the one it was initialised to."
    g = generator_of(seed, "shake")
    with torch.no_grad():
        for m in net.modules():
            for name, p in [*m.named_parameters(recurse=False), *m.named_buffers(recurse=False)]:
                if not p.is_floating_point(): continue
                r = torch.randn(p.shape, generator=g)
                if name == "running_var": p.copy_(.5 + r.abs())
                elif p.dim() > 1: p.copy_(r * scale / max(1, p[0].numel()) ** .5)
                else: p.copy_(r * .5)
    return net.eval()


NETS = {   # what stands in a row; the last layer gives four logits
    "linear": lambda: [nn.Flatten(), nn.Linear(64, 4)],
    "no bias": lambda: [nn.Flatten(), nn.Linear(64, 8, bias=False), nn.ReLU(), nn.Linear(8, 4, bias=False)],
    "ends in relu": lambda: [nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU()],
    "relu first": lambda: [nn.BatchNorm2d(1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)],
    "deep": lambda: [nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Identity(),
                     nn.Linear(8, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 4)],
    "conv": lambda: [nn.Conv2d(1, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2, dilation=2, bias=False),
                     nn.ReLU(), nn.Flatten(), nn.Linear(16, 4)],
    "grouped conv": lambda: [nn.Conv2d(1, 4, 3, stride=3), nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2, padding=(1, 0)),
                             nn.ReLU(), nn.Flatten(), nn.Linear(12, 4)],
    "average pool": lambda: [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AvgPool2d(3, 2), nn.Flatten(), nn.Linear(12, 4)],
    "pool first": lambda: [nn.AvgPool2d((2, 4)), nn.Flatten(), nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4)],
    "max pool": lambda: [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(27, 4)],
    "overlapping max pool": lambda: [nn.MaxPool2d((3, 2), 2), nn.Conv2d(1, 3, 2), nn.MaxPool2d(2, 1), nn.Flatten(),
                                     nn.Linear(6, 4)],
    "batch norm": lambda: [nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3, affine=False),
                           nn.Flatten(), nn.Linear(108, 4)],
    "instance norm": lambda: [nn.Conv2d(1, 4, 3), nn.GroupNorm(4, 4), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(),
                              nn.Linear(36, 4)],
    "group norm": lambda: [nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4, affine=False), nn.ReLU(), nn.Conv2d(4, 4, 3),
                           nn.GroupNorm(1, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4)],
    "normalised": lambda: [nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)],
}


def made(name, seed, scale=1.):
    with seeded(0): net = nn.Sequential(*NETS[name]())
    if name == "normalised": net = Normalized(net, torch.tensor([.3]), torch.tensor([.4]))
    return shaken(net, seed, scale)


def towards_each_end(net, x, threat, classes, g):
    "Points of the ball: random ones, its corners, and where gradients push each logit up and down."
    yield x
    for _ in range(4): yield threat.random(x, g)
    for _ in range(4): yield threat.ascend(x, x, torch.randn(x.shape, generator=g).sign(), threat.eps)
    for k in range(classes):
        for side in (1, -1):
            at = threat.random(x, g)
            for _ in range(6):
                at = at.detach().requires_grad_()
                slope, = torch.autograd.grad(side * net(at)[:, k].sum(), at)
                at = threat.ascend(x, at.detach(), slope, threat.eps / 2)
            yield at


def assert_holds(net, x, y, threat, method, g):
    lo, hi = logit_bounds(net, x, threat, method)
    margins, classes = margin_bounds(net, x, y, threat, method), lo.shape[1]
    assert (lo <= hi).all() and torch.isfinite(lo).all() and torch.isfinite(hi).all()
    for at in towards_each_end(net, x, threat, classes, g):
        threat.check(x, at)
        with torch.no_grad(): z = net(at).double()
        assert (lo <= z).all() and (z <= hi).all()
        assert (margins <= z.gather(1, y[:, None]) - z).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10 ** 6), eps=st.sampled_from([1e-7, 1e-5, 1e-3, .03, .3]), euclid=st.booleans(),
       scale=st.sampled_from([.3, 1., 3.]), edge=st.booleans())
def test_bounds_hold(name, method, seed, eps, euclid, scale, edge):
    net = made(name, seed, scale)
    g = generator_of(seed, "x")
    x = torch.rand(3, 1, 8, 8, generator=g)
    if edge: x = (2 * x - .5).clamp(0, 1)                               # half of the pixels at 0 or 1
    if edge: x[0] = x[0].round()
    assert_holds(net, x, torch.randint(4, (3,), generator=g), (L2 if euclid else Linf)(eps), method, g)


@pytest.fixture(scope="module")
def digits():
    return load("mnist5k"), sample(load("mnist5k", "test"), 40)


@pytest.fixture(scope="module")
def trained(digits):
    train, _ = digits
    run, mlp = Trainer(steps=150, lr=.05, batch=50), Net("mlp", dict(width=32))
    ibp = replace(run, steps=400, objective=CertifiedTraining(Linf(.05), warmup=200))
    crown = replace(run, objective=CertifiedTraining(Linf(.03), beta=0., first_beta=1., warmup=100))
    quick = replace(run, steps=50)
    plans = {"standard": (run, mlp), "ibp": (ibp, mlp), "crown-ibp": (crown, mlp), "lenet": (quick, Net("lenet"))}
    for norm in ("none", "batch", "instance", "group"):
        plans[norm] = quick, Net("convnet", dict(width=3, depth=2, norm=norm))
    plans["whitened"] = quick, Net("mlp", dict(width=32), whiten=.1)
    return {name: trainer(net, train, device="cpu") for name, (trainer, net) in plans.items()}


ALL = ["standard", "ibp", "crown-ibp", "none", "batch", "instance", "group", "lenet", "whitened"]


@pytest.mark.parametrize("threat", [Linf(.004), L2(.05), Linf(.1)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_bounds_hold_on_the_library_s_networks(name, threat, trained, digits):
    few = digits[1].subset(range(6))
    assert_holds(trained[name], few.images(), few.y, threat, "crown-ibp", generator_of(0))


@pytest.mark.parametrize("threat", [Linf(.004), Linf(.02), Linf(.05), L2(.2), L2(1.)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_certified_is_never_broken(name, threat, trained, digits):
    test = digits[1] if name in ("standard", "ibp", "crown-ibp") else digits[1].subset(range(0, 40, 4))
    s = sandwich(trained[name], test, threat, autoattack(threat, steps=8), device="cpu")
    assert not (s.certified & ~s.survived).any() and not (s.certified & ~s.correct).any()
    assert s.floor <= s.ceiling <= s.correct.double().mean()
    counts = [int(hits.sum()) for hits in (s.correct, s.survived, s.certified)]
    assert len(s.table()) == len(s) and list(s.summary().images) == counts


def test_training_for_it_makes_certificates(trained, digits):
    usual, ibp = (certify(trained[n], digits[1], Linf(.05), "ibp", device="cpu") for n in ("standard", "ibp"))
    assert usual.accuracy == 0 and ibp.accuracy > .5 and ibp.correct.double().mean() > .7
    assert certify(trained["crown-ibp"], digits[1], Linf(.03), device="cpu").accuracy > .4


@pytest.mark.parametrize("threat", [Linf(0), L2(0)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_radius_zero_is_the_clean_accuracy(name, threat, trained, digits):
    model, test = trained[name], digits[1]
    with torch.no_grad(): right = model(test.images()).argmax(1) == test.y
    s = sandwich(model, test, threat, device="cpu")
    assert torch.equal(s.certified, right) and torch.equal(s.survived, right) and torch.equal(s.correct, right)


@pytest.mark.parametrize("threat", [Linf(.05), L2(.3)], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_exact_on_linear_networks(method, threat):
    with seeded(1):
        net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.AvgPool2d(2), nn.Flatten(),
                            nn.Linear(32, 3))
    net = shaken(net, 1).eval()
    x, y = torch.rand(5, 1, 8, 8, generator=generator_of(0)) * .2 + .4, torch.tensor([0, 1, 2, 0, 1])
    deep = net.double()
    jacobian = torch.autograd.functional.jacobian
    J = torch.stack([jacobian(lambda v: deep(v[None])[0], xi.double()) for xi in x]).flatten(2)        # (5, 3, 64)
    z, gap = deep(x.double()), J.gather(1, y[:, None, None].expand(-1, 1, 64)) - J
    length = gap.abs().sum(2) if isinstance(threat, Linf) else gap.square().sum(2).sqrt()
    exact = z.gather(1, y[:, None]) - z - threat.eps * length
    net.float()
    torch.testing.assert_close(margin_bounds(net, x, y, threat, method), exact.detach(), atol=1e-3, rtol=1e-4)
    assert (margin_bounds(net, x, y, threat, method) <= exact + 1e-9).all()


def test_each_method_is_at_least_as_tight_as_the_one_before(trained, digits):
    few = digits[1].subset(range(0, 40, 4))
    for name in ("standard", "ibp", "crown-ibp"):
        for threat in (Linf(.01), Linf(.05), L2(.5)):
            ibp, linear = (margin_bounds(trained[name], few.images(), few.y, threat, m) for m in ("ibp", "crown-ibp"))
            assert (linear >= ibp - 1e-9).all()
            full = margin_bounds(trained[name], few.images(), few.y, threat, "crown")
            assert full.mean() >= linear.mean()                       # not each one: other intervals choose other lines
    assert linear.mean() > ibp.mean()


def test_larger_balls_have_smaller_margins(trained, digits):
    few = digits[1].subset(range(10))
    for name in ("standard", "none", "instance", "lenet"):
        by_radius = [margin_bounds(trained[name], few.images(), few.y, Linf(e), "ibp") for e in (.001, .01, .1)]
        assert all((a >= b - 1e-9).all() for a, b in zip(by_radius, by_radius[1:]))


def test_the_box_counts():
    "Pixels cannot leave [0, 1]: at the edge the ball is half a ball."
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.] * 4, [0.] * 4]))
        net[1].bias.zero_()
    y = torch.tensor([0])
    assert margin_bounds(net, torch.zeros(1, 1, 2, 2), y, Linf(.1))[0, 1] == pytest.approx(0, abs=1e-4)
    assert margin_bounds(net, torch.full((1, 1, 2, 2), .5), y, Linf(.1))[0, 1] == pytest.approx(1.6, abs=1e-4)
    assert margin_bounds(net, torch.zeros(1, 1, 2, 2), y, L2(.1))[0, 1] == pytest.approx(0, abs=1e-4)
    assert margin_bounds(net, torch.full((1, 1, 2, 2), .5), y, L2(.1))[0, 1] == pytest.approx(1.8, abs=1e-4)


def test_roundings_are_counted():
    "Two weights that cancel in the reals and not in float32: the proof knows that the network may answer either way."
    net = nn.Sequential(nn.Flatten(), nn.Linear(3, 2, bias=False))
    with torch.no_grad(): net[1].weight.copy_(torch.tensor([[1e8, 1e-2, -1e8], [0., 0., 0.]]))
    x, y = torch.full((1, 3), .5), torch.tensor([0])
    assert margin_bounds(net, x, y, Linf(1e-12))[0, 1] < 0
    with torch.no_grad(): net[1].weight.copy_(torch.tensor([[1., 1., -1.], [0., 0., 0.]]))
    assert certify(net, x, Linf(.1), y=y, device="cpu").certified.all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10 ** 6), groups=st.sampled_from([1, 2, 4]), r=st.floats(1e-4, 3),
       spread=st.sampled_from([0., .01, 1.]), twos=st.booleans())
def test_standard_deviations_stay_in_their_interval(seed, groups, r, spread, twos):
    "Where the values of a group are two, at equal counts, the interval is reached at both ends."
    g = generator_of(seed)
    x = spread * torch.randn(2, 4, 2, 3, generator=g, dtype=torch.float64)
    if twos: x = spread * torch.tensor([1., -1.], dtype=torch.float64).repeat(24).view(2, 4, 2, 3)
    step = Standardise(groups, 1e-5)
    low, high, small, large = step.parts(x - r, x + r, 2 ** -24)
    c = step.centre(x)
    drawn = [x + r * (2 * torch.rand(x.shape, generator=g, dtype=x.dtype) - 1) for _ in range(4)]
    for at in (x, x + r * c.sign(), x - r * c.sign().where(c.abs() > r, c / r), *drawn):
        scale = (step.centre(at).unflatten(1, (groups, -1)).flatten(2).square().mean(2, keepdim=True) + 1e-5).rsqrt()
        scale = scale.expand(-1, -1, 24 // groups).reshape(x.shape)
        assert (small <= scale).all() and (scale <= large).all()
        assert (low - 1e-12 <= step.centre(at)).all() and (step.centre(at) <= high + 1e-12).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10 ** 6), r=st.sampled_from([1e-9, .01, .3, 2.]),
       kind=st.sampled_from(["relu", "max pool", "overlapping", "group norm"]))
def test_lines_lie_below(seed, r, kind):
    "A f(x) >= A' x + c on the whole box; group norm with its scale at either end, whatever the image says of it."
    g = generator_of(seed)
    x = torch.randn(2, 4, 4, 6, generator=g, dtype=torch.float64)
    width = r * torch.rand(2, 4, 4, 6, generator=g, dtype=torch.float64)
    lo, hi = x - width, x + width
    step = {"relu": Relu(), "max pool": MaxPool((2, 2), (2, 2)), "overlapping": MaxPool((2, 3), (1, 2)),
            "group norm": Standardise(2, 1e-5)}[kind]
    if kind == "group norm":
        *_, small, large = step.parts(lo, hi)
        values = [lambda v, t=t: step.centre(v) * t for t in (small, large)]
    elif kind == "relu": values = [lambda v: v.clamp_min(0)]
    else: values = [lambda v: F.max_pool2d(v, step.kernel, step.stride)]
    A = torch.randn(3, *values[0](x).shape, generator=g, dtype=torch.float64)
    one = torch.zeros_like(A[0, 0])
    one.view(-1)[int(torch.randint(one.numel(), (1,), generator=g))] = 1
    A[1], A[2] = one, -one                              # one output alone, and the corners where its centred value ends
    ends = [torch.where(one > 0, *pair) for pair in ((hi, lo), (lo, hi))] if kind == "group norm" else []
    level = Level(step, lo, hi, None, None)
    back, const = step.back(A, level)
    def total(v): return v.flatten(2).sum(2)
    corners = (lo + torch.rand(lo.shape, generator=g, dtype=lo.dtype).round() * (hi - lo) for _ in range(20))
    for at in (lo, hi, x, *ends, *corners):
        for value in values: assert (total(A * value(at)) >= total(back * at) + const - 1e-9).all()
    if r == 1e-9: torch.testing.assert_close(total(A * values[0](x)), total(back * x) + const, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["deep", "conv", "instance norm"])
@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10 ** 6), threat=st.sampled_from([Linf(.01), Linf(.05), L2(.1), L2(.5)]))
def test_the_bounds_of_hidden_neurons_hold(name, method, seed, threat):
    net = made(name, seed)
    g = generator_of(seed, "x")
    x = torch.rand(3, 1, 8, 8, generator=g)
    levels, *_ = _levels(net, x, threat, method)
    relus = [level for level in levels if isinstance(level.step, Relu)]
    fronts = [net[:i] for i, m in enumerate(net) if isinstance(m, nn.ReLU)]
    assert len(relus) == len(fronts)
    for level, front in zip(relus, fronts):
        neurons = front(x).flatten(1).shape[1]
        flat = nn.Sequential(front, nn.Flatten())
        for at in towards_each_end(flat, x, threat, min(neurons, 16), g):
            with torch.no_grad(): h = front(at).double()
            assert (level.lo <= h).all() and (h <= level.hi).all()


def test_steps_do_what_the_layers_do(trained, digits):
    x = digits[1].images()[:4].double()
    for name, model in trained.items():
        levels, lo, hi = propagate(steps_of(model, torch.float64), region(x, Linf(0.), exact=False))
        with torch.no_grad(): torch.testing.assert_close((lo + hi) / 2, model(x.float()).double(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("net, named", [
    (nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Sigmoid()), r"model\[2\], a Sigmoid"),
    (Normalized(nn.Sequential(nn.Sequential(nn.InstanceNorm2d(1)), nn.Flatten()), 0., 1.),
     r"model.model\[0\]\[0\], a InstanceNorm2d"),
    (nn.Sequential(nn.Conv2d(1, 1, 3, padding="same"), nn.Flatten()), "zero padding given in numbers"),
    (nn.Sequential(nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"), nn.Flatten()),
     "zero padding given in numbers"),
    (nn.Sequential(nn.MaxPool2d(2, padding=1), nn.Flatten(), nn.Linear(25, 4)), "MaxPool2d need padding=0"),
    (nn.Sequential(nn.AvgPool2d(3, ceil_mode=True), nn.Flatten(), nn.Linear(9, 4)), "AvgPool2d need padding=0"),
    (nn.Sequential(nn.BatchNorm2d(1, track_running_stats=False), nn.Flatten(), nn.Linear(64, 4)),
     "BatchNorm2d need running statistics"),
    (nn.Sequential(nn.Flatten(0), nn.Linear(64, 4)), "Flatten need start_dim=1"),
    (nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(64, 4))), "a ParametrizedLinear"),
    (type("Mine", (nn.Linear,), {})(8, 4), "model, a Mine"),
])
def test_refusals_name_the_layer(net, named):
    with pytest.raises(BadArgument, match=named): steps_of(net)


def test_other_refusals(trained, digits):
    net, test = trained["standard"], digits[1]
    with pytest.raises(UnknownName, match="unknown method 'lp'"): certify(net, test, Linf(.1), "lp")
    with pytest.raises(BadArgument, match="y must be given"): certify(net, test.images(), Linf(.1))
    with pytest.raises(BadArgument, match=r"must lie in \[0, 1\]"): certify(net, test.images() * 2, Linf(.1), y=test.y)
    with pytest.raises(BadArgument, match="threat must be a Linf or an L2"): CertifiedTraining(.1)
    with pytest.raises(BadArgument, match="warmup must be a whole number >= 0"): CertifiedTraining(Linf(.1), warmup=-1)
    with pytest.raises(BadArgument, match="need one threat"): sandwich(net, test, Linf(.1), PGD(Linf(.2)), device="cpu")
    with pytest.raises(BadArgument, match="certify the model in float32"): gamma(1000, 2 ** -8)
    with pytest.raises(BadArgument, match="one floating point type"):
        certify(nn.Sequential(nn.Flatten()), test, Linf(.1), device="cpu")


def test_a_model_that_hides_something_is_caught(digits):
    net, few = build("mlp", digits[1]), digits[1].subset(range(4))
    hook = net.model.features[1].register_forward_hook(lambda m, i, out: out + 3)
    with pytest.raises(RddError, match="leave the bounds of its layers"): certify(net, few, Linf(.01), device="cpu")
    hook.remove()
    certify(net, few, Linf(.01), device="cpu")


def test_a_contradiction_is_an_error():
    yes, y = torch.ones(3, dtype=torch.bool), torch.arange(3)
    with pytest.raises(RddError, match="1 images are certified and broken, the first at index 1"):
        Sandwich(Linf(.1), y, y, yes, torch.tensor([True, False, True]), y.double(), "ibp", "pgd-10")


def test_certify_leaves_no_trace_and_batches_do_not_matter(trained, digits):
    net, test = trained["batch"], digits[1].subset(range(9))
    net.train().zero_grad()
    net.model.features[1].eval()
    flags, buffers = [m.training for m in net.modules()], {k: v.clone() for k, v in net.named_buffers()}
    one, three = (certify(net, test, Linf(.01), device="cpu", batch=b) for b in (9, 4))
    assert [m.training for m in net.modules()] == flags
    assert all(torch.equal(v, buffers[k]) for k, v in net.named_buffers())
    assert all(p.grad is None for p in net.parameters())
    torch.testing.assert_close(one.margins, three.margins, atol=1e-9, rtol=1e-9)
    assert torch.equal(one.certified, three.certified)
    net.eval()


def test_the_objective(digits):
    train = digits[0].subset(range(0, 4000, 200))
    x, y = train.images(), train.y
    small = dict(width=2, depth=2)
    for name, kw in (("mlp", {}), ("convnet", small | dict(norm="none")), ("convnet", small | dict(norm="instance")),
                     ("lenet", {})):
        for threat in (Linf(.02), L2(.2)):
            net = build(name, train, **kw)
            for beta in (0., .5, 1.):
                o = CertifiedTraining(threat, beta=beta, warmup=0)
                loss = o(net, x, y)
                loss.backward()
                assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in net.parameters())
                torch.testing.assert_close(o(net, x, F.one_hot(y, 10).float()), loss)      # soft labels that are hard
                torch.testing.assert_close(o(net, x, y, torch.ones(len(x))), loss)
                found = F.cross_entropy(net(APGD(threat, steps=5)(net, x, y)), y)
                assert replace(o, kappa=0.)(net, x, y) >= found * (1 - 1e-5)
    o = CertifiedTraining(Linf(.1), kappa=.5, first_beta=1., warmup=10)
    assert [o.at(s).threat.eps for s in (0, 5, 10, 99)] == [0., .05, .1, .1]
    assert [o.at(s).beta for s in (0, 5, 10)] == [1., .5, 0.]
    assert o.at(0).kappa == 1 and o.at(10) == replace(o, first_beta=None) and describe(o)["warmup"] == 10
    run = o.session()
    assert run(net, x, y) == Standard()(net, x, y) and run(net, x, y) == o.at(1)(net, x, y)


def test_eval_mode_is_what_is_certified(trained, digits):
    "Batch norm as it was trained, dropout off."
    few, model = digits[1].subset(range(5)), trained["batch"]
    with eval_mode(model), torch.no_grad(): z = model(few.images()).double()
    lo, hi = logit_bounds(model, few.images(), Linf(1e-9), "ibp")
    assert (lo <= z).all() and (z <= hi).all() and (hi - lo).max() < .1 and set(LAYERS) >= {nn.BatchNorm2d, nn.Dropout}
