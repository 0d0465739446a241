"""GUARD as a composition: what it shares with DC, the networks and settings it must survive, and what it refuses."""
from dataclasses import replace
import pytest
import torch
from rdd_lib.augmentation import Scale
from rdd_lib.compressor import find_method, methods
from rdd_lib.compressed import save
from rdd_lib.core import BadArgument, UnknownName, generator_of
from rdd_lib.data import load, sample
from rdd_lib.distill.gradient import GradientMatching
from rdd_lib.distill.synthetic import RealBatches
from rdd_lib.models import Net
from rdd_lib.training.curvature import Curvature, VARIANTS
from rdd_lib.training.objectives import Standard


@pytest.fixture(scope="module")
def digits(): return sample(load("mnist5k"), 300)


def tiny(objective=Standard(), norm="instance", **settings):
    net = Net("convnet", dict(width=4, norm=norm))
    return GradientMatching(**dict(iterations=2, batch_real=12, net=net, real_objective=objective) | settings)


def run(distiller, data, ipc=1, **kw): return distiller.compress(data, ipc=ipc, device="cpu", **kw)


@pytest.mark.parametrize("norm", ["instance", "batch", "none"])
@pytest.mark.parametrize("augment", ["", "color_crop_cutout_flip_scale_rotate"])
def test_lambda_zero_is_dc(digits, norm, augment):
    "With the whole batch in one part the loss is DC's very own; only its order of summation may differ."
    a, b = (run(tiny(o, norm, augment=augment, chunk=12), digits) for o in (Standard(), Curvature(0.)))
    assert (a.x - b.x).abs().max() < 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("augment", ["", "crop_scale"])
def test_every_variant_composes_and_repeats(digits, variant, norm, augment):
    distiller, log = tiny(Curvature(1., 1.5, variant), norm, augment=augment), []
    a = run(distiller, digits, log=log)
    assert torch.equal(a.x, run(distiller, digits).x)
    assert 0 <= a.x.min() and a.x.max() <= 1 and all(v > 0 for v in log)
    assert not torch.equal(a.x, run(tiny(augment=augment, norm=norm), digits).x)          # it is not DC


@pytest.mark.parametrize("variant", VARIANTS)
def test_split_batches(digits, variant):
    """The paper's penalty is a mean over images, so parts change nothing;
    the authors' two are given the whole batch whatever `chunk` says."""
    a, b = (run(tiny(Curvature(1., 1.5, variant), chunk=k), digits).x for k in (3, 12))
    assert torch.allclose(a, b, atol=1e-4)
    assert torch.equal(a, b) or variant == "paper"


class Counting:
    "Curvature that notes the sizes of what it is given, and the mode."
    per_image = True
    def __init__(self): self.seen = []
    def __call__(self, model, x, y, w=None, generator=None):
        self.seen.append((len(x), model.training))
        return Curvature()(model, x, y, w, generator)


@pytest.mark.parametrize("norm,sizes", [("instance", [5, 5, 2]), ("batch", [12])])
def test_batch_norm_sees_the_whole_batch_in_train_mode(digits, norm, sizes):
    objective = Counting()
    distiller = tiny(objective, norm, chunk=5)
    net, g = distiller.net(digits, 0).train(), generator_of(0)
    weights, scale = [p for p in net.parameters() if p.dim() > 1], Scale(digits)
    x = scale.raw(RealBatches(digits, scale)(3, 12, g))
    distiller._real_gradient(net, weights, x, 3, g)
    assert objective.seen == [(n, True) for n in sizes]
    assert all(m.training for m in net.modules())                       # the search's eval mode was given back


def test_real_gradient_is_the_objectives(digits):
    distiller, scale = tiny(Curvature(2., 1.5), chunk=5), Scale(digits)
    net = distiller.net(digits, 0).train()
    weights = [p for p in net.parameters() if p.dim() > 1]
    x = scale.raw(RealBatches(digits, scale)(7, 12, generator_of(1)))
    whole = torch.autograd.grad(Curvature(2., 1.5)(net, x, torch.full((12,), 7)), weights)
    parts = distiller._real_gradient(net, weights, x, 7, generator_of(0))
    for a, b in zip(parts, whole): assert torch.allclose(a, b, atol=1e-6, rtol=1e-3)
    assert all(p.grad is None for p in net.parameters())


def test_networks_are_the_same_as_dcs(digits):
    """The penalty draws nothing: first losses differ only by what is matched,
    and start images, networks and batches are DC's."""
    logs = [], []
    first = {}, {}
    for o, log, pictures in zip((Standard(), Curvature(1e-9)), logs, first):
        run(tiny(o), digits, log=log, snapshots=pictures)
    assert torch.equal(first[0][0], first[1][0])
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_ten_images_a_class_train_networks_in_between(digits):
    distiller, log = tiny(Curvature(.3), outer=3, inner=2), []
    made = run(distiller, digits, ipc=3, log=log)
    assert len(made) == 30 and len(log) == 6
    assert torch.equal(made.x, run(distiller, digits, ipc=3).x)


def test_resumes_to_the_same_bytes(digits, tmp_path):
    class Stop(Exception): pass
    whole = run(tiny(Curvature(.3), iterations=4), digits)

    class Breaks(dict):
        def __setitem__(self, it, x):
            if it == 2: raise Stop
            super().__setitem__(it, x)
    path = tmp_path / "run.safetensors"
    four = tiny(Curvature(.3), iterations=4)
    with pytest.raises(Stop): run(four, digits, checkpoint=path, every=1, snapshots=Breaks())
    assert path.exists()
    again = run(four, digits, checkpoint=path, every=1)
    assert torch.equal(again.x, whole.x) and path.exists()
    save(again, tmp_path / "result.safetensors")
    assert not path.exists()


@pytest.mark.parametrize("data", ["mnist", "cifar10"])
@pytest.mark.parametrize("ipc", [1, 10, 50])
def test_preset_is_dc_with_another_word(data, ipc):
    guard, dc, dsa, both = (find_method(n).build(data, ipc) for n in ("guard", "dc", "dsa", "guard_dsa"))
    assert replace(guard, real_objective=Standard()) == dc
    assert replace(both, real_objective=Standard()) == dsa
    assert guard.real_objective == both.real_objective and guard.real_objective.variant == "paper"
    early = (1000, 256, .1, .01)                          # early paper, section 7.1
    assert (guard.iterations, guard.batch_real, guard.lr, guard.lr_net) == early
    assert {"gradient_matching_curvature", "gradient_matching_augmented_curvature"} <= set(methods())


def test_provenance_names_lambda_and_h(digits):
    settings = dict(iterations=1, batch_real=8, net=Net("convnet", dict(width=4))) | {"real_objective.h": "3"}
    made = run(find_method("guard").build("mnist5k", 1, **settings), digits)
    said = made.provenance["method"]["real_objective"]
    assert said["is"] == "Curvature" and said["h"] == 3. and said["lam"] == 1.


@pytest.mark.parametrize("settings,error", [
    ({"real_objective.lam": -1.}, BadArgument), ({"real_objective.h": 0.}, BadArgument),
    ({"real_objective.variant": "cifar"}, UnknownName), ({"real_objective.lambda": 1.}, UnknownName),
    ({"real_objective.lam": "much"}, BadArgument), ({"iterations": 0}, BadArgument)])
def test_bad_settings(settings, error):
    with pytest.raises(error): find_method("guard").build("mnist", 1, **settings)


def test_nan_stops_the_run(digits):
    with pytest.raises(BadArgument, match="the loss is nan"): run(tiny(Curvature(float("inf"))), digits)
