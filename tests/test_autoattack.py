"""The evaluation as a whole: outcomes beside the authors' program on trained nets of two shapes, stopping and going on,
the screen, counts."""
import itertools
from dataclasses import replace
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from attack_contract import same_result
from rdd_lib.core import BadArgument, BrokenFile, generator_of
from rdd_lib.models import seeded
from rdd_lib.data import ImageSet, load, sample
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import APGD, APGDT, MIFGSM, PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.losses import targeted_dlr
from rdd_lib.attacks.walk import ATTACKS
from rdd_lib.attacks.autoattack import AutoAttack, attack_of, autoattack
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.intervals import wilson
from rdd_lib.training.objectives import Adversarial
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trainer import Trainer


def coloured(digits):
    "The digits as 3x32x32 images, each in a colour of its own on a dark ground: CIFAR's shape without CIFAR."
    tint = torch.rand(len(digits), 3, 1, 1, generator=generator_of(0)) * .6 + .4
    x = F.pad(digits.images(), (2, 2, 2, 2)) * tint
    return ImageSet((x * 255).round().to(torch.uint8), digits.y, digits.classes, "coloured digits", digits.split)


DATA = {"mnist": lambda split: load("mnist5k", split), "cifar shape": lambda split: coloured(load("mnist5k", split))}
NETS = {"mnist": Net("mlp"), "cifar shape": Net("convnet", dict(width=6))}
EPS = {"standard": (Linf(.06), L2(.8)), "adversarial": (Linf(.12), L2(2.))}


@pytest.fixture(scope="module")
def trained():
    made = {}
    for shape, data in DATA.items():
        train, plain = sample(data("train"), 1500), Trainer(epochs=3, lr=.05)
        hardening = replace(plain, objective=Adversarial(PGD(Linf(.1), 4)))
        made[shape, "standard"] = plain(NETS[shape], train, 0, "cpu")
        made[shape, "adversarial"] = hardening(NETS[shape], train, 0, "cpu")
    return made


@pytest.fixture(scope="module")
def images():
    return {shape: (s.images(), s.y) for shape, data in DATA.items() for s in [sample(data("test"), 60)]}


def authors(net, threat, x, y, attacks):
    package = pytest.importorskip("pyautoattack")
    aa = package.AutoAttack(net, norm=type(threat).__name__, eps=threat.eps, attacks=attacks, version="custom", seed=0)
    aa.apgd.n_restarts = 1
    with torch.random.fork_rng(): x_adv = aa.run_standard_evaluation(x, y, batch_size=len(x))[0]
    with torch.no_grad(): return net(x_adv).argmax(1) != y


CASES = [(shape, kind, norm) for shape in DATA for kind in EPS for norm in (0, 1)]


@pytest.mark.parametrize("shape, kind, norm", CASES, ids=str)
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-dlr"])
def test_equal_to_the_authors_image_by_image(name, shape, kind, norm, trained, images):
    threat, net, (x, y) = EPS[kind][norm], trained[shape, kind], images[shape]
    found = attack_until_broken(AutoAttack(threat, (name,)), net, x, y, 0)
    assert torch.equal(found.broken, authors(net, threat, x, y, [name]))
    assert 0 < found.robust_accuracy < .98                                # neither trivial: some break, some stand


@pytest.mark.parametrize("shape, kind, norm", CASES, ids=str)
def test_targeted_equal_to_the_authors(shape, kind, norm, trained, images):
    threat, net, (x, y) = EPS[kind][norm], trained[shape, kind], images[shape]
    found = attack_until_broken(APGDT(threat, steps=25), net, x, y, 0)
    package = pytest.importorskip("pyautoattack.autopgd_base")
    settings = dict(n_iter=25, norm=type(threat).__name__, eps=threat.eps, seed=0, device="cpu")
    attack = package.APGDAttack_targeted(net, **settings)                 # its schedule is fixed here
    with torch.random.fork_rng(), torch.no_grad(): x_adv = attack.perturb(x, y)
    assert torch.equal(found.broken, net(x_adv).argmax(1) != y)


@pytest.mark.parametrize("kind", EPS)
def test_torchattacks_as_a_second_opinion_at_100_steps(kind, trained, images):
    ta = pytest.importorskip("torchattacks")
    (x, y), net, threat = images["mnist"], trained["mnist", kind], EPS[kind][0]
    for loss in ("ce", "dlr"):
        ours = attack_until_broken(APGD(threat, loss), net, x, y, 0)
        with seeded(0): x_adv = ta.APGD(net, eps=threat.eps, steps=100, loss=loss, seed=0)(x, y)
        assert torch.equal(ours.broken, net(x_adv).argmax(1) != y)


