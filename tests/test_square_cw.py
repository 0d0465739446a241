"""Square beside the AutoAttack authors' program, Carlini & Wagner beside torchattacks', and the contract of both."""
from dataclasses import replace
import pytest
import torch
from torch import nn
from attack_contract import no_trace, same_result
from conftest import fit, FULL, needs
from rdd_lib.core import BadArgument, describe, digest, generator_of, with_settings
from rdd_lib.data import CIFAR10, ImageSet, load, sample
from rdd_lib.models import build
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.losses import margin
from rdd_lib.models import eval_mode
from rdd_lib.attacks.borrowed import from_torchattacks
from rdd_lib.attacks.carlini_wagner import CW, to_pixels, to_tanh
from rdd_lib.intervals import wilson
from rdd_lib.attacks.square import Square, pattern, sides
from rdd_lib.attacks.threats import L2, Linf

inf = torch.inf
ATTACKS = {"square linf": lambda eps=.1: Square(Linf(eps), 40), "square l2": lambda eps=1.355: Square(L2(eps), 40),
           "cw": lambda eps=1.355: CW(L2(eps), c=10., steps=20),
           "cw, search": lambda eps=1.355: CW(L2(eps), steps=21, search_steps=3)}


@pytest.fixture(scope="module")
def nets():
    train = load("mnist5k", "train")
    x, y = train.images(), train.y
    def conv(): return build("convnet", train, width=8)
    return {"usual": fit(build("mlp", train), x, y, 4),
            "hardened": fit(build("mlp", train), x, y, 3, PGD(Linf(.1), 5, .03)),
            "conv": fit(conv(), x[::2], y[::2], 2),
            "hardened conv": fit(conv(), x[::4], y[::4], 2, PGD(Linf(.1), 3, .05))}


@pytest.fixture(scope="module")
def digits():
    test = load("mnist5k", "test")
    return test.images()[::8], test.y[::8]                              # 125 of all classes


# --- the authors' program ---------------------------------------------------------------------------------------------

def authors(net, threat, x, y, queries, seed=0, stretched=False):
    package = pytest.importorskip("pyautoattack")
    norm = type(threat).__name__
    aa = package.AutoAttack(net, norm=norm, eps=threat.eps, attacks=["square"], version="custom", seed=seed)
    aa.square.n_queries = queries
    if stretched: aa.square.rescale_schedule = True
    with torch.random.fork_rng(): x_adv = aa.run_standard_evaluation(x, y, batch_size=len(x))[0]
    with torch.no_grad(): return x_adv, net(x_adv).argmax(1) != y


def same(net, attack, x, y, seed=0):
    "Every image has the same outcome, and the broken ones are the same floats."
    found = attack_until_broken(attack, net, x, y, generator=seed, batch_size=len(x))
    x_adv, broken = authors(net, attack.threat, x, y, attack.queries, seed, attack.stretched)
    assert torch.equal(found.broken, broken)
    assert torch.equal(found.x_adv[broken], x_adv[broken])
    return found


@pytest.mark.parametrize("stretched", [False, True])
@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", ["usual", "hardened"])
def test_square_same_points_as_the_authors(name, seed, stretched, nets, digits):
    found = same(nets[name], Square(Linf(.1), 500, stretched=stretched), *digits, seed)
    assert (found.step > 1).sum() >= 10 and found.robust_accuracy > .1           # neither too easy nor too hard to tell


@pytest.mark.parametrize("name", ["conv", "hardened conv"])
def test_square_same_points_on_a_convnet(name, nets, digits):
    found = same(nets[name], Square(Linf(.1), 300), *digits)
    assert (found.step > 1).sum() >= 10


def test_square_same_points_with_all_of_autoattacks_queries(nets, digits):
    some = slice(60 if FULL else 24)
    found = same(nets["hardened"], Square(Linf(.1)), digits[0][some], digits[1][some])
    assert found.step.max() > 500


def colour(x, y): return fit(build("convnet", ImageSet(x, y, CIFAR10, "cifar10"), width=8), x, y, 2)


