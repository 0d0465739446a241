"""FAB: projections against solvers, the contract, and agreement with the AutoAttack authors' own program."""
import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from attack_contract import no_trace, same_result
from conftest import FULL
from rdd_lib.core import BadArgument, UnknownName, describe, generator_of
from rdd_lib.data import load
from rdd_lib.attacks.pgd import APGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.models import eval_mode
from rdd_lib.attacks.fab import FAB, boundary_distance, to_plane, water_level
from rdd_lib.attacks.threats import L2, Linf

BOTH = [Linf, L2]


@pytest.fixture(scope="module")
def digits():
    test = load("mnist5k", "test")
    return test.images()[::16], test.y[::16]                             # 63 of all classes


def few_classes(classes):
    g = generator_of(0)
    x, w = torch.rand(60, 2, generator=g), torch.tensor([[1., 0], [0, 1], [-1, -1]])[:classes]
    net = lambda x: (x - .5) @ w.T + .3 * torch.sin(8 * x) @ w.flip(1).T
    return net, x, net(x).argmax(1)


# --- the projection ---------------------------------------------------------------------------------------------------

def solver(make, t, w, gap):
    t, w, n = t.numpy(), w.numpy(), len(t)
    if make is L2:
        on_plane = dict(type="eq", fun=lambda d: w @ d + gap, jac=lambda d: w)
        best = minimize(lambda d: d @ d, 0 * t, jac=lambda d: 2 * d, bounds=[*zip(-t, 1 - t)], method="SLSQP",
                        options=dict(ftol=1e-14, maxiter=1000), constraints=on_plane)
        return best.fun ** .5 if best.success else float("nan")
    eye = np.eye(n)
    A = np.block([[eye, -np.ones((n, 1))], [-eye, -np.ones((n, 1))]])
    return linprog([0] * n + [1], A, np.zeros(2 * n), [[*w, 0]], [-gap], [*zip(-t, 1 - t), (0, None)]).fun


@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("n", [1, 2, 9])
def test_projection_is_the_shortest(make, n):
    g = generator_of(n)
    draw = lambda: torch.rand(40, n, generator=g, dtype=torch.double)
    t, w, goal = draw(), draw() - .5, draw()
    t = torch.where(t < .25, 0., torch.where(t > .75, 1., t))                # pixels at the edge
    w = torch.where(draw() < .2, 0., w)                                      # pixels without slope
    w[20:] = (w[20:] * 4).round() / 4                                        # ties
    w[w.abs().sum(1) == 0, 0] = 1
    gap = (w * (t - goal)).sum(1)
    d = to_plane(make(1.), t, w, gap)
    assert torch.allclose((w * d).sum(1), -gap, atol=1e-12) and (t + d).min() >= -1e-12 and (t + d).max() <= 1 + 1e-12
    best = torch.tensor([solver(make, *row) for row in zip(t, w, gap.tolist())], dtype=torch.double)
    known = ~best.isnan()
    assert known.sum() >= 35 and torch.allclose(make(1.).norm(d)[known], best[known], atol=1e-5)


@pytest.mark.parametrize("make", BOTH)
def test_projection_as_the_authors(make):
    theirs = getattr(pytest.importorskip("pyautoattack.fab_projections"), f"projection_{make.__name__.lower()}")
    g = generator_of(0)
    for n in (2, 784):
        t, w = torch.rand(200, n, generator=g), torch.randn(200, n, generator=g)
        t = torch.where(torch.rand(200, n, generator=g) < .5, t.round(), t)
        gap = torch.randn(200, generator=g) * w.abs().sum(1) * .6              # some planes out of reach, on both sides
        assert torch.allclose(to_plane(make(1.), t, w, gap), theirs(t, w, (w * t).sum(1) - gap), atol=2e-6)