def test_the_standard_sequence_is_as_strong_as_the_authors(trained, images):
    (x, y), net, threat = images["mnist"], trained["mnist", "adversarial"], Linf(.12)
    found = attack_until_broken(autoattack(threat, "standard", queries=300), net, x, y, 0)
    package = pytest.importorskip("pyautoattack")
    attacks = ["apgd-ce", "apgd-t", "fab-t", "square"]
    aa = package.AutoAttack(net, norm="Linf", eps=threat.eps, attacks=attacks, version="custom", seed=0)
    aa.apgd.n_restarts, aa.square.n_queries = 1, 300
    with torch.random.fork_rng(): x_adv = aa.run_standard_evaluation(x, y, batch_size=len(x))[0]
    assert torch.equal(found.broken, net(x_adv).argmax(1) != y)
    assert found.names == ["clean", "apgd-ce", "apgd-t", "fab-t", "square"]


# --- few classes, loud logits -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("classes", [2, 3, 4])
def test_targeted_dlr_with_few_classes(classes):
    g = generator_of(0)
    z = torch.randn(40, classes, generator=g)
    y, t = (torch.randint(classes, (40,), generator=g) for _ in "yt")
    loss = targeted_dlr(z, y, t)
    at = lambda labels: z.gather(1, labels[:, None])[:, 0]
    assert loss.isfinite().all() and torch.equal(loss > 0, at(t) > at(y))
    if classes > 2: assert torch.allclose(targeted_dlr(50 * z + 3, y, t), loss, atol=1e-4)


@pytest.mark.parametrize("name", [*ATTACKS])
@pytest.mark.parametrize("classes", [2, 3])
def test_every_attack_works_with_few_classes(name, classes):
    g = generator_of(0)
    x = torch.rand(40, 1, 4, 4, generator=g)
    w = torch.randn(16, classes, generator=g)
    net = lambda x: (x.flatten(1) - .5) @ w
    y = net(x).argmax(1)
    short = {"steps": 60 if name == "cw" else 10} if name != "square" else {}
    short |= {"queries": 60} if name in ("square", "standard") else {}
    broken = attack_until_broken(attack_of(name, L2(1.5), **short), net, x, y).broken
    assert broken.double().mean() > .5


@pytest.mark.parametrize("name", ["pgd", "mifgsm", "apgd-ce", "quick", "paper", "apgd-t"])
def test_logits_times_a_thousand_change_little(name, trained, images):
    (x, y), net = images["mnist"], trained["mnist", "adversarial"]
    attack = attack_of(name, Linf(.12), **({} if name == "quick" else {"steps": 20}))
    models = net, lambda x: 1000 * net(x)
    quiet, loud = (attack_until_broken(attack, model, x, y).broken.double().mean() for model in models)
    assert loud >= quiet - .05


# --- stopping and going on --------------------------------------------------------------------------------------------

class Stops(nn.Module):
    "A net that fails at its n-th call."
    def __init__(self, net, n):
        super().__init__()
        self.net, self.calls = net, itertools.count(1)
        self.n = n

    def forward(self, x):
        if next(self.calls) == self.n: raise KeyboardInterrupt
        return self.net(x)


WAYS = {name: {"steps": 8} for name in ATTACKS} | {"square": {"queries": 40}, "standard": {"steps": 8, "queries": 40}}
STOPPED = [(name, {}) for name in ATTACKS] + [("paper", {"screen": "bf16"}), ("paper", {"compact": False})]