def test_square_same_points_in_colour():
    g = generator_of(0)
    y = torch.arange(300) % 10
    x = (.5 * torch.rand(10, 3, 32, 32, generator=g)[y] + .5 * torch.rand(300, 3, 32, 32, generator=g)).clamp(0, 1)
    found = same(colour(x, y), Square(Linf(8 / 255), 100), x[:60], y[:60])
    assert (found.step >= 0).any()


@needs("cifar10")
def test_square_same_points_on_cifar10():
    train, test = sample(load("cifar10"), 4000), sample(load("cifar10", "test"), 100)     # the file may be in order
    found = same(colour(train.images(), train.y), Square(Linf(4 / 255), 200), test.images(), test.y)
    assert (found.step > 1).sum() >= 5


@pytest.mark.parametrize("name", ["usual", "hardened", "conv"])
def test_square_l2_as_strong_as_the_authors(name, nets, digits):
    "Their draws depend on how many images are left; so not the same points, but an accuracy inside their interval."
    x, y = digits
    found = attack_until_broken(Square(L2(1.355), 400), nets[name], x, y)
    theirs = 1 - authors(nets[name], L2(1.355), x, y, 400)[1].double().mean().item()
    low, high = wilson(round(theirs * len(x)), len(x))
    assert low <= found.robust_accuracy <= high


def test_square_images_that_are_already_broken_at_the_start(nets, digits):
    "Both programs stop at once, at their first point."
    x, y = digits
    found = same(nets["usual"], Square(Linf(.9), 20), x, y)
    assert found.robust_accuracy < .05


# --- the pieces of Square ---------------------------------------------------------------------------------------------

def test_square_changes_one_window_a_query():
    x, y = torch.full((5, 3, 16, 16), .5), torch.zeros(5, dtype=torch.long)
    for threat in (Linf(.1), L2(1.)):
        attack = Square(threat, 50)
        s = attack.begin(x, y, **attack.draw(x, y, None, generator_of(0), 0))
        for q in range(50):
            s = attack.step(s, torch.full((5,), float(q == 0)), None)            # only the start is ever kept
            if isinstance(threat, L2):                                           # the whole budget, always
                assert torch.allclose(threat.distance(s["at"], x), torch.ones(5).double(), atol=1e-6)
                continue
            table = s["shared"]
            side, top, left = (int(table[k][q]) for k in ("side", "top", "left"))
            inside = torch.zeros(16, 16, dtype=torch.bool)
            inside[top:top + side, left:left + side] = True
            assert torch.equal(s["at"][..., ~inside], s["best"][..., ~inside])
            assert torch.allclose(s["at"][..., inside], x[..., inside] + .1 * table["sign"][q][:, None])


def test_square_rows_at_different_queries_walk_as_they_would_alone():
    g = generator_of(0)
    x, y, w = torch.rand(6, 2, 9, 9, generator=g), torch.arange(6) % 2, torch.randn(2 * 81, 2, generator=g)
    net = lambda x: x.flatten(1) @ w
    for threat in (Linf(.02), L2(.2)):
        one, six, two = (attack_until_broken(Square(threat, 60), net, x, y, batch_size=b) for b in (1, 6, 2))
        for other in (six, two):
            assert torch.equal(one.step, other.step) and torch.allclose(one.x_adv, other.x_adv, atol=1e-6)


def test_sides_follow_the_authors_schedule():
    package = pytest.importorskip("pyautoattack.square")
    for queries in (7, 100, 5000, 12000):
        for stretched in (False, True):
            theirs = package.SquareAttack(None, n_queries=queries, p_init=.8, resc_schedule=stretched)
            lengths = [round((theirs.p_selection(i) * 3 * 32 * 32 / 3) ** .5) for i in range(queries)]
            assert sides(queries, .8, (3, 32, 32), stretched).tolist() == [min(max(s, 1), 32) for s in lengths]


def test_patterns_are_the_authors():
    package = pytest.importorskip("pyautoattack.square")
    theirs = package.SquareAttack(None, norm="L2", device="cpu")
    for side in (3, 5, 6, 9, 25):
        with torch.random.fork_rng(): eta = theirs.eta(side)
        assert torch.allclose(pattern(side), eta, atol=1e-6) or torch.allclose(pattern(side).T, eta, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5, 40), (3, 31, 12), (1, 1, 9), (2, 3, 3), (1, 1, 1), (1, 2, 2)])