@pytest.mark.parametrize("make", BOTH)
def test_projection_at_its_limits(make):
    t, w, threat = torch.tensor([[.25, 1., 0]]), torch.tensor([[1., -2, 0]]), make(1.)
    assert torch.equal(to_plane(threat, t, w, torch.tensor([0.])).abs(), torch.zeros(1, 3))
    corner = torch.tensor([[-.25, 0, 0]])                                    # the nearest one, where it is out of reach
    assert torch.equal(to_plane(threat, t, w, torch.tensor([5.])), corner)
    assert torch.allclose(to_plane(threat, t, w, torch.tensor([-9.])), torch.tensor([[.75, -1, 0]]))
    assert torch.equal(to_plane(threat, t, 0 * w, torch.tensor([1.])).abs(), torch.zeros(1, 3))


def test_water_level_solves_its_equation():
    g = generator_of(0)
    h, r, share = (torch.rand(*s, generator=g, dtype=torch.double) for s in ((300, 50), (300, 50), (300,)))
    h, r = torch.where(h < .2, 0., h), torch.where(r < .3, 0., (r * 10).round() / 10)
    want = share * (h * r).sum(1)
    level = water_level(h, r, want)
    assert torch.allclose((h * torch.minimum(r, level[:, None])).sum(1), want, atol=1e-12)
    assert water_level(h, r, (h * r).sum(1) * 1.01).isinf().all() and torch.equal(water_level(h, r, 0 * want), 0 * want)


# --- the contract -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", BOTH)
@pytest.mark.parametrize("restarts", [1, 3])
def test_evaluation_leaves_no_trace(make, restarts, awkward):
    net, x, y = awkward
    threat = make(.1 if make is Linf else .5)
    attack = FAB(threat, steps=8, restarts=restarts)
    with no_trace(net, x):
        found = attack_until_broken(attack, net, x, y, generator=3)
        boundary_distance(net, x, y, steps=3)
    assert not found.x_adv.requires_grad
    assert threat.distance(found.x_adv, x).max() <= threat.eps * (1 + 1e-6) + 1.2e-7
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    with eval_mode(net), torch.no_grad(): assert torch.equal(net(found.x_adv).argmax(1) != y, found.broken)
    same_result(attack_until_broken(attack, net, x, y, generator=3), found)


@pytest.mark.parametrize("make", BOTH)
def test_zero_radius_is_clean_accuracy(make, nets, digits):
    x, y = digits
    found = attack_until_broken(FAB(make(0), restarts=2), nets["usual"], x, y)
    assert torch.equal(found.x_adv, x) and torch.equal(found.broken, nets["usual"](x).argmax(1) != y)
    assert (found.forward_samples, found.backward_samples) == (len(x), 0)


def test_refusals(nets, digits):
    (x, y), net = digits, nets["usual"]
    bad = [("threat", .1), ("steps", 0), ("targets", 0), ("restarts", 0), ("alpha_max", 1.1), ("eta", .9),
           ("beta", -.1), ("beta", True)]
    for name, value in bad:
        with pytest.raises(BadArgument, match=f"{name} must be"): FAB(**{"threat": Linf(.1), name: value})
    with pytest.raises(BadArgument, match="fab-t leaves the ball"): FAB(Linf(.1))(net, x, y)
    broken = {"fab-t.*NaN logits": lambda x: net(x) * torch.nan, "no gradient": lambda x: net(x).detach()}
    for words, model in broken.items():
        with pytest.raises(BadArgument, match=words): attack_until_broken(FAB(Linf(.1)), model, x, y)
    with pytest.raises(BadArgument, match="the model has 10 classes"): boundary_distance(net, x, y + 1)
    with pytest.raises(BadArgument, match="halvings"): boundary_distance(net, x, y, halvings=-1)
    with pytest.raises(UnknownName, match="norm"): boundary_distance(net, x, y, "l1")
    assert describe(FAB(Linf(.1)))["is"] == "FAB" and FAB(Linf(.1)).name == "fab-t"


def test_one_turn_a_class_and_restart():
    assert [FAB(Linf(.1)).turns(k) for k in (2, 3, 10, 1000)] == [1, 2, 9, 9]
    assert FAB(Linf(.1), targets=3, restarts=2).turns(10) == 6


