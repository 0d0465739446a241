"""Every public flow once on a GPU, with the CPU's result. Where there is none it is pretended (see tests/pretend_gpu),
and results are equal to the bit."""
import dataclasses
import math
import pickle
from dataclasses import replace
from types import SimpleNamespace
import numpy as np
import pretend_gpu
import pytest
import torch
from torch import nn
from typer.testing import CliRunner
from rdd_lib import models
from rdd_lib.compressor import find_method, methods
from rdd_lib.published import load_compressed
from rdd_lib.compressed import save
from rdd_lib.core import BadArgument, NoDevice, device_of, generator_of
from rdd_lib.models import batch_of, seeded
from rdd_lib.coresets.random import Random
from rdd_lib.coresets.covering import verify_coreset
from rdd_lib.coresets.signals import Proxy, signals
from rdd_lib.covering.certificate import verify_certificate
from rdd_lib.covering.distances import embedded, nearest
from rdd_lib.covering.guarantee import linear_robust, corollary1, separation
from rdd_lib.covering.k_center import gonzalez, k_mcs
from rdd_lib.covering.relaxed import relaxed_hausdorff, relaxed_mcs
from rdd_lib.covering.set_cover import eta_mcs
from rdd_lib.data import ImageSet, load, sample, show_images
from rdd_lib.distill.experts import Experts
from rdd_lib.training.unrolled import flatten, functional, unroll
from rdd_lib.models import Net, build, statistics
from rdd_lib.reproduce import executors, pools
from rdd_lib.reproduce.jobs import Job
from rdd_lib.reproduce.orders import Orders
from rdd_lib.cli import app
from rdd_lib.reproduce.guard import Condensed, robustness, three_attacks
from rdd_lib.reproduce.proposition1 import bound_terms
from rdd_lib.reproduce.mcs import TwoNorms, three_scores
from rdd_lib.reproduce.cells import Protocol, score
from rdd_lib.reproduce.store import device_used
from rdd_lib.attacks.pgd import APGD, PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.walk import ATTACKS
from rdd_lib.attacks.autoattack import attack_of
from rdd_lib.attacks.carlini_wagner import CW
from rdd_lib.certificates.certificate import METHODS, certify, logit_bounds, margin_bounds
from rdd_lib.evaluation.sandwich import sandwich
from rdd_lib.training.curvature import Curvature
from rdd_lib.evaluation.checks import Effort
from rdd_lib.evaluation.diagnostics import diagnose, eps_sweep
from rdd_lib.evaluation.many import evaluate_many
from rdd_lib.evaluation.outcome import evaluate, rob_score, std_score
from rdd_lib.exports import export
from rdd_lib.attacks.fab import boundary_distance
from rdd_lib.evaluation.landscape import curvature_of, loss_surface
from rdd_lib.training.cost import cost, slowdown
from rdd_lib.training.certified import Noisy
from rdd_lib.certificates.smoothing import Smoothed
from rdd_lib.evaluation.sandwich import sandwich_smoothed
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.objectives import OBJECTIVES, objective_of
from rdd_lib.training.squeeze import Squeeze
from rdd_lib.training.trainer import Trainer

NET = Net("convnet", dict(width=4, depth=2))
PROXY = Proxy(NET, Trainer(epochs=2, lr=.05, batch=16))


# ---- what "the same" means ------------------------------------------------------------------------------------------

def agree(here, there, close: float = 0.):
    """`there` is what `here` is: to the bit, or within `close`, where the GPU is pretended. A real one adds up in
    another order and draws otherwise: there it is held to kinds, shapes and the size of the numbers."""
    assert type(here) is type(there) or {type(here), type(there)} <= {int, float}
    if torch.is_tensor(here): return _agree(here.detach(), there.detach().cpu(), close)
    if isinstance(here, np.ndarray): return agree(torch.from_numpy(here), torch.from_numpy(there), close)
    if dataclasses.is_dataclass(here): return agree(_fields(here), _fields(there), close)
    if isinstance(here, dict):
        assert here.keys() == there.keys()
        return [agree(here[k], there[k], close) for k in here]
    if isinstance(here, (list, tuple)):
        assert len(here) == len(there) or not pretend_gpu.pretended()
        return [agree(a, b, close) for a, b in zip(here, there)]
    if isinstance(here, float): return _agree(torch.tensor(here), torch.tensor(float(there)), close)
    assert here == there or not pretend_gpu.pretended(), f"{here!r} is {there!r} on the GPU"