@pytest.mark.parametrize("threat", [Linf(.2), L2(.7)], ids=str)
def test_square_any_shape(threat, shape):
    g = generator_of(0)
    x, w = torch.rand(20, *shape, generator=g), torch.randn(shape[0] * shape[1] * shape[2], 3, generator=g)
    net = lambda x: (x.flatten(1) - .5) @ w
    y = net(x).argmax(1)
    found = attack_until_broken(Square(threat, 200), net, x, y)
    assert threat.within(x, found.x_adv).all()
    if x[0].numel() > 4: assert found.robust_accuracy < .95
    threat.check(x, Square(threat, 30)(net, x, y))


# --- Carlini & Wagner -------------------------------------------------------------------------------------------------

def theirs_cw(net, x, y, c, steps):
    package = pytest.importorskip("torchattacks")
    with torch.random.fork_rng(): x_adv = package.CW(net, c=c, steps=steps, lr=.01)(x, y)
    with torch.no_grad(): return x_adv, torch.where(net(x_adv).argmax(1) != y, L2(1.).distance(x_adv, x), inf)


@pytest.mark.parametrize("c, steps", [(1., 100), (10., 100)])
@pytest.mark.parametrize("name", ["usual", "hardened", "conv"])
def test_cw_finds_more_and_nearer_than_torchattacks(name, c, steps, nets, digits):
    x, y = digits
    _, theirs = theirs_cw(nets[name], x, y, c, steps)
    ours = CW(L2(1.), c, steps=steps).shortest(nets[name], x, y)[1]
    both = (theirs < inf) & (ours < inf)
    assert (ours < inf).sum() >= (theirs < inf).sum() and both.sum() >= 5
    assert ours[both].mean() <= theirs[both].mean()
    both = from_torchattacks("CW", L2(1.355), c=c, steps=steps), CW(L2(1.355), c, steps=steps)
    at_theirs, robust = (attack_until_broken(attack, nets[name], x, y).robust_accuracy for attack in both)
    assert robust <= wilson(round(at_theirs * len(x)), len(x))[1]


def test_cw_with_a_sharp_edge_is_torchattacks(nets, digits):
    "Grey pixels only, where nothing is frozen in either: the same optimisation."
    x, y = digits[0][:40] * .8 + .1, digits[1][:40]
    _, theirs = theirs_cw(nets["usual"], x, y, 10., 60)
    attack = CW(L2(1.), 10., steps=59, edge=1e-7)                           # they look at 60 points, the start included
    ours = attack.shortest(nets["usual"], x, y)[1]
    assert torch.equal(ours < inf, theirs < inf) and torch.allclose(ours[ours < inf], theirs[ours < inf], atol=2e-3)


def test_cw_with_a_tiny_price_is_no_attack(nets, digits):
    x, y = digits
    for net in (nets["usual"], nets["hardened"]):
        clean = (net(x).argmax(1) == y).double().mean()
        assert attack_until_broken(CW(L2(5.), c=1e-4, steps=200), net, x, y).robust_accuracy >= clean - .02
        assert attack_until_broken(CW(L2(5.), c=1e-4, steps=1000, search_steps=10), net, x, y).robust_accuracy < .1


def test_cw_moves_black_and_white_pixels(nets, digits):
    x = (digits[0][:30] > .5).float()
    y = nets["usual"](x).argmax(1)
    best, distance = CW(L2(1.), c=10.).shortest(nets["usual"], x, y)
    assert (distance < inf).all() and ((best != x) & (x == 0)).any() and ((best != x) & (x == 1)).any()
    x_adv, theirs = theirs_cw(nets["usual"], x, y, 10., 100)
    assert torch.equal(x_adv, x) and (theirs == inf).all()                                    # all frozen
    w = to_tanh(x, .1)
    assert w.isfinite().all() and torch.allclose(to_pixels(w, .1), x, atol=1e-6)


