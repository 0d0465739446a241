"""Networks that look at a batch as a whole: the last image of an epoch, budgets of one image, modes that come back,
losses that may be split."""
import warnings
from dataclasses import fields, replace
import pytest
import torch
from torch import nn
from rdd_lib.compressed import Compressed
from rdd_lib.core import BadArgument, generator_of
from rdd_lib.coresets.signals import Proxy, signals
from rdd_lib.covering.distances import embedded, space_of
from rdd_lib.data import load, sample
from rdd_lib.distill.backprop import BackpropThroughTraining
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.gradient import GradientMatching
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import MODELS, Net, takes_one
from rdd_lib.attacks.pgd import PGD
from rdd_lib.training.certified import CertifiedTraining
from rdd_lib.training.curvature import Curvature
from rdd_lib.training.input_gradient import GradientPenalty
from rdd_lib.training.mart import Mart
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.training.certified import Noisy
from rdd_lib.attacks.threats import L2, Linf, threat_of
from rdd_lib.training.trades import Trades
from rdd_lib.training.trainer import Trainer


class Pooled(nn.Module):
    "A small network that, as ResNet-18 does on small images, normalises a single value a channel."
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(4),
                                      nn.ReLU(), nn.Flatten())
        self.classifier = nn.Linear(4, 10)

    def embed(self, x): return self.features(x)
    def forward(self, x): return self.classifier(self.embed(x))


@pytest.fixture
def pooled(monkeypatch):
    "`Pooled` as a `Net`."
    monkeypatch.setitem(MODELS, "pooled", lambda channels, classes, size: Pooled())
    return Net("pooled")


NORMED = Net("convnet", dict(width=4, norm="batch"))


@pytest.fixture(scope="module")
def digits(): return load("mnist5k")


@pytest.fixture(scope="module")
def odd(digits): return sample(digits, 21)


# --- a batch of one ---------------------------------------------------------------------------------------------------
def steps_of(trainer, net, data):
    seen = []
    model = trainer(net, data, 0, "cpu", watch=lambda step: seen.append(len(step.rows)))
    assert all(p.isfinite().all() for p in model.parameters())
    return seen


def test_the_last_image_joins_the_batch_before_it(odd, pooled):
    assert steps_of(Trainer(epochs=2, batch=10), pooled, odd) == [10, 11] * 2
    assert steps_of(Trainer(epochs=1, batch=7), pooled, odd) == [7, 7, 7]
    assert steps_of(Trainer(epochs=1, batch=20), pooled, odd) == [21]


def test_resnet18_trains_on_51_images_in_batches_of_50(digits):
    assert steps_of(Trainer(epochs=1), Net("resnet18"), sample(digits, 51)) == [51]


def test_a_network_that_can_is_shown_one_image_as_ever(odd):
    for net in (NORMED, Net("mlp")): assert steps_of(Trainer(epochs=1, batch=10), net, odd) == [10, 10, 1]


def test_batches_of_one_are_refused_where_nothing_can_be_joined(odd, pooled):
    def refused(told, data, **settings):
        with pytest.raises(BadArgument, match=told): Trainer(**settings)(pooled, data, 0, "cpu", watch=refuse)
    refused("got batch=1$", odd, batch=1)
    refused("cannot be trained on one image, and mnist5k has no more", odd.subset([0]))
    own = Compressed(odd.x, odd.y, odd.classes, odd.name, schedule={"batches": [[0, 1], [2]]})
    refused("schedule of mnist5k has batches of one image", own)


def refuse(step): raise AssertionError("the work had begun")


class Refuses(list):
    append = staticmethod(refuse)


def test_signals_and_experts_count_epochs_of_joined_batches(odd, pooled, tmp_path):
    assert signals(odd, Proxy(pooled, Trainer(epochs=3, batch=10)), device="cpu", keep=False).epochs == 3
    paths = Experts(n=1, epochs=3, batch=10, augment="")(pooled, odd, folder=tmp_path, device="cpu")
    assert paths.read(0, range(4)).shape[0] == 4


def test_asking_whether_one_image_will_do_changes_nothing(odd, pooled):
    model, x = pooled(odd), odd.images()[:1]
    model.train().model.features[2].eval()
    before, random = [m.training for m in model.modules()], torch.get_rng_state()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert not takes_one(model, x) and takes_one(NORMED(odd), x)
    assert [m.training for m in model.modules()] == before and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


DISTILLERS = {
    "dc": GradientMatching(iterations=1, outer=1, batch_real=2),
    "dsa": GradientMatching(iterations=1, outer=2, inner=1, batch_real=2, augment="crop", init="real"),
    "guard": GradientMatching(iterations=1, outer=1, batch_real=2, real_objective=Curvature(.1)),
    "dm": DistributionMatching(iterations=1, batch_real=2),
    "dd": BackpropThroughTraining(iterations=1, epochs=1, batch_real=10),
    "tm": TrajectoryMatching(iterations=1, student_steps=2, expert_epochs=1, max_start=1,
                             experts=Experts(n=1, epochs=1))}


@pytest.mark.parametrize("name, budget, told", [
    ("dc", dict(ipc=1), "a class of one image would show the network one image"),
    ("dsa", dict(total=11), "a class of one image"), ("guard", dict(ipc=1), "a class of one image"),
    ("dm", dict(ipc=1), "a class of one image"), ("dd", dict(total=11), "a step of the walk would show")])