def _fields(o): return {f.name: getattr(o, f.name) for f in dataclasses.fields(o) if f.name != "provenance"}

def _agree(a, b, close):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if pretend_gpu.pretended(): return torch.testing.assert_close(b, a, rtol=close, atol=close, equal_nan=True)
    if not a.is_floating_point() or not a.numel(): return None
    a, b = (t.double().nan_to_num(0., 0., 0.) for t in (a, b))
    assert (a - b).abs().mean() <= .5 * a.abs().mean() + .1

def check(run, gpu, close: float = 0.):
    "`run(device)` on the CPU and on the GPU."
    there = run(gpu)
    agree(run("cpu"), there, close)
    return there


# ---- what the flows work on -----------------------------------------------------------------------------------------

def three_classes(split, n):
    data = load("mnist5k", split)
    few = data.y < 3
    x = nn.functional.avg_pool2d(data.x[few, :, 2:26, 2:26].float(), 3).byte()           # 8x8 pixels
    return sample(ImageSet(x, data.y[few], data.classes[:3], data.name, split), n, seed=1)

@pytest.fixture(scope="module")
def train(): return three_classes("train", 60)

@pytest.fixture(scope="module")
def test(): return three_classes("test", 18)

@pytest.fixture(scope="module")
def weights(train): return Trainer(steps=30, lr=.1, batch=20)(NET, train, device="cpu").state_dict()

@pytest.fixture
def model(train, weights):
    made = NET(train)
    made.load_state_dict(weights)
    return made

@pytest.fixture
def digits(monkeypatch, train, test):
    "What the papers' cells and the shell load: the few images above."
    sets = {"train": train, "test": test}
    few = SimpleNamespace(name="mnist5k", load=lambda split, *part: sets[split])
    monkeypatch.setattr("rdd_lib.data.data_set", lambda name, *how: few)
    for place in ("rdd_lib.data.load", "rdd_lib.reproduce.cells.dataset", "rdd_lib.reproduce.proposition1.dataset"):
        monkeypatch.setattr(place, lambda name, split="train", *part, **how: sets[split])

def moved(data, device): return replace(data, x=data.x.to(device), y=data.y.to(device))


# ---- data -----------------------------------------------------------------------------------------------------------

def test_a_set_of_gpu_tensors_is_the_set(gpu, train):
    data = moved(train, gpu)
    assert data.fingerprint == train.fingerprint and data.images(gpu).is_cuda
    agree(train.per_class, data.per_class)
    assert all(not rows.is_cuda for rows in data.per_class)
    for part in (lambda d: d.subset([3, 5]), lambda d: d.subset(torch.tensor([3, 5]).to(gpu)), lambda d: sample(d, 9)):
        agree(part(train), part(data))
    agree(statistics(train), statistics(data))
    show_images(data.x[:2])
    with pytest.raises(BadArgument, match="x and y must be on one device, got cuda:0 and cpu"): replace(data, y=train.y)


def test_flows_on_a_set_of_gpu_tensors(gpu, train, test, model, tmp_path):
    data = moved(train, gpu)
    for device in ("cpu", gpu):
        agree(evaluate(model, test, PGD(Linf(.1), 3), device="cpu").table().to_dict("list"),
              evaluate(model, moved(test, gpu), PGD(Linf(.1), 3), device=device).table().to_dict("list"))
        plain, there = (Trainer(steps=3)(NET, d, device=device).cpu().state_dict() for d in (train, data))
        agree(plain, there)
    agree(signals(train, PROXY, None, "cpu", keep=False), signals(data, PROXY, None, gpu, keep=False))
    for name in ("random", "mcs", "herding", "gradmatch", "glister", "craig", "dm"):
        method = small(name)
        a, b = (method.compress(d, ipc=2, device=gpu) for d in (train, data))
        agree(a, b)
        read = load_compressed(save(b, tmp_path / name))
        agree(a, read)
    verify_coreset(small("mcs").compress(data, ipc=2, device="cpu"), train, gpu)
    verify_coreset(small("mcs").compress(train, ipc=2, device="cpu"), data, gpu)
    export(b, "pt", tmp_path / "b.pt")
    export(b, "folder", tmp_path / "b")
    agree(replace(b, x=b.x.cpu(), y=b.y.cpu()).show().get_size_inches(), b.show().get_size_inches())


