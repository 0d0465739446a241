"""The contract of every attack, and agreement with the AutoAttack authors' own program and with torchattacks."""
import sys
from dataclasses import replace
from unittest.mock import patch
import pytest
import torch
import torch.nn.functional as F
from attack_contract import no_trace, same_result
from rdd_lib.core import BadArgument, UnknownName, describe, digest, generator_of
from rdd_lib.data import load
from rdd_lib.attacks.pgd import APGD, PGD
from rdd_lib.attacks.losses import LOSSES, cross_entropy, dlr
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.models import eval_mode
from rdd_lib.attacks.borrowed import from_torchattacks
from rdd_lib.attacks.walk import ATTACKS
from rdd_lib.attacks.autoattack import AutoAttack, attack_of, autoattack
from rdd_lib.attacks.threats import L2, Linf, matched_l2, threat_of

THREATS = [Linf(.1), L2(1.355)]
CLIMBERS = {"pgd": lambda t: PGD(t, 5), "pgd from x": lambda t: PGD(t, 5, random_start=False),
            "pgd-dlr, 2 restarts": lambda t: PGD(t, 5, loss="dlr", restarts=2),
            "apgd-ce": lambda t: APGD(t, steps=8), "apgd-dlr, 2 restarts": lambda t: APGD(t, "dlr", 8, 2)}
ALL = CLIMBERS | {"paper": lambda t: autoattack(t, steps=8), "quick": lambda t: autoattack(t, "quick")}
THEIRS = {Linf: dict(name="PGD", steps=5, alpha=.025), L2: dict(name="PGDL2", steps=5, alpha=.34)}


def theirs(threat):
    pytest.importorskip("torchattacks")
    return from_torchattacks(threat=threat, **THEIRS[type(threat)])


@pytest.fixture(scope="module")
def digits():
    test = load("mnist5k", "test")
    return test.images()[::8], test.y[::8]                              # 125 of all classes


# --- the contract -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", [*ALL, "torchattacks"])
def test_evaluation_leaves_no_trace(name, threat, awkward):
    net, x, y = awkward
    attack = theirs(threat) if name == "torchattacks" else ALL[name](threat)
    with no_trace(net, x): found = attack_until_broken(attack, net, x, y, generator=3)
    assert not found.x_adv.requires_grad
    assert threat.distance(found.x_adv, x).max() <= threat.eps * (1 + 1e-6) + 1.2e-7
    assert found.x_adv.min() >= 0 and found.x_adv.max() <= 1
    with eval_mode(net), torch.no_grad(): assert torch.equal(net(found.x_adv).argmax(1) != y, found.broken)
    assert torch.equal(found.broken, found.step >= 0) and sum(found.counts.values()) == len(x)
    same_result(attack_until_broken(attack, net, x, y, generator=3), found)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", [*CLIMBERS, "torchattacks"])