def test_cw_search_never_loses_and_confidence_is_kept(nets, digits):
    (x, y), net = digits, nets["usual"]
    one, four = (CW(L2(1.), steps=n * 100, search_steps=n).shortest(net, x, y)[1] for n in (1, 4))
    assert (four <= one).all() and (four < inf).all()
    best, distance = CW(L2(1.), c=10., steps=150, confidence=2.).shortest(net, x, y)
    found = distance < inf
    assert found.sum() > 50 and (-margin(net(best), y)[found] >= 2 - 1e-4).all()
    wrong = net(x).argmax(1) != y
    assert torch.equal(one == 0, wrong)


def test_cw_on_a_line_where_the_answer_is_known():
    "A linear model: the distance to the border is the margin over the length of the slope."
    g = generator_of(0)
    x, w = .3 + .4 * torch.rand(40, 30, generator=g), torch.randn(30, 2, generator=g)
    w = w / (w[:, 1] - w[:, 0]).norm()
    net = lambda x: (x - .5) @ w
    y = net(x).argmax(1)
    truth = margin(net(x), y)
    found = CW(L2(1.), c=.1, steps=3000, search_steps=6).shortest(net, x, y)[1]
    assert torch.allclose(found.float(), truth, atol=5e-3) and (found.float() >= truth - 1e-5).all()


def test_cw_training_point_is_in_the_ball(nets, digits):
    (x, y), threat = digits, L2(.4)
    out = CW(threat, c=10.)(nets["usual"], x, y)
    threat.check(x, out)
    broken = attack_until_broken(CW(threat, c=10.), nets["usual"], x, y)
    assert (nets["usual"](out).argmax(1) != y).double().mean() >= 1 - broken.robust_accuracy - .05


# --- the contract -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ATTACKS)
def test_evaluation_leaves_no_trace(name, awkward):
    (net, x, y), attack = awkward, ATTACKS[name]()
    with no_trace(net, x):
        found = attack_until_broken(attack, net, x, y, generator=3)
        if isinstance(attack, CW): attack.shortest(net, x, y)
    assert not found.x_adv.requires_grad
    attack.threat.check(x, found.x_adv)
    with eval_mode(net), torch.no_grad(): assert torch.equal(net(found.x_adv).argmax(1) != y, found.broken)
    same_result(attack_until_broken(attack, net, x, y, generator=3), found)
    net[3].p = 0.
    flags, draws = [m.training for m in net.modules()], torch.get_rng_state()
    out = attack(net, x, y, generator=1)
    assert [m.training for m in net.modules()] == flags and torch.equal(torch.get_rng_state(), draws)
    assert not out.requires_grad
    attack.threat.check(x, out)


@pytest.mark.parametrize("name", ATTACKS)
def test_zero_radius_is_clean_accuracy(name, nets, digits):
    (x, y), attack = digits, ATTACKS[name](0)
    found = attack_until_broken(attack, nets["usual"], x, y)
    assert torch.equal(found.x_adv, x) and torch.equal(found.broken, nets["usual"](x).argmax(1) != y)
    assert found.forward_samples == len(x)
    assert torch.equal(attack(nets["usual"], x, y), x)


@pytest.mark.parametrize("name", ATTACKS)
def test_neither_batch_size_nor_leaving_early_changes_an_outcome(name, nets, digits):
    (x, y), attack = digits, ATTACKS[name]()
    early = attack_until_broken(attack, nets["usual"], x, y)
    assert (early.step > 1).any() and len(early.survivors)
    for how in (dict(compact=False), dict(batch_size=16), dict(batch_size=1)):
        other = attack_until_broken(attack, nets["usual"], x, y, **how)
        assert torch.equal(other.by, early.by) and torch.equal(other.step, early.step)
    looks = torch.where(early.step < 0, attack.steps + 1, early.step)
    assert early.forward_samples == len(x) + int(looks.sum())


