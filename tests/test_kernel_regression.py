"""FRePo: an iteration restated plainly, its pool resumed to the same bytes, targets where they mean something."""
import csv
from dataclasses import replace
import pytest
import torch
from rdd_lib import Adversarial, Linf, Net, NeuralFeatureRegression, PGD, Trainer
from rdd_lib import evaluate, find_method, load, sample, save
from rdd_lib.augmentation import Scale
from rdd_lib.compressed import read_compressed
from rdd_lib.core import BadArgument, describe, generator_of, subseed
from rdd_lib.data import ImageSet
from rdd_lib.distill.kernel_regression import FREPO_NET, Lamb, frepo_settings, regression
from rdd_lib.exports import export
from rdd_lib.published import load_compressed
from rdd_lib.training.objectives import Standard
from rdd_lib.training.squares import centred, Squares

SMALL = replace(FREPO_NET, settings=FREPO_NET.settings | {"width": 4})
QUICK = NeuralFeatureRegression(5, .01, net=SMALL, batch_real=40, nets=3, updates=2, student_steps=20, student_lr=1e-3)


@pytest.fixture(scope="module")
def digits(): return sample(load("mnist5k"), 200)


def plain(method, data, ipc, seed):
    "The same run in float64, without the library's loop, pool, optimiser and kernel."
    scale = Scale(data)
    mean, std = scale.mean.double(), scale.std.double()
    g = generator_of(seed, "init")
    i = torch.cat([rows[torch.randperm(len(rows), generator=g)[:ipc]] for rows in data.per_class])
    u = ((data.images()[i].double() - mean) / std).requires_grad_()
    y = (torch.eye(10).double()[data.y[i]] - .1).requires_grad_()
    def fresh(draw):
        net = method.net(data, subseed(draw)).double().train()
        return net, torch.optim.Adam(net.parameters(), method.lr_net)
    pool = [fresh(subseed(seed, "pool", k)) for k in range(method.nets)]
    ages = [k * method.updates // method.nets for k in range(method.nets)]
    m, v = ({leaf: torch.zeros_like(leaf) for leaf in (u, y)} for _ in range(2))
    losses = []
    for it in range(method.iterations):
        g = generator_of(seed, "iteration", it)
        k = int(torch.randint(method.nets, (), generator=g))
        rows = torch.randperm(len(data), generator=g)[:method.batch_real]
        net, opt = pool[k]
        net.eval()
        f, at = net.model.embed(u), net.model.embed((data.images()[rows].double() - mean) / std).detach()
        K = f @ f.T
        solved = torch.linalg.solve(K + method.ridge * K.trace() / len(K) * torch.eye(len(K)).double(), y)
        goal = torch.eye(10).double()[data.y[rows]] - .1
        loss = .5 * ((at @ f.T @ solved - goal) ** 2).sum(1).mean()
        top = y.sort(1, descending=True).values
        loss = loss - torch.minimum(top[:, 0] - top[:, 1], torch.tensor(.1).double()).mean()
        losses.append(loss.item())
        lr = method.lr * (.1 + .45 * (1 + torch.cos(torch.tensor(it / method.iterations * torch.pi)).item()))
        for leaf, slope in zip((u, y), torch.autograd.grad(loss, (u, y))):
            m[leaf], v[leaf] = .9 * m[leaf] + .1 * slope, .999 * v[leaf] + .001 * slope ** 2
            step = m[leaf] / (1 - .9 ** (it + 1)) / ((v[leaf] / (1 - .999 ** (it + 1))).sqrt() + 1e-6)
            with torch.no_grad(): leaf -= lr * leaf.norm() / step.norm() * step
        with torch.no_grad(): u.copy_(((u * std + mean).clamp(0, 1) - mean) / std)
        rows = torch.randperm(len(u), generator=g)[:method.batch_net]
        draw = int(torch.randint(2 ** 62, (), generator=g))
        if ages[k] > method.updates: pool[k], ages[k] = fresh(draw), 0
        else:
            opt.zero_grad()
            (.5 * ((net.train().model(u.detach()[rows]) - y.detach()[rows]) ** 2).sum(1).mean()).backward()
            opt.step()
            ages[k] += 1
    return losses, (u * std + mean).detach(), y.detach()


def test_a_run_is_what_the_paper_says(digits):
    log = []
    S = QUICK.compress(digits, ipc=2, seed=3, device="cpu", log=log)
    losses, x, y = plain(QUICK, digits, 2, 3)
    assert log == pytest.approx(losses, rel=1e-4)
    assert (S.x - x).abs().mean() < 1e-4 and (S.soft_labels - y).abs().mean() < 1e-4


def test_the_gradient_is_exact(digits):
    "Against finite differences, in float64, through the network, the kernel and the solve."
    u = Scale(digits).normalise(sample(digits, 10).images()).double()[:, :, ::4, ::4]
    small = ImageSet(digits.x[:, :, ::4, ::4].contiguous(), digits.y, digits.classes, "small")
    net = Net("convnet", dict(width=2, depth=1, norm="none"))(small).double().requires_grad_(False)
    at = net.model.embed(torch.randn(6, 1, 7, 7, generator=generator_of(0)).double())
    y, goal = centred(torch.arange(3), 10).double(), centred(torch.arange(6), 10).double()
    def loss(u, y): return QUICK.loss(net.model.embed(u), y, at, goal)
    y = y + .01 * torch.randn(3, 10, generator=generator_of(1)).double()
    assert torch.autograd.gradcheck(loss, (u[:3].clone().requires_grad_(), y.requires_grad_()), atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"mirror": True, "chunk": 3}, {"learn_labels": False},
                                      {"net": replace(SMALL, whiten=.1)}], ids=str)