@pytest.mark.parametrize("name, way", STOPPED, ids=str)
@pytest.mark.parametrize("share", [.15, .5, .9])
def test_stopped_and_taken_up_again_gives_the_same_bytes(name, way, share, trained, images, tmp_path):
    (x, y), net = images["mnist"], trained["mnist", "adversarial"]
    attack = attack_of(name, L2(2.), **WAYS[name] | ({"restarts": 2} if name.startswith("apgd") else {}))
    counting = Stops(net, -1)
    def run(model, **more): return attack_until_broken(attack, model, x, y, 3, batch_size=25, **way, **more)

    whole = run(counting)
    calls, path = next(counting.calls) - 1, tmp_path / "evaluation.safetensors"
    with pytest.raises(KeyboardInterrupt): run(Stops(net, max(6, int(share * calls))), checkpoint=path, every=0)
    assert path.exists()
    same_result(run(Stops(net, -1), checkpoint=path, every=0), whole, "by", "step", "distance")
    clean = -(-len(x) // 25)                                            # these are asked again, the rest is in the file
    same_result(run(Stops(net, clean + 1), checkpoint=path), whole, "by")


def test_a_checkpoint_of_something_else_is_refused(trained, images, tmp_path):
    (x, y), net, path = images["mnist"], trained["mnist", "standard"], tmp_path / "e.safetensors"
    def run(**change):
        asked = dict(attack=PGD(Linf(.1)), model=Stops(net, -1), x=x, y=y, generator=0, batch_size=25)
        return attack_until_broken(checkpoint=path, every=0, **asked | change)
    def refused(**change):
        with pytest.raises(BadArgument, match="belongs to another run of an evaluation"): run(**change)

    with pytest.raises(KeyboardInterrupt): run(model=Stops(net, 6))
    kept = path.read_bytes()
    refused(attack=PGD(Linf(.2)))
    refused(x=x.flip(0), y=y.flip(0))
    refused(model=Stops(trained["mnist", "adversarial"], -1))
    refused(generator=5)
    refused(batch_size=20)
    assert path.read_bytes() == kept
    path.write_bytes(kept[:100])
    with pytest.raises(BrokenFile, match="is not the checkpoint"): run()


def test_a_checkpoint_in_the_cache_finds_itself(trained, images, tmp_path, monkeypatch):
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "cells"))
    (x, y), net = images["mnist"], trained["mnist", "standard"]
    def run(model, **way): return attack_until_broken(PGD(Linf(.1)), model, x, y, batch_size=25, **way)

    with pytest.raises(KeyboardInterrupt): run(Stops(net, 6), checkpoint=True, every=0)
    assert len([*(tmp_path / "evaluations").iterdir()]) == 1
    calls, fresh = Stops(net, -1), Stops(net, -1)
    run(calls, checkpoint=True, every=0)
    run(fresh)
    assert next(calls.calls) < next(fresh.calls) and not [*(tmp_path / "evaluations").iterdir()]


# --- the screen -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", EPS)
def test_what_a_screen_breaks_is_broken_in_float32(kind, trained, images):
    (x, y), net = images["mnist"], trained["mnist", kind]
    attack = autoattack(EPS[kind][0], steps=20)
    plain, screened = (attack_until_broken(attack, net, x, y, screen=s) for s in (None, "bf16"))
    with torch.no_grad(): assert torch.equal(net(screened.x_adv).argmax(1) != y, screened.broken)
    assert screened.broken.sum() >= plain.broken.sum() - 1 and screened.counts["apgd-ce bf16"] > 0
    assert bool((plain.broken <= screened.broken).all())     # survivors get the whole attack in float32, same starts


# --- tables and counts ------------------------------------------------------------------------------------------------

def test_an_outcome_says_what_the_attack_found(trained, tmp_path):
    import pandas as pd
    test, net = sample(DATA["mnist"]("test"), 60), trained["mnist", "standard"]
    o = evaluate(net, test, autoattack(Linf(.06), steps=20), device="cpu")
    t = o.table()
    assert (t.survived == (t.broken_by == "")).all() and (t.correct == (t.margin > 0)).all()
    assert (t.loc[t.step > 0, "distance"] > 0).all()
    assert np.isclose(t.survived.mean(), o.rob) and o.backward_samples > 0
    for path in (o.save(tmp_path / "t.csv"), o.save(tmp_path / "t.parquet")):
        back = pd.read_csv(path, keep_default_na=False) if path.suffix == ".csv" else pd.read_parquet(path)
        assert back.broken_by.tolist() == t.broken_by.tolist() and np.allclose(back.margin, t.margin, rtol=1e-5)
    assert wilson(int(o.survived.sum()), 60) == o.interval()


def test_momentum_follows_a_naive_statement(trained, images):
    (x, y), net = (t[:10] for t in images["mnist"]), trained["mnist", "standard"]
    at, total = x.clone(), torch.zeros_like(x)
    for _ in range(5):
        at.requires_grad_()
        g, = torch.autograd.grad(F.cross_entropy(net(at), y, reduction="sum"), at)
        total = .9 * total + g / g.abs().mean((1, 2, 3), keepdim=True)
        at = torch.min(torch.max(at.detach() + .02 * total.sign(), x - .1), x + .1).clamp(0, 1)
    assert torch.allclose(MIFGSM(Linf(.1), 5, .02, .9)(net, x, y), at, atol=1e-6)