@pytest.mark.parametrize("name", ATTACKS)
def test_taken_up_again_after_an_interruption(name, nets, digits, tmp_path):
    (x, y), attack = (digits[0][:40], digits[1][:40]), ATTACKS[name]()
    class Failing(nn.Module):
        def __init__(self, net, looks):
            super().__init__()
            self.net, self.looks = net, looks
        def forward(self, x):
            self.looks -= 1
            if self.looks == 0: raise KeyboardInterrupt
            return self.net(x)
    def run(looks, **way):
        return attack_until_broken(attack, Failing(nets["usual"], looks), x, y, generator=5, batch_size=15, **way)

    whole = run(0)
    for looks in (4, 12, 30):
        path = tmp_path / f"{looks}.safetensors"
        with pytest.raises(KeyboardInterrupt): run(looks, checkpoint=path, every=0)
        assert path.exists() or looks == 4
        again = run(0, checkpoint=path, every=0)
        assert again.x_adv.numpy().tobytes() == whole.x_adv.numpy().tobytes() and torch.equal(again.step, whole.step)
        assert path.exists()
        assert again.forward_samples >= whole.forward_samples


FAR = [Square(Linf(.4), 100), Square(L2(.6), 200), CW(L2(.6), c=3.), CW(L2(.6), steps=200, search_steps=4)]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("attack", FAR, ids=str)
def test_few_classes_and_loud_logits(classes, attack):
    g = generator_of(0)
    x, w = torch.rand(60, 1, 6, 6, generator=g), torch.randn(36, classes, generator=g) / 3
    net = lambda x: (x.flatten(1) - .5) @ w
    y = net(x).argmax(1)
    found = attack_until_broken(attack, net, x, y)
    assert found.robust_accuracy < .45
    louder = attack_until_broken(attack, lambda x: 1024 * net(x), x, y)
    if isinstance(attack, Square): assert torch.equal(louder.step, found.step)
    else: assert louder.robust_accuracy < .5                                     # the price counts 1024 times as much


@pytest.mark.parametrize("name", ATTACKS)
def test_loud_logits_on_digits(name, nets, digits):
    (x, y), attack = digits, ATTACKS[name]()
    models = nets["usual"], lambda x: 1000 * nets["usual"](x)
    quiet, loud = (attack_until_broken(attack, net, x, y).robust_accuracy for net in models)
    if isinstance(attack, Square): assert abs(quiet - loud) < .02
    else: assert loud <= quiet + .1


def test_square_asks_for_no_gradient(nets, digits):
    (x, y), attack = digits, Square(Linf(.1), 50)
    found = attack_until_broken(attack, lambda x: nets["usual"](x).detach(), x, y)
    assert found.backward_samples == 0
    assert torch.equal(found.step, attack_until_broken(attack, nets["usual"], x, y).step)


def test_black_and_white_images_stay_in_range(nets, digits):
    x, y = (digits[0] > .5).float(), digits[1]
    for make in ATTACKS.values():
        found = attack_until_broken(make(), nets["usual"], x, y)
        assert (found.step > 1).any()


def test_settings():
    assert with_settings(Square(Linf(.1)), queries="100", stretched="true") == Square(Linf(.1), 100, stretched=True)
    assert digest(CW(L2(1.))) != digest(replace(CW(L2(1.)), edge=.2)) and describe(CW(L2(1.)))["is"] == "CW"
    for bad in (dict(queries=1.5), dict(p=0), dict(threat="linf")):
        with pytest.raises(BadArgument): Square(**{"threat": Linf(.1)} | bad)
    nan = float("nan")
    for bad in (dict(threat=Linf(.1)), dict(c=-1.), dict(c=nan), dict(lr=0), dict(edge=1.),
                dict(steps=10, search_steps=3)):
        with pytest.raises(BadArgument): CW(**{"threat": L2(1.)} | bad)


@pytest.mark.parametrize("attack", [Square(Linf(.1), 20), Square(L2(1.), 20), CW(L2(1.), steps=5)], ids=str)
def test_refusals(attack, nets, digits):
    (x, y), net = digits, nets["usual"]
    for bad_x, bad_y, words in ((x - .5, y, "must lie in"), (x, y.double(), "whole-number labels"),
                                (x, y[:3], "one label an image"), (x, y + 1, "the model has 10 classes")):
        with pytest.raises(BadArgument, match=words): attack_until_broken(attack, net, bad_x, bad_y)
    with pytest.raises(BadArgument, match="NaN logits"): attack_until_broken(attack, lambda x: net(x) * torch.nan, x, y)