def test_training_mode_keeps_ball_flags_and_grads(name, threat, awkward):
    net, x, y = awkward
    net[3].p = 0.                                                       # dropout itself draws from the global state
    attack = theirs(threat) if name == "torchattacks" else CLIMBERS[name](threat)
    flags, state = [m.training for m in net.modules()], torch.get_rng_state()
    a = attack(net, x, y, generator=1)
    assert [m.training for m in net.modules()] == flags and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in net.parameters()) and not a.requires_grad
    threat.check(x, a)
    net.eval()
    assert torch.equal(attack(net, x, y, generator=1), attack(net, x, y, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("make", [Linf, L2])
@pytest.mark.parametrize("name", [*ALL, "torchattacks"])
def test_zero_radius_is_clean_accuracy(name, make, nets, digits):
    x, y = digits
    attack = theirs(make(0)) if name == "torchattacks" else ALL[name](make(0))
    found = attack_until_broken(attack, nets["usual"], x, y)
    assert torch.equal(found.x_adv, x) and torch.equal(found.broken, nets["usual"](x).argmax(1) != y)
    assert (found.forward_samples, found.backward_samples) == (len(x), 0)
    if name in CLIMBERS: assert torch.equal(attack(nets["usual"], x, y), x)


@pytest.mark.parametrize("name", ALL)
def test_refusals(name, nets, digits):
    (x, y), net, attack = digits, nets["usual"], ALL[name](Linf(.1))
    def refused(words, model, x, y):
        with pytest.raises(BadArgument, match=words): attack_until_broken(attack, model, x, y)

    for bad_x in (x - .5, x * 255): refused(r"must lie in \[0, 1\]", net, bad_x, y)
    refused("whole-number labels", net, x, y.double())
    refused("one label an image", net, x, y[:3])
    refused("the model has 10 classes", net, x, y + 1)
    refused("labels >= 0", net, x, y - 1)
    refused("non-empty", net, x[:0], y[:0])
    first = lambda x: x.flatten(1).sum(1, keepdim=True) == x[0].sum()
    for broken in (lambda x: net(x) * torch.nan, lambda x: torch.where(first(x), torch.nan, net(x))):
        refused(f"{attack.name.replace('+', '.')}.*NaN logits", broken, x, y)
    refused("logits of shape", lambda x: net(x)[:, 0], x, y)


def test_flags_come_back_after_an_error(awkward):
    net, x, y = awkward
    flags = [m.training for m in net.modules()]
    with pytest.raises(BadArgument): attack_until_broken(PGD(Linf(.1)), net, x, y + 1)
    assert [m.training for m in net.modules()] == flags


def test_works_under_no_grad_and_on_images_that_want_a_gradient(nets, digits):
    x, y = digits
    plain = PGD(Linf(.1))(nets["usual"], x, y)
    with torch.no_grad(): assert torch.equal(PGD(Linf(.1))(nets["usual"], x, y), plain)
    wanting = x.clone().requires_grad_()
    for attack in (PGD(Linf(.1)), PGD(Linf(.1), random_start=False)):
        out = attack(nets["usual"], wanting, y)
        assert wanting.grad is None and out.is_leaf and not out.requires_grad
    assert torch.equal(PGD(Linf(.1))(nets["usual"], wanting, y), plain)


# --- leaving early ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_leaving_early_changes_nothing_but_the_cost(name, threat, nets, digits):
    (x, y), attack = digits, ALL[name](threat)
    early, full = (attack_until_broken(attack, nets["usual"], x, y, compact=c) for c in (True, False))
    assert torch.equal(early.by, full.by) and torch.equal(early.step, full.step)
    assert early.forward_samples < full.forward_samples and early.backward_samples < full.backward_samples
    small = attack_until_broken(attack, nets["usual"], x, y, batch_size=16)      # a queue refills the batch
    assert torch.equal(small.by, early.by) and torch.equal(small.step, early.step)
    assert small.forward_samples == early.forward_samples


def test_the_count_is_what_it_should_be(nets, digits):
    x, y = digits
    found = attack_until_broken(PGD(Linf(.1), 5), nets["usual"], x, y)
    looks = torch.where(found.step < 0, 6, found.step.clamp_max(6))              # 5 steps, 6 looks, or until it breaks
    assert found.forward_samples == len(x) + int(looks.sum())


def test_training_climbs_beyond_the_first_crossing(nets, digits):
    (x, y), net = digits, nets["usual"]
    for attack in (PGD(Linf(.1)), APGD(Linf(.1), steps=10)):
        points = attack(net, x, y), attack_until_broken(attack, net, x, y).x_adv
        loss = [cross_entropy(net(p), y).mean().item() for p in points]
        assert loss[0] > 1.3 * loss[1]
    with pytest.raises(BadArgument, match="too weak to train on"): autoattack(Linf(.1))(net, x, y)


def test_each_stage_sees_only_survivors_and_starts_from_the_same_seed(nets, digits):
    (x, y), net = digits, nets["hardened"]
    stage = PGD(Linf(.1), 1)
    both = attack_until_broken(AutoAttack(Linf(.1), ("pgd", "pgd"), steps=1), net, x, y, generator=5)
    first = attack_until_broken(stage, net, x, y, generator=5)
    second = attack_until_broken(stage, net, x[first.survivors], y[first.survivors], generator=5)
    assert torch.equal(both.broken[first.survivors], second.broken)
    assert torch.equal(both.x_adv[first.survivors], second.x_adv)
    assert torch.equal(both.x_adv[first.broken], first.x_adv[first.broken])
    assert both.names == ["clean", "pgd-1", "pgd-1"]
    clean_again = len(second.broken)                                             # that look is spared
    assert both.forward_samples == first.forward_samples + second.forward_samples - clean_again


# --- losses, two and three classes ------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("threat", [Linf(.4), L2(.6)], ids=str)
def test_few_classes(classes, threat):
    g = generator_of(0)
    x = torch.rand(60, 2, generator=g)
    w = torch.tensor([[1., 0], [0, 1], [-1, -1]])[:classes]
    net = lambda x: (x - .5) @ w.T
    y = net(x).argmax(1)
    for attack in (PGD(threat, loss="dlr"), APGD(threat, "dlr", 20), autoattack(threat, steps=20)):
        assert attack_until_broken(attack, net, x, y).robust_accuracy < .35
        louder = lambda x: 100 * net(x)
        if attack.name == "apgd-ce+apgd-dlr": continue                           # cross-entropy may choose another way
        assert torch.equal(attack_until_broken(attack, net, x, y).step, attack_until_broken(attack, louder, x, y).step)


def test_losses():
    z, y = torch.randn(200, 10, generator=generator_of(0)), torch.arange(200) % 10
    for scale in (1, 30, 300):
        zs = (scale * z).requires_grad_()
        exact = (scale * z).double().requires_grad_()
        truth = F.cross_entropy(exact, y, reduction="none")
        assert torch.allclose(cross_entropy(zs, y).double(), truth, rtol=1e-4, atol=1e-7)
        ours, true = (torch.autograd.grad(l.sum(), t)[0] for l, t in ((cross_entropy(zs, y), zs), (truth, exact)))
        assert torch.allclose(ours.double(), true, rtol=1e-3, atol=1e-7)
    sure = torch.tensor([[60., 1, 0]], requires_grad=True)
    g, = torch.autograd.grad(cross_entropy(sure, torch.tensor([0])).sum(), sure)
    assert g[0, 0] < 0 < g[0, 1] and abs(g.sum()) < 1e-6 * g[0, 1]               # F.cross_entropy gives 0 for the first
    assert torch.allclose(dlr(torch.tensor([[3., 1, 2, 0]]), torch.tensor([3])), torch.tensor([1.5]))


# --- the authors' program ---------------------------------------------------------------------------------------------

def authors(net, threat, x, y, attacks, restarts=1, seed=0):
    package = pytest.importorskip("pyautoattack")
    norm = type(threat).__name__
    aa = package.AutoAttack(net, norm=norm, eps=threat.eps, attacks=attacks, version="custom", seed=seed)
    aa.apgd.n_restarts = restarts
    with torch.random.fork_rng(): x_adv = aa.run_standard_evaluation(x, y, batch_size=len(x))[0]
    with torch.no_grad(): return net(x_adv).argmax(1) != y


@pytest.mark.parametrize("threat", [*THREATS, Linf(.2)], ids=str)
@pytest.mark.parametrize("name", ["usual", "hardened"])
def test_same_outcome_for_every_image_as_the_authors(name, threat, nets, digits):
    x, y = digits
    found = attack_until_broken(autoattack(threat), nets[name], x, y, generator=0)
    assert torch.equal(found.broken, authors(nets[name], threat, x, y, ["apgd-ce", "apgd-dlr"]))
    if name == "usual" and threat == Linf(.2): assert found.robust_accuracy < .02


@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_same_outcome_on_a_convnet_and_with_restarts(loss, nets, digits):
    x, y = digits[0][::3], digits[1][::3]
    ours = attack_until_broken(APGD(Linf(.1), loss, 30, 2), nets["conv"], x, y, generator=0)
    package = pytest.importorskip("pyautoattack.autopgd_base")
    settings = dict(n_iter=30, norm="Linf", n_restarts=2, eps=.1, seed=0, loss=loss, device="cpu")
    attack = package.APGDAttack(nets["conv"], **settings)
    with torch.random.fork_rng(): x_adv = attack.perturb(x, y)
    assert torch.equal(ours.broken, nets["conv"](x_adv).argmax(1) != y)


@pytest.mark.parametrize("threat", THREATS, ids=str)
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_same_path_as_the_authors_bit_for_bit(loss, threat, nets, digits):
    "With their loss in place of ours, the best points of 40 steps are the same floats."
    (x, y), net = digits, nets["hardened"]
    package = pytest.importorskip("pyautoattack.autopgd_base")
    settings = dict(n_iter=40, norm=type(threat).__name__, n_restarts=1, eps=threat.eps, seed=0, loss=loss)
    attack = package.APGDAttack(net, device="cpu", **settings)
    attack.init_hyperparam(x)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        best, _, best_loss, _ = attack.attack_single_run(x, y)
    losses = {"ce": lambda z, y: F.cross_entropy(z, y, reduction="none"), "dlr": attack.dlr_loss}
    with patch.dict(LOSSES, losses): ours = APGD(threat, loss, 40)(net, x, y, generator=0)
    assert torch.allclose(losses[loss](net(ours), y), best_loss, atol=1e-6)
    assert torch.equal(ours, best.detach())


@pytest.mark.parametrize("threat", THREATS, ids=str)
def test_torchattacks_agrees_on_pgd(threat, nets, digits):
    (x, y), size = digits, {Linf: .025, L2: .34}[type(threat)]
    pytest.importorskip("torchattacks")
    second = from_torchattacks("PGD" if type(threat) is Linf else "PGDL2", threat, steps=20, alpha=size)
    for name in ("usual", "hardened"):
        both = PGD(threat, 20, size), second
        a, b = (attack_until_broken(attack, nets[name], x, y).robust_accuracy for attack in both)
        assert abs(a - b) <= .04                                                 # other random starts: 5 images of 125


# --- others' attacks, names, settings ---------------------------------------------------------------------------------

def test_unbounded_attack_counts_only_inside_the_ball(nets, digits):
    pytest.importorskip("torchattacks")
    x, y = digits[0][:30], digits[1][:30]
    near, far = (from_torchattacks("DeepFool", L2(eps), steps=20) for eps in (.05, 20.))
    shares = [attack_until_broken(attack, nets["usual"], x, y).robust_accuracy for attack in (near, far)]
    assert shares[0] > shares[1] + .2
    with pytest.raises(BadArgument, match="more than eps"): near(nets["usual"], x, y)


def test_torchattacks_missing():
    with patch.dict(sys.modules, {"torchattacks": None}):
        with pytest.raises(ImportError, match="pip install --no-deps torchattacks"): from_torchattacks("PGD", Linf(.1))


def test_names_and_settings():
    for name in ATTACKS:
        for threat in THREATS[name == "cw":]:                                   # CW knows l2 only
            attack, counted = attack_of(name, threat), "queries" if name == "square" else "steps"
            assert attack.threat == threat and describe(attack)["threat"] == describe(threat)
            assert digest(attack) != digest(replace(attack, **{counted: getattr(attack, counted) + 1}))
    said = "unknown AutoAttack version 'standart'; did you mean 'standard'"
    with pytest.raises(UnknownName, match=said): autoattack(Linf(.1), "standart")
    with pytest.raises(BadArgument): attack_of("cw", Linf(.1))
    assert AutoAttack(Linf(.1), ["pgd"]) == AutoAttack(Linf(.1), ("pgd",))


THREATS_OF = {"linf:0.1": Linf(.1), "l2:.84": L2(.84), "linf:8/255": Linf(8 / 255), "L2:1": L2(1)}
NONE = ["linf", "linf:", "linf:x", "l3:1", "linf:-1", "linf:nan", "linf:1/0", "linf:8/", "linf:1:2", "", None, .1]


@pytest.mark.parametrize("text", THREATS_OF)
def test_threat_of(text): assert threat_of(text) == THREATS_OF[text]


@pytest.mark.parametrize("text", NONE)
def test_threat_of_refuses(text):
    with pytest.raises(BadArgument): threat_of(text)


def test_matched_l2():
    assert round(matched_l2(Linf(.1), 784).eps, 3) == 1.355 and round(matched_l2(Linf(8 / 255), 3072).eps, 3) == .841