# ---- training -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", OBJECTIVES)
def test_training(gpu, train, name):
    objective = objective_of(name, Linf(.1), .05 if name == "generalized" else None)
    check(lambda d: Trainer(objective, steps=4, lr=.05)(NET, train, device=d).cpu().state_dict(), gpu)


SETTINGS = {"augmented": dict(augment="color_crop_cutout_flip_scale_rotate"), "channels last": dict(channels_last=True),
            "noisy": dict(objective=Noisy(.2)), "cosine": dict(schedule="cosine", nesterov=True),
            "l2": dict(objective=objective_of("adversarial", L2(1.)))}

@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_training_in_other_ways(gpu, train, settings):
    def run(d):
        seen = []
        net = Trainer(steps=3, **settings)(NET, train, device=d, watch=seen.append)
        return net.cpu().state_dict(), [step.loss.item() for step in seen], [step.logits.cpu() for step in seen]
    check(run, gpu)


def test_training_in_bfloat16_runs(gpu, train):
    assert evaluate(Trainer(steps=20, lr=.05, precision="bf16")(NET, train, device=gpu), train, device=gpu).std > .5


def test_training_on_weights_and_soft_labels(gpu, train):
    made = Random().compress(train, ipc=4, device=gpu)
    soft = torch.rand(12, 3, generator=generator_of(0)).softmax(1)
    for more in (dict(weights=torch.arange(1., 13.)), dict(soft_labels=soft)):
        S = replace(made, **more)
        check(lambda d, S=S: Trainer(steps=3, batch=5)(NET, S, device=d).cpu().state_dict(), gpu)


@pytest.mark.parametrize("settings", [{}, dict(objective=objective_of("adversarial", Linf(.1), steps=3)),
                                      dict(augment="color_crop_cutout")], ids=["standard", "adversarial", "augmented"])
def test_students_side_by_side(gpu, train, test, settings):
    def run(d):
        students = Trainer(steps=3, lr=.05, batch=25, **settings).many(NET, train, (0, 1, 2), d, together=3)
        told = [evaluate_many(students, test, a, (0, 1, 2), d, together=3) for a in (None, APGD(Linf(.1), steps=4))]
        return [m.cpu().state_dict() for m in students], told
    check(run, gpu)
    assert len(Trainer(steps=1).many(NET, train, (0, 1, 2), gpu)) == 3                   # as many as pay there


def test_what_a_step_costs(gpu, train):
    x, y = train.images()[:8], train.y[:8]
    def run(d): return cost(Curvature(), NET(train).to(d), x.to(d), y.to(d))
    check(run, gpu)
    assert slowdown(Curvature(), NET(train).to(gpu), x.to(gpu), y.to(gpu), repeats=1) > 0


# ---- attacks and evaluation -----------------------------------------------------------------------------------------

def brief(name, threat):
    attack = attack_of(name, threat)
    short = dict(steps=5, queries=12, restarts=1)
    return replace(attack, **{k: v for k, v in short.items() if k in {f.name for f in dataclasses.fields(attack)}})

