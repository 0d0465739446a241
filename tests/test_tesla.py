"TESLA: its gradient and the labels of experts, against a restatement; what is too wide for the notebooks."
from dataclasses import replace
import pytest
import torch
from conftest import Stopped
import torch.nn.functional as F
from torch.nn.utils import vector_to_parameters
from rdd_lib.augmentation import Scale
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, describe, generator_of
from rdd_lib.data import DATASETS, load, of_classes, sample
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.synthetic import State
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import Net
from rdd_lib.training.unrolled import flatten, functional

NET = Net("convnet", dict(width=4, depth=2))
TESLA = TrajectoryMatching(iterations=3, lr=100., lr_alpha=1e-3, alpha=.05, student_steps=4, expert_epochs=1,
                           max_start=2, net=NET, experts=Experts(n=2, lr=.05, batch=50), gradient="tesla")
KINDS = {"hard": dict(labels="hard"), "expert": dict(labels="expert"), "learned": dict(labels="learned", lr_label=1.),
         "said nothing": dict(), "rate only": dict(lr_label=1.)}


@pytest.fixture(scope="module")
def digits(): return sample(load("mnist5k"), 200)


@pytest.fixture(scope="module")
def buffers(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    TESLA.experts(NET, digits, 2, folder, "cpu")
    return folder


# --- one iteration, written out ---------------------------------------------------------------------------------------

class Doubled:
    "Experts in float64."
    def __init__(self, trajectories): self.of = trajectories
    def __len__(self): return len(self.of)
    def read(self, *args): return self.of.read(*args).double()


def state_of(tm, data, buffers):
    "What the method works on, all of it in float64: ten images, their labels' logits, the rate, experts, network."
    u = Scale(data, torch.device("cpu")).normalise(data.subset(torch.stack([i[0] for i in data.per_class])).images())
    s = State(u.double(), torch.arange(10), None, 10, tm.lr_label > 0, alpha=torch.tensor(tm.alpha).double())
    for leaf in s.leaves.values(): leaf.data = leaf.data.double()
    trajectories, model, _ = tm.prepare(s, data, 0, torch.device("cpu"), buffers)
    model.double()
    s.prepared = Doubled(trajectories), model, functional(model)
    return s


def by_hand(tm, s, g):
    "The loss and its gradients, from the formulas: v stays as it is (TESLA) or is turned by each step (exact)."
    trajectories, model, _ = s.prepared
    expert, epoch = (int(torch.randint(n, (), generator=g)) for n in (len(trajectories), tm.max_start))
    start, target = trajectories.read(expert, (epoch, epoch + 1))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    def net(theta, x):
        parts = zip(shapes.items(), theta.split([shape.numel() for shape in shapes.values()]))
        return torch.func.functional_call(model, {name: p.view(shape) for (name, shape), p in parts}, (x,))
    labels = {"learned": lambda: s.leaves["labels"].detach(), "hard": lambda: None,
              "expert": lambda: net(target, s.u.detach()).detach()}[tm.labels]()
    def slope(theta, u, logits):
        q = F.one_hot(s.y, 10).double() if logits is None else logits.softmax(1)
        loss = -(q * net(theta, u).log_softmax(1)).sum(1).mean()
        return torch.autograd.grad(loss, theta, create_graph=True)[0]
    path, alpha = [start], s.leaves["alpha"].item()
    for _ in range(tm.student_steps):
        path.append((path[-1] - alpha * slope(path[-1].clone().requires_grad_(), s.u.detach(), labels)).detach())
    scale = (start - target).square().sum()
    v, found = 2 * (path[-1] - target) / scale, {name: 0. for name in s.leaves}
    for theta in reversed(path[:-1]):
        theta, u = theta.clone().requires_grad_(), s.u.detach().clone().requires_grad_()
        q = labels if labels is None else labels.clone().requires_grad_()
        g_t = slope(theta, u, q)
        d_theta, d_u, *d_q = torch.autograd.grad(g_t, [theta, u] + [q] * (tm.labels == "learned"), v)
        found["u"] -= alpha * d_u
        found["alpha"] -= g_t.detach() @ v
        if d_q: found["labels"] -= alpha * d_q[0]
        if tm.gradient != "tesla": v = v - alpha * d_theta
    return (path[-1] - target).square().sum() / scale, found


@pytest.mark.parametrize("gradient", ["tesla", "recompute", "graph"])
@pytest.mark.parametrize("labels", ["hard", "expert", "learned"])
def test_one_iteration_is_what_the_formulas_say(digits, buffers, labels, gradient):
    tm = replace(TESLA, gradient=gradient, augment="", **KINDS[labels])
    s = state_of(tm, digits, buffers)
    (value,), = tm.steps(s, None, digits, generator_of(3))
    value.backward()
    loss, slopes = by_hand(tm, s, generator_of(3))
    torch.testing.assert_close(value.detach(), loss, rtol=1e-10, atol=0)
    for name, leaf in s.leaves.items():
        assert leaf.grad.abs().max() > 0
        torch.testing.assert_close(leaf.grad, slopes[name], rtol=1e-6, atol=1e-6 * leaf.grad.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_of_tesla_is_exact(digits, buffers, kind):
    one = replace(TESLA, student_steps=1, **KINDS[kind])
    run = dict(ipc=2, device="cpu", buffers=buffers)
    a, b = (replace(one, gradient=gradient).compress(digits, **run) for gradient in ("tesla", "recompute"))
    torch.testing.assert_close(a.x, b.x, atol=1e-6, rtol=0)
    assert a.schedule["lr"] == pytest.approx(b.schedule["lr"], rel=1e-6)
    if a.soft_labels is not None: torch.testing.assert_close(a.soft_labels, b.soft_labels, atol=1e-6, rtol=0)


def test_several_steps_of_tesla_are_not(digits, buffers):
    run = dict(ipc=2, device="cpu", buffers=buffers)
    a, b = (replace(TESLA, gradient=gradient).compress(digits, **run) for gradient in ("tesla", "recompute"))
    assert (a.x - b.x).abs().max() > 1e-4


# --- labels -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings", [dict(), dict(iterations=1), dict(augment=""), dict(batch_syn=3),
                                      dict(init="noise"), dict(gradient="recompute")], ids=repr)