def test_distillers_refuse_batches_of_one_before_the_work(digits, pooled, name, budget, told):
    distiller = replace(DISTILLERS[name], net=pooled)
    with pytest.raises(BadArgument, match=told): distiller.compress(digits, device="cpu", log=Refuses(), **budget)


@pytest.mark.parametrize("name, change, told", [
    ("dc", dict(batch_real=1), "batch_real=1 would show"), ("dm", dict(batch_real=1), "batch_real=1"),
    ("dd", dict(batch_real=1), "batch_real=1"), ("dsa", dict(batch_net=19), "batch_net=19 would show"),
    ("tm", dict(batch_syn=19), "batch_syn=19 would show")])
def test_settings_that_make_batches_of_one_are_named(digits, pooled, name, change, told):
    distiller = replace(DISTILLERS[name], net=pooled, **change)
    with pytest.raises(BadArgument, match=f"^{told}"): distiller.compress(digits, ipc=2, device="cpu", log=Refuses())


@pytest.mark.parametrize("name", DISTILLERS)
def test_distillers_of_two_images_a_class_or_with_maps_that_stay_larger_work(digits, pooled, name):
    for net, ipc in ((pooled, 2), (NORMED, 1)):
        if name == "tm" and ipc == 2: continue
        made = replace(DISTILLERS[name], net=net).compress(sample(digits, 60), ipc=ipc, device="cpu")
        assert made.x.isfinite().all()


# --- diverged ---------------------------------------------------------------------------------------------------------
def test_a_loss_that_is_no_number_is_seen_within_fifty_steps(odd):
    log = []
    with pytest.raises(BadArgument, match="the loss is nan after 50 steps with lr=1e"):
        Trainer(lr=1e30, steps=2000)(Net("mlp"), odd, 0, "cpu", watch=log.append)
    assert len(log) == 50
    with pytest.raises(BadArgument, match="after 7 steps"): Trainer(lr=1e30, steps=7)(Net("mlp"), odd, 0, "cpu")


# --- modes ------------------------------------------------------------------------------------------------------------
def test_embedded_gives_every_module_its_mode_back(digits):
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Dropout()).train()
    net[1].eval()
    before = [m.training for m in net.modules()]
    assert before == [True, True, False, True]
    space_of(digits.x[:8], embed=net)
    assert [m.training for m in net.modules()] == before
    with pytest.raises(RuntimeError): embedded(torch.rand(8, 5), net)
    assert [m.training for m in net.modules()] == before


# --- losses that may be split -----------------------------------------------------------------------------------------
LOSSES = [Standard(), Adversarial(PGD(Linf(.1), 2)), Curvature(.1), GradientPenalty(.1),
          GradientPenalty(.01, norm=1, h=.1), Trades(Linf(.1), steps=2), Mart(PGD(Linf(.1), 2)), Noisy(.2),
          Noisy(.2, Curvature(.1)), CertifiedTraining(Linf(.01), warmup=0), CertifiedTraining(L2(.05), beta=1.)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda o: repr(o)[:40])
def test_the_gradient_in_parts_is_that_of_the_whole(digits, loss):
    "What DC matches: the same, up to rounding, however the real batch is split."
    assert loss.per_image and not Noisy(.2, Curvature(variant="authors_cifar")).per_image
    net = Net("convnet", dict(width=4, norm="none"))
    model, x = net(digits).train(), digits.images()[:12]
    weights = [p for p in model.parameters() if p.dim() > 1]

    def gradient(chunk):
        dc = GradientMatching(batch_real=12, chunk=chunk, net=net, real_objective=loss)
        sizes = []
        class Counted:
            per_image = True
            def __call__(self, model, x, *rest):
                sizes.append(len(x))
                return loss(model, x, *rest)
        return sizes, replace(dc, real_objective=Counted())._real_gradient(model, weights, x, 3, generator_of(0))
    (parts, split), (one, whole) = gradient(5), gradient(12)
    assert (parts, one) == ([5, 5, 2], [12])
    for a, b in zip(split, whole): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(b.abs().max()) + 1e-9)


ONE_EACH = [GradientPenalty(.1), Trades(Linf(.1), steps=2), Mart(PGD(Linf(.1), 2)), Noisy(.2)]


@pytest.mark.parametrize("loss", ONE_EACH, ids=lambda o: type(o).__name__)
def test_dc_splits_its_real_batch_but_not_with_batch_norm(digits, loss):
    hundred = sample(digits, 100)
    for net, parts in ((Net("convnet", dict(width=4, norm="none")), 3), (NORMED, 1)):
        sizes = []
        class Counted(type(loss)):
            def __call__(self, model, x, *rest):
                sizes.append(len(x))
                return super().__call__(model, x, *rest)
        counted = Counted(*(getattr(loss, f.name) for f in fields(loss)))
        dc = GradientMatching(iterations=1, outer=1, batch_real=10, chunk=4, net=net, real_objective=counted)
        dc.compress(hundred, ipc=1, device="cpu")
        assert sizes == ([4, 4, 2] if parts == 3 else [10]) * 10


# --- radii of bytes ---------------------------------------------------------------------------------------------------
def test_a_radius_of_bytes_is_said_once():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for eps in (8, 8., 255): replace(CertifiedTraining(Linf(eps)), kappa=.4).at(250)
        threat_of("linf:8"), threat_of("l2:3"), L2(14.), threat_of("linf:1")
    told = "an eps this large reaches every image: radii are in pixels of [0, 1]; 8/255 = .0314"
    assert [str(w.message) for w in said] == [told]
    with pytest.warns(UserWarning, match="radii are in pixels of"): threat_of("l2:128")