@pytest.mark.parametrize("threat", [Linf(.15), L2(1.5)], ids=["linf", "l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(gpu, test, model, name, threat):
    if name == "cw" and isinstance(threat, Linf): pytest.skip("cw is for l2")
    def run(d): return attack_until_broken(brief(name, threat), model.to(d), test.images(d), test.y)
    found = check(run, gpu)
    assert found.x_adv.is_cuda and found.broken.any()


@pytest.mark.parametrize("name", ["pgd", "mifgsm", "apgd-ce", "apgd-dlr", "square", "cw"])
def test_climbs(gpu, test, model, name):
    def run(d): return brief(name, L2(1.))(model.to(d), test.images(d), test.y.to(d), 3)
    check(run, gpu)


def test_evaluation(gpu, test, model, tmp_path):
    for attack in (None, brief("standard", Linf(.1))):
        def run(d, a=attack):
            outcome = evaluate(model, test, a, device=d, checkpoint=a and str(tmp_path / d))
            return replace(outcome, checkpoint=None)
        outcome = check(run, gpu)
        assert not any(t.is_cuda for t in vars(outcome).values() if torch.is_tensor(t))
        assert len(outcome.table()) == len(test) and len(outcome.per_class()) == 3
    evaluate(model, test, PGD(Linf(.1), 3), device=gpu, screen="bf16")


def test_scores_of_a_set(gpu, train, test):
    run = dict(net=NET, trainer=Trainer(steps=5, lr=.05), seeds=(0,))
    check(lambda d: std_score(train, test, device=d, **run).values, gpu)
    check(lambda d: rob_score(train, test, Linf(.1), attack=PGD(Linf(.1), 3), device=d, **run).values, gpu)


def test_distances_to_the_boundary(gpu, test, model):
    def run(d):
        x, y = test.images(d), test.y
        return boundary_distance(model.to(d), x, y, "l2", steps=4, targets=2), CW(L2(1.), steps=6).shortest(model, x, y)
    check(run, gpu)


def test_radii_and_surfaces(gpu, test, model):
    check(lambda d: eps_sweep(model, test, "linf", [.1], lambda t: PGD(t, 3), device=d).to_dict("list"), gpu)
    def run(d):
        x, y = test.images(d), test.y
        return loss_surface(model.to(d), x, y, .1, n=3), curvature_of(model, x, y, steps=4)
    surface, bend = check(run, gpu)
    repr(surface), repr(bend)


def test_diagnosis(gpu, test, model):
    effort = Effort(images=12, steps=3, more=2, restarts=1, draws=3, queries=10, radii=(.5, 1.))
    def run(d):
        other = NET(test, 1)
        return diagnose(model, test, Linf(.1), surrogate=other, effort=effort, device=d).plain()
    check(run, gpu)


class Fails(nn.Module):
    "A model whose device fails."
    def __init__(self, error):
        super().__init__()
        self.error = error

    def forward(self, x):
        if x.requires_grad: raise self.error
        return x.flatten(1)[:, :3] + nn.functional.one_hot(torch.arange(len(x)) % 3, 3).to(x)

@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: an illegal memory access"),
                                   torch.OutOfMemoryError("CUDA out of memory")], ids=["accelerator", "memory"])
def test_a_failing_device_is_no_verdict_about_the_model(test, error):
    data = replace(test, y=torch.arange(len(test)) % 3)
    with pytest.raises(type(error)): diagnose(Fails(error), data, Linf(.1), only=["zero_gradients"], device="cpu")


# ---- proofs ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("threat", [Linf(.01), L2(.1)], ids=["linf", "l2"])
@pytest.mark.parametrize("method", METHODS)
def test_certificates(gpu, test, model, method, threat):
    few = test.subset(range(4))
    check(lambda d: certify(model, few, threat, method, device=d), gpu)
    def bounds(d):
        x = few.images(d)
        logits = logit_bounds(model.to(d), x, threat, method)
        return logits, margin_bounds(model, x, few.y, threat, method)                    # labels on the CPU
    check(bounds, gpu)


def test_sandwich(gpu, test, model):
    proof = check(lambda d: sandwich(model, test, Linf(.02), PGD(Linf(.02), 3), "ibp", device=d), gpu)
    proof.table(), proof.summary()


def test_smoothing(gpu, test, model, tmp_path):
    smooth = Smoothed(model, .3, batch=40)
    few = test.subset(range(3))
    for x in (few.images(), few.images(gpu)):
        def run(d, x=x):
            path = tmp_path / f"{x.device.type} {d}"
            return smooth.certify(x, 20, 60, device=d, checkpoint=path, every=0.), smooth.predict(x, 60, device=d)
        check(run, gpu)
    check(lambda d: sandwich_smoothed(smooth, few, L2(.1), n0=10, n=30, draws=2, device=d), gpu)


# ---- coverings and coresets -----------------------------------------------------------------------------------------

ETAS = {1: 8., 2: 1.5, math.inf: .6}

@pytest.mark.parametrize("norm", ETAS)
@pytest.mark.parametrize("kind", ["bytes", "floats"])
def test_coverings(gpu, train, norm, kind):
    x = train.x if kind == "bytes" else train.images()
    where, how = dict(labels=train.y, norm=norm), dict(solver="lp")      # which gives the same points every time
    def run(d):
        at = x.to(d)
        k, e = k_mcs(at, 3, device=d, **where, **how), eta_mcs(at, ETAS[norm], device=d, **where, **how)
        return k, e, relaxed_mcs(at, 2, device=d, **where), gonzalez(at, 4, device=d, **where)
    k, e, relaxed, _ = check(run, gpu)
    k.check(x, train.y, device=gpu), e.check(x.to(gpu), train.y.to(gpu), device=gpu)
    assert verify_certificate(x, k.certificate, train.y, k=3, device=gpu) == k.certified
    def more(d):
        near = nearest(x.to(d), x[:5], norm, device=d)
        return *near, relaxed_hausdorff(x, x[:9], norm, device=d), separation(x, train.y, .1, norm, device=d)
    check(more, gpu)