def test_an_interrupted_run_goes_on_to_the_same_bytes(digits, tmp_path, settings):
    method = replace(QUICK, **settings)
    whole = save(method.compress(digits, ipc=1, seed=1, device="cpu"), tmp_path / "whole.safetensors").read_bytes()
    class Stop(Exception): pass
    class Halting(list):
        def append(self, loss):
            super().append(loss)
            if len(self) == 4: raise Stop
    note = tmp_path / "note.safetensors"
    with pytest.raises(Stop):
        method.compress(digits, ipc=1, seed=1, device="cpu", checkpoint=note, every=1, log=Halting())
    assert note.exists()
    again = method.compress(digits, ipc=1, seed=1, device="cpu", checkpoint=note, every=1)
    assert save(again, tmp_path / "again.safetensors").read_bytes() == whole and not note.exists()


def test_the_global_generator_is_left_alone(digits):
    before = torch.get_rng_state()
    QUICK.compress(digits, ipc=1, device="cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_classes_in_another_order_give_the_same_regression():
    g = generator_of(0)
    f, at = torch.randn(6, 9, generator=g), torch.randn(4, 9, generator=g)
    y = centred(torch.tensor([0, 1, 2, 0, 1, 2]), 3)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(regression(f, y[:, order], at, 1e-3), regression(f, y, at, 1e-3)[:, order])


def test_twins_neither_stop_a_run_nor_lose_their_meaning(digits):
    one = digits.per_class
    twins = digits.subset(torch.cat([rows[[0, 0, *range(1, 19)]] for rows in one]))
    start = QUICK.compress(digits, ipc=2, device="cpu")
    start = replace(start, x=start.x[torch.arange(20) // 2 * 2])                       # two equal images of each class
    S = replace(QUICK, init=start).compress(twins, ipc=2, device="cpu")
    assert S.x.isfinite().all() and S.soft_labels.isfinite().all()


def test_a_set_is_saved_read_and_exported_as_what_it_is(digits, tmp_path):
    S = QUICK.compress(digits, ipc=1, device="cpu")
    again = read_compressed(save(S, tmp_path / "s.safetensors"))
    assert again.label_kind == "targets" and torch.equal(again.soft_labels, S.soft_labels)
    assert "targets" in S.summary()
    for kind, name in (("pt", "s.pt"), ("folder", "s")):
        back = load_compressed(export(S, kind, tmp_path / name), "mnist5k")
        assert back.label_kind == "targets" and torch.equal(back.soft_labels, S.soft_labels)
    first = next(csv.DictReader((tmp_path / "s/labels.csv").open()))                  # what others may read
    assert [float(first[f"p{k}"]) for k in range(10)] == pytest.approx((S.soft_labels[0] / .3).softmax(0).tolist())


def test_students_follow_the_targets_or_get_probabilities(digits):
    S = QUICK.compress(digits, ipc=1, device="cpu")
    assert Trainer().following(S).objective == Squares()
    assert Trainer().following(S).optimizer == "adam" and Trainer().following(S).steps == 20
    attack = PGD(Linf(.1), 2)
    assert Trainer(Adversarial(attack)).following(S).objective == Adversarial(attack, Squares())
    assert Trainer(follow=False).following(S).objective == Standard()
    for trainer in (Trainer(), Trainer(Adversarial(attack)), Trainer(follow=False, steps=3)):
        student = trainer(Net("mlp", dict(width=8)), S, 0, "cpu")
        assert 0 <= evaluate(student, digits, None, device="cpu").std <= 1


def test_lamb_moves_by_a_part_of_the_length():
    for scale in (1e-3, 1., 1e3):
        leaf = (scale * torch.randn(50, generator=generator_of(0))).requires_grad_()
        opt, at = Lamb([leaf], lr=.02), leaf.detach().clone()
        for _ in range(3):
            leaf.grad = torch.randn(50, generator=generator_of(1))
            at = leaf.detach().clone()
            opt.step()
            assert float((leaf.detach() - at).norm()) == pytest.approx(.02 * float(at.norm()), rel=1e-4)
    still = torch.zeros(3).requires_grad_()
    still.grad = torch.ones(3)
    Lamb([still], lr=.1).step()
    assert still.isfinite().all()


@pytest.mark.parametrize("data, ipc, mirror, whiten", [("mnist", 10, False, 0.), ("fashion_mnist", 1, False, 0.),
    ("cifar10", 50, True, .1), ("cifar100", 1, True, .1), ("cifar100", 10, False, .1), ("tiny_imagenet", 1, True, 0.)])
def test_presets(data, ipc, mirror, whiten):
    method = find_method("frepo")(data, ipc)
    assert (method.mirror, method.net.whiten, method.iterations, method.lr) == (mirror, whiten, 500_000, 3e-4)


def test_refusals(digits, tmp_path):
    bad = {"ridge": (0., "ridge must be a number above 0, got 0"), "nets": (0, "nets must be"),
           "student_steps": (0, "student_steps must be"), "augment": ("flip", "augment must be ''")}
    for settings, told in (({name: value}, told) for name, (value, told) in bad.items()):
        with pytest.raises(BadArgument, match=told): replace(QUICK, **settings)
    note = tmp_path / "note"
    with pytest.raises(BadArgument, match="ipc must be"): QUICK.compress(digits, ipc=0, checkpoint=note)
    whole = load("mnist5k")
    many = ImageSet(whole.x.repeat(2, 1, 1, 1), whole.y.repeat(2), whole.classes, "mine")
    with pytest.raises(BadArgument, match="up to 5000 images, these are 5010: give student_steps"):
        NeuralFeatureRegression(net=SMALL).compress(many, ipc=501, checkpoint=note)
    assert not note.exists()


def test_names_and_provenance():
    assert describe(find_method("frepo")("mnist5k", 1))["is"] == "NeuralFeatureRegression"
    assert frepo_settings("svhn", 1) == {} and str(find_method("FRePo")).startswith("FRePo: ")