@pytest.mark.parametrize("name", ["usual", "hardened"])
def test_batch_size_and_leaving_early_change_no_outcome(name, nets, digits):
    (x, y), net, attack = digits, nets[name], FAB(Linf(.12), steps=20, targets=3)
    ways = {}, dict(compact=False), dict(batch_size=16)
    early, full, small = (attack_until_broken(attack, net, x, y, **way) for way in ways)
    assert torch.equal(early.by, full.by) and torch.equal(early.by, small.by)
    assert early.forward_samples < full.forward_samples and early.backward_samples < full.backward_samples


def test_every_look_is_spent_on_a_step(nets, digits):
    x, y = digits
    found = attack_until_broken(FAB(Linf(1e-4), steps=30, targets=2), nets["conv"], x, y)
    steps = 60 * len(found.survivors)
    assert steps <= found.backward_samples <= 1.25 * steps and steps <= found.forward_samples - len(x) < 2 * steps


@pytest.mark.parametrize("make", BOTH)
def test_taken_up_again_after_a_stop(make, nets, digits, tmp_path):
    (x, y), net, path = digits, nets["hardened"], tmp_path / "evaluation.safetensors"
    attack = FAB(make(.12 if make is Linf else 1.5), steps=15, targets=2, restarts=2)
    left = iter(range(60))
    def failing(x):
        next(left)
        return net(x)
    def run(model, **way): return attack_until_broken(attack, model, x, y, batch_size=20, **way)

    noted = dict(checkpoint=path, every=0)
    with pytest.raises(StopIteration): run(failing, **noted)
    assert path.exists()
    same_result(run(lambda x: net(x), **noted), run(net), "step")
    assert path.exists()


def test_screen(nets, digits):
    x, y = digits
    found = attack_until_broken(FAB(Linf(.08), steps=15, targets=2), nets["usual"], x, y, screen="bf16")
    assert torch.equal(nets["usual"](found.x_adv).argmax(1) != y, found.broken)
    assert found.names == ["clean", "fab-t bf16", "fab-t"]


# --- what it finds ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("make", BOTH)
def test_louder_logits_change_nothing(make, nets, digits):
    (x, y), net, attack = digits, nets["usual"], FAB(make(.07 if make is Linf else 1.), steps=20, targets=2)
    def found(by): return attack_until_broken(attack, lambda x: by * net(x), x, y)
    plain = attack_until_broken(attack, net, x, y)
    assert torch.equal(plain.x_adv, found(1024).x_adv)                        # a power of two: the same floats
    for by in (1000, 1e-6): assert torch.equal(plain.broken, found(by).broken)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("threat", [Linf(.1), L2(.12)], ids=str)
def test_few_classes(classes, threat):
    net, x, y = few_classes(classes)
    fab, apgd = (attack_until_broken(a, net, x, y).robust_accuracy for a in (FAB(threat), APGD(threat, "dlr")))
    assert .1 < fab <= apgd < .6                                              # here it finds more than Auto-PGD


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_boundary_distance_is_the_radius_at_which_an_image_breaks(norm, nets, digits):
    (x, y), net = (digits[0][:30], digits[1][:30]), nets["usual"]
    found, make = boundary_distance(net, x, y, norm, steps=30), {"linf": Linf, "l2": L2}[norm]
    assert torch.equal(found.distance == 0, net(x).argmax(1) != y)
    assert torch.equal(net(found.x_adv).argmax(1) != y, found.distance < torch.inf)
    make(found.distance.max().item()).check(x, found.x_adv)
    rough = boundary_distance(net, x, y, norm, steps=30, halvings=0)
    assert (found.distance <= rough.distance + 1e-6).all() and (found.distance >= .8 * rough.distance).all()
    eps = rough.distance.median().item() * 1.001
    assert torch.equal(attack_until_broken(FAB(make(eps), steps=30), net, x, y).broken, rough.distance <= eps)


def test_boundary_distance_where_there_is_no_boundary():
    def zero(x): return torch.stack([1 + 0 * x.sum(1), 0 * x.sum(1)], 1)
    x = torch.rand(5, 3, generator=generator_of(0))
    found = boundary_distance(zero, x, torch.tensor([0, 0, 0, 0, 1]), steps=3)
    assert found.distance.tolist() == [torch.inf] * 4 + [0.]