def test_coverings_between_features(gpu, train, model):
    x = train.images()
    def run(d): return embedded(x, model.embed, d), k_mcs(x, 4, solver="lp", embed=model, device=d)
    check(run, gpu)
    assert embedded(x, model.cpu(), gpu).is_cuda            # a model that is elsewhere is moved
    assert embedded(x, model, "cpu").device.type == next(model.parameters()).device.type == "cpu"
    cover = k_mcs(x, 4, solver="lp", embed=model, device=gpu)
    cover.check(x, embed=model, device=gpu)


def test_inequalities_of_a_cover(gpu, train):
    two = train.subset(torch.cat(train.per_class[:2]))
    cover = k_mcs(two.x, 4, labels=two.y, device=gpu)
    w = torch.randn(64, generator=generator_of(0))
    def robust(m, x, y, radius): return linear_robust(m, torch.zeros((), device=x.device), x, 2 * y - 1, radius)
    check(lambda d: corollary1(robust, w.to(d), two.images(d), two.y.to(d), cover, .1), gpu)


def small(name):
    "A registered method at a size for tests."
    method = find_method(name).build("mnist5k", 2)
    settings = dict(proxy=PROXY, net=NET, iterations=2, batch_real=8, outer=2, inner=1, extractors=1, student_steps=3,
                    expert_epochs=1, max_start=1, epochs=1, solver="lp")
    known = {f.name for f in dataclasses.fields(method)}
    if getattr(method, "experts", None):
        objective = method.experts.objective
        if hasattr(objective, "attack"): objective = replace(objective, attack=replace(objective.attack, steps=2))
        settings["experts"] = replace(method.experts, n=1, epochs=1, batch=30, objective=objective)
        if getattr(method, "window", None): settings["window"] = (0, 1, 1, 1)
    if hasattr(method, "relabel"):                                          # batch norm, and what keeps it short
        short = Squeeze(epochs=1, lr=.01, batch=10)
        settings |= dict(net=Net("strided", dict(width=4)), squeeze=short, teacher=short, pool=8,
                         relabel=replace(method.relabel, epochs=2, batch=5, bank=method.relabel.bank and 2))
    if hasattr(method, "match_epochs"): settings |= dict(width=2, match_epochs=1, nets=(NET,), real_steps=1, judge=None,
                                                    lr=1e-7, match_lr=1e-7)      # Adam makes steps of rounding errors
    return replace(method, **{k: v for k, v in settings.items() if k in known})


@pytest.mark.parametrize("name", methods())
def test_compression(gpu, train, name, monkeypatch, tmp_path):
    def run(d):
        monkeypatch.setenv("RDD_STORE", str(tmp_path / d / "cells"))         # nothing is read that the other has kept
        made = small(name).compress(train, ipc=2, seed=1, device=d)
        assert not any(t.is_cuda for t in vars(made).values() if torch.is_tensor(t))
        return made
    twice = methods()[name].alias in ("tm", "tm_zca", "tesla", "mat", "datm", "dd", "guard", "dim")   # slopes of slopes
    check(run, gpu, 1e-5 if twice else 0.)


def test_coresets_at_adversarial_images(gpu, train):
    method = replace(small("craig"), attack=PGD(Linf(.1), 2))
    check(lambda d: method.compress(train, ipc=2, device=d), gpu)


def test_a_distiller_goes_on_from_its_checkpoint(gpu, train, tmp_path):
    class Second(list):
        def append(self, loss):
            super().append(loss)
            if len(self) == 2: raise KeyboardInterrupt
    path = tmp_path / "run.safetensors"
    for method in (replace(small("dm"), iterations=3), replace(small("dc"), precision="bf16", lr_label=1.)):
        whole = method.compress(train, ipc=1, device=gpu)
        run = dict(ipc=1, device=gpu, checkpoint=path, every=1)
        with pytest.raises(KeyboardInterrupt): method.compress(train, **run, log=Second())
        again = method.compress(train, **run, snapshots={})
        assert torch.allclose(again.x, whole.x, atol=0 if pretend_gpu.pretended() else 1e-3)
        save(again, tmp_path / "set.safetensors")
        assert not path.exists()