def test_labels_are_the_mean_of_all_experts_on_the_final_images(digits, buffers, settings):
    tm = replace(TESLA, labels="expert", **settings)
    S = tm.compress(digits, ipc=2, device="cpu", buffers=buffers)
    trajectories, net, said = TESLA.experts(NET, digits, 2, buffers, "cpu"), NET(digits, 0).eval(), 0.
    for k in range(2):
        vector_to_parameters(trajectories.read(k, [tm.last_epoch])[0], net.parameters())
        with torch.no_grad(): said = said + net(S.images()).softmax(1) / 2
    torch.testing.assert_close(S.soft_labels, said, atol=1e-5, rtol=0)
    torch.testing.assert_close(S.soft_labels.sum(1), torch.ones(20), atol=1e-6, rtol=0)
    assert not S.soft_labels.requires_grad
    again = tm.compress(digits, ipc=2, device="cpu", buffers=buffers)
    assert again.x.equal(S.x) and again.soft_labels.equal(S.soft_labels)


def test_labels_follow_the_rate_unless_said(digits, buffers):
    made = {kind: replace(TESLA, **settings).compress(digits, ipc=1, device="cpu", buffers=buffers)
            for kind, settings in KINDS.items()}
    assert made["said nothing"].x.equal(made["hard"].x) and made["hard"].soft_labels is None
    assert made["rate only"].soft_labels.equal(made["learned"].soft_labels)
    assert "labels" not in describe(TESLA) and describe(replace(TESLA, labels="expert"))["labels"] == "expert"


@pytest.mark.parametrize("stop", [1, 4])
@pytest.mark.parametrize("kind", ["hard", "expert", "learned"])
def test_resumed_run_ends_in_the_same_bytes(digits, buffers, tmp_path, kind, stop):
    tm = replace(TESLA, iterations=5, batch_syn=7, **KINDS[kind])
    run, path = dict(ipc=2, device="cpu", buffers=buffers), tmp_path / "run.safetensors"
    whole = tm.compress(digits, **run)
    with pytest.raises(KeyboardInterrupt): tm.compress(digits, **run, checkpoint=path, every=1, log=Stopped(stop))
    again = tm.compress(digits, **run, checkpoint=path, every=1)
    assert again.x.equal(whole.x) and again.schedule == whole.schedule
    assert (again.soft_labels is None) == (whole.soft_labels is None) == (kind == "hard")
    if kind != "hard": assert again.soft_labels.equal(whole.soft_labels)


# --- what cannot be ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("settings,says", [
    (dict(labels="soft"), "labels must be 'hard', 'expert', 'learned' or 'logits', got 'soft'"),
    (dict(labels="hard", lr_label=1.), "labels='hard' and lr_label=1.0 do not go together"),
    (dict(labels="expert", lr_label=1.), "labels='expert' and lr_label=1.0 do not go together"),
    (dict(labels="learned"), "labels='learned' and lr_label=0.0 do not go together")])
def test_contradictions(settings, says):
    with pytest.raises(BadArgument, match=says): replace(TESLA, **settings)


@pytest.mark.parametrize("other,says", [
    (lambda d: sample(load("mnist5k"), 100), "data.images is 200 there and 100 here"),
    (lambda d: sample(load("mnist5k"), 200, 1), "data.fingerprint is"),
    (lambda d: of_classes(d, 7), "holds another expert")])
def test_labels_of_experts_of_other_data_are_refused(digits, buffers, other, says):
    tm = replace(TESLA, labels="expert")
    with pytest.raises(BadArgument, match=says): tm.compress(other(digits), ipc=1, device="cpu", buffers=buffers)


def test_statistics_that_are_not_kept_are_refused_before_experts_are_trained(digits, tmp_path):
    tm = replace(TESLA, labels="expert", net=Net("convnet", dict(width=4, norm="batch")))
    with pytest.raises(BadArgument, match="their path keeps no running statistics"):
        tm.compress(digits, ipc=2, device="cpu", buffers=tmp_path)
    assert not [*tmp_path.iterdir()]


# --- by name ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("ipc", [1, 10, 50, None])
def test_presets_build_and_describe(data, ipc):
    like = "tm_zca" if (data, ipc) == ("cifar100", 50) else "tm"         # the one row that is whitened
    tesla, tm = (find_method(name).build(data, ipc) for name in ("tesla", like))
    assert tesla.gradient == "tesla" and describe(tesla)
    assert tesla.labels == ("expert" if data == "imagenet" else None)
    own = data in ("imagenet", "mnist5k") or (data, ipc) == ("cifar10", 1)
    assert (tesla == replace(tm, gradient="tesla", iterations=10_000)) != own
    soft = find_method("trajectory_matching_first_order").build(data, ipc, labels="expert")
    assert soft == replace(tesla, labels="expert")


def test_the_network_that_is_asked_is_left_as_it_was(digits, buffers):
    tm = replace(TESLA, labels="expert")
    s = state_of(tm, digits, buffers)
    _, model, _ = s.prepared
    before = flatten(model)
    tm.finish(s)
    assert model.training and flatten(model).equal(before)