# --- the authors' program ---------------------------------------------------------------------------------------------

def authors(net, threat, x, y):
    package = pytest.importorskip("pyautoattack")
    norm = type(threat).__name__
    aa = package.AutoAttack(net, norm=norm, eps=threat.eps, attacks=["fab-t"], version="custom", seed=0)
    with torch.random.fork_rng(): x_adv = aa.run_standard_evaluation(x, y, batch_size=len(x))[0]
    with torch.no_grad(): return net(x_adv).argmax(1) != y


def theirs(net, threat, **settings):
    package = pytest.importorskip("pyautoattack.fab_pt")
    norm = type(threat).__name__
    return package.FABAttack_PT(net, norm=norm, eps=threat.eps, targeted=True, device="cpu", **settings)


HALF = [("usual", Linf(.07)), ("usual", L2(1.1)), ("hardened", Linf(.17)), ("hardened", L2(1.8))]   # about half survive


@pytest.mark.parametrize("name, threat", HALF, ids=str)
def test_same_outcome_for_every_image_as_the_authors(name, threat, nets, digits):
    x, y = (part if FULL else part[::2] for part in digits)
    found = attack_until_broken(FAB(threat), nets[name], x, y)
    assert .2 < found.robust_accuracy < .8 and torch.equal(found.broken, authors(nets[name], threat, x, y))


@pytest.mark.parametrize("threat", [Linf(.05), L2(.75)], ids=str)
def test_same_outcome_on_a_convnet_and_with_restarts(threat, nets, digits):
    x, y = digits[0][::3], digits[1][::3]
    attack = theirs(nets["conv"], threat, n_restarts=2, n_iter=25, n_target_classes=3, seed=0)
    with torch.random.fork_rng(): x_adv = attack.perturb(x, y)
    ours = attack_until_broken(FAB(threat, steps=25, targets=3, restarts=2), nets["conv"], x, y, generator=0)
    assert .2 < ours.robust_accuracy < .9 and torch.equal(ours.broken, nets["conv"](x_adv).argmax(1) != y)


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("threat", [Linf(.1), L2(.12)], ids=str)
def test_same_outcome_for_few_classes(classes, threat):
    net, x, y = few_classes(classes)
    attack = theirs(net, threat, n_restarts=1, n_iter=40, n_target_classes=classes - 1, seed=0)
    with torch.random.fork_rng(): x_adv = attack.perturb(x, y)
    ours = attack_until_broken(FAB(threat, steps=40), net, x, y)
    assert (ours.broken != (net(x_adv).argmax(1) != y)).sum() <= 1           # rounding may tip a point at the very edge


@pytest.mark.parametrize("threat", [Linf(.1), L2(1.)], ids=str)
@pytest.mark.parametrize("name", ["usual", "conv"])
def test_same_walk_as_the_authors(name, threat, nets, digits):
    "The nearest misclassified point of a walk of 40 steps is as far as theirs, to rounding."
    (x, y), net = (digits[0][:25], digits[1][:25]), nets[name]
    right = net(x).argmax(1) == y
    x, y = x[right], y[right]
    program = theirs(net, threat, n_iter=40)
    attack, logits = FAB(threat, steps=40), net(x).detach()
    for turn in (0, 4):
        program.target_class = 2 + turn
        with torch.random.fork_rng(): there = threat.norm(program.attack_single_run(x, y, is_targeted=True) - x)
        s = attack.begin(x, y, **attack.draw(x, y, logits, generator_of(0), turn))
        here = torch.full((len(x),), torch.inf)
        for _ in range(41):
            at, z, losses = attack.look(net, s)
            here = here.minimum(torch.where(z.argmax(1) != y, threat.norm(at - x), torch.inf))
            s = attack.step(s, losses, None)
        found = there > 0
        assert found.sum() > 15 and torch.equal(found, here < torch.inf)
        close = (here - there)[found].abs() <= 1e-4 * there[found]
        assert (~close).sum() <= 1