@pytest.mark.parametrize("method", ["recompute", "graph", "tesla"])
def test_unrolling(gpu, train, method):
    def run(d):
        net = NET(train).to(d).model
        step, y = functional(net), train.y[:6].to(d)
        u = train.images(d)[:6].requires_grad_()
        theta, lrs = flatten(net).requires_grad_(), torch.full((3,), .1, device=d, requires_grad=True)
        end = unroll(lambda at, t, x: nn.functional.cross_entropy(step(at, x), y), theta, lrs, (u,), method)
        end.square().sum().backward()
        return end, theta.grad, lrs.grad, u.grad
    check(run, gpu)


def test_experts(gpu, train, tmp_path):
    def run(d): return Experts(n=1, epochs=1, batch=30, ema=.5)(NET, train, 1, tmp_path / d, d).read(0, (0, 1), d)
    check(run, gpu)


# ---- the papers' cells and the shell --------------------------------------------------------------------------------

def test_a_cell_of_the_first_papers_table(gpu, digits):
    protocol = Protocol(NET, Trainer(steps=5), train_steps=2, attack="quick", n_test=9)
    cell = dict(data="mnist5k", method=small("mcs"), ipc=2, seed=0, protocol=protocol)
    check(lambda d: score(**cell, device=d), gpu)


def test_a_cell_of_the_first_papers_curves(gpu, digits):
    protocol = TwoNorms(NET, Trainer(steps=5), attack="quick", n_test=9)
    cell = dict(data="mnist5k", method=small("mcs"), ipc=2, seed=0, protocol=protocol, trained="l2", weighting="sum")
    check(lambda d: three_scores(**cell, device=d), gpu)


def test_a_cell_of_the_papers_on_condensation(gpu, digits):
    protocol = Condensed(NET, Trainer(steps=5), three_attacks("mnist5k"), n_test=9)
    cell = dict(data="mnist5k", method=small("dc"), ipc=2, seed=0, protocol=protocol)
    check(lambda d: robustness(**cell, device=d) | {"train_seconds": 0.}, gpu)
    terms = dict(net=NET, trainer=Trainer(steps=5), rhos=(.1,), seed=0, n_test=3, sets={"dm": small("dm")}, ipc=1)
    check(lambda d: bound_terms("mnist5k", **terms, device=d), gpu)


def shell(*words):
    done = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output.replace("cuda", "cpu")

@pytest.mark.parametrize("method", ["mcs", "dm"])
def test_the_shell(gpu, digits, tmp_path, monkeypatch, method):
    monkeypatch.chdir(tmp_path)
    settings = {"mcs": ["solver=lp"], "dm": ["iterations=2", "batch_real=8", "net.name=mlp"]}[method]
    few = [word for setting in settings for word in ("--set", setting)]
    train = ("--net", "mlp", "--set", "steps=5", "--attack", "quick", "--n-test", 9, "--certify")
    def run(d):
        said = shell("compress", method, "mnist5k", "--ipc", 2, "--device", d, "-o", f"{d}.safetensors", *few)
        scored = shell("score", f"{d}.safetensors", "--device", d, *train)
        return load_compressed(f"{d}.safetensors"), said.count("certificate verified"), scored
    check(run, gpu)


def test_the_shell_verifies_on_the_device_that_was_asked_for(gpu, digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    verify = lambda made, data, device="cpu": asked.append(device) or verify_coreset(made, data, device)
    monkeypatch.setattr("rdd_lib.coresets.covering.verify_coreset", verify)
    shell("compress", "mcs", "mnist5k", "--ipc", 2, "--set", "solver=lp", "--device", gpu, "-o", "made.safetensors")
    shell("show", "made.safetensors", "--verify", "--device", gpu)
    assert asked == [gpu, gpu]


# ---- which device ---------------------------------------------------------------------------------------------------

def test_work_on_the_cpu_starts_no_gpu(gpu, train, test, model):
    if not pretend_gpu.pretended(): pytest.skip("known for the pretend GPU only")
    with seeded(0): build("convnet", train, width=4)
    Trainer(objective_of("adversarial", Linf(.1)), steps=2)(NET, train, device="cpu")
    evaluate(model, test, APGD(Linf(.1), steps=2), device="cpu")
    diagnose(model, test, Linf(.1), effort=Effort(images=6, steps=2), only=["zero_gradients"], device="cpu")
    small("dm").compress(train, ipc=1, device="cpu")
    assert not pretend_gpu.used() and device_used() == "cpu"


def test_seeded_leaves_the_draws_of_a_gpu_in_use_as_they_were(gpu):
    torch.ones(1, device=gpu)
    before = torch.cuda.get_rng_state()
    with seeded(3): a = torch.rand(2, device=gpu)
    with seeded(3): b = torch.rand(2, device=gpu)
    assert torch.equal(a, b) and torch.equal(before, torch.cuda.get_rng_state())


def test_devices_that_there_are(gpu):
    n = torch.cuda.device_count()
    assert device_of().type == device_of("cuda").type == "cuda" and device_of(f"cuda:{n - 1}").index == n - 1
    told = f"'cuda:{n}' was asked for, but torch sees {n}, counted from 'cuda:0'"
    with pytest.raises(NoDevice, match=told): device_of(f"cuda:{n}")


@pytest.mark.parametrize("name", ["mps", "meta", "xpu", "gpu", "cuda:x", "", None])
def test_devices_that_the_library_is_not_made_for(name, train):
    with pytest.raises(BadArgument, match="device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got"): device_of(name)
    with pytest.raises(BadArgument, match="device must be 'auto'"): Random().compress(train, ipc=1, device=name)


def test_the_second_gpu_is_another(gpu, train, test):
    if torch.cuda.device_count() < 2: pytest.skip("there is one GPU")
    def run(d):
        model = Trainer(objective_of("fast", Linf(.1)), steps=2)(NET, train, device=d)
        assert next(model.parameters()).device == torch.device(d)
        smooth = Smoothed(model, .2).certify(test.images(d)[:2], 5, 9, device=d)
        dm, craig = (small(name).compress(train, ipc=1, device=d) for name in ("dm", "craig"))
        cover = k_mcs(train.x, 3, solver="lp", device=d)
        return evaluate(model, test, brief("standard", Linf(.1)), device=d), smooth, cover, dm, craig
    check(run, "cuda:1")


def test_batches_suit_the_device(gpu, test, model, monkeypatch):
    sizes = []
    class Sees(nn.Module):
        def forward(self, x):
            sizes.append(len(x))
            return model(x)
    monkeypatch.setattr(models.batch_of, "__defaults__", (4, 9, "batch"))       # instead of 250 and 500
    for device, size in (("cpu", 4), (gpu, 9)):
        model.to(device)
        evaluate(Sees(), test, None, device=device)
        attack_until_broken(PGD(Linf(.1), 1), Sees(), test.images(device), test.y)
        boundary_distance(Sees(), test.images(device), test.y, steps=1, targets=1, halvings=0)
        CW(L2(.1), steps=1).shortest(Sees(), test.images(device), test.y)
        assert max(sizes) == size
        sizes.clear()
    assert [batch_of(None, d, cpu=50, gpu=200) for d in ("cpu", gpu)] == [50, 200]


def cell(n, device="auto"): return n

def test_a_worker_for_each_gpu(gpu, monkeypatch):
    "Never one a core. A GPU that is shared has several."
    monkeypatch.setattr(executors, "cores", lambda: 16)
    monkeypatch.setattr(pools, "processes", lambda *asked: asked[:3])
    monkeypatch.setattr(pools, "check_importable", lambda fn, cell, executor: pickle.dumps(cell))
    gpus = executors.visible_gpus()
    def ask(*devices, workers=None, share=1):
        jobs = [Job.of(cell, dict(n=n, device=d)) for n in range(8) for d in devices]
        return pools.pool_for("processes", jobs, workers, orders=Orders(share=share))
    n = len(gpus)
    assert ask("cuda") == ask("auto") == (n, 16 // n, gpus) and ask("cuda", share=2)[0] == 2 * n
    assert ask("cuda:0", "cuda:1") == (2, 8, None) and ask("cuda", workers=4)[0] == 4 and ask("cpu") == (8, 2, None)


def test_what_a_cell_ran_on(gpu):
    assert device_used(device="auto") == device_used(device=gpu) == torch.cuda.get_device_name()
    assert device_used(device="cpu") == "cpu"
