"""Squeeze, recover, relabel: against plain re-statements in double precision, written out here; across interruptions
in every stage; and what the teacher, the boxes, the labels of views and the files have to keep.

`exact` makes double precision the default, so networks and noise are doubles. Pixels are whole 256ths: exact in single
precision too, in which the library reads and shows them."""
import math
from dataclasses import dataclass, replace
from pathlib import Path
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomResizedCrop
from rdd_lib.augmentation import Scale
from rdd_lib.compressed import Compressed, save
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, BrokenFile, describe, generator_of, subseed
from rdd_lib.coresets.random import Random
from rdd_lib.data import ImageSet
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.relabel import Relabel, Relabelled
from rdd_lib.distill.squeeze_recover import apart, heard, norms_of, SqueezeRecover
from rdd_lib.files import Checkpoint, read_tensors
from rdd_lib.models import MODELS, Net, statistics
from rdd_lib.published import load_compressed
from rdd_lib.training.curvature import Curvature
from rdd_lib.training.distil import Distil
from rdd_lib.training.squeeze import Squeeze
from rdd_lib.training.trainer import Trainer
from rdd_lib.view_labels import ViewLabels
from rdd_lib.views import showings, Views

NET, SIDE = Net("strided", dict(width=2)), 8


def images(n=30, classes=3, seed=0):
    "Noise, with a brighter band for each class; named like a data set whose mean and deviation are fixed."
    g = generator_of(seed)
    x, y = torch.randint(0, 128, (n, 3, SIDE, SIDE), generator=g), torch.arange(n) % classes
    for c in range(classes): x[y == c, c % 3, c % SIDE] += 128
    return ImageSet(x.float() / 256, y, tuple(map(str, range(classes))), "cifar10")


@pytest.fixture
def exact():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass(frozen=True)
class Exact(Curvature):
    "The penalty, told the pixels as doubles: else it would differentiate with respect to single ones."
    def __call__(self, model, x, y, w=None, generator=None): return super().__call__(model, x.double(), y, w, generator)


# ---- plain re-statements -------------------------------------------------------------------------------------------

class Plain:
    "Three [convolution of stride 2, batch norm, ReLU], then linear, on a dict of doubles."
    def __init__(self, model, data):
        self.p = {name: t.detach().double().clone() for name, t in model.state_dict().items()}
        self.mean, self.std = (t.double().view(-1, 1, 1) for t in statistics(data))
        self.names = [name for name, _ in model.named_parameters()]
        self.norms = [f"model.features.{i}" for i in (1, 4, 7)]

    def weights(self):
        for name in self.names: self.p[name].requires_grad_(True)
        return [self.p[name] for name in self.names]

    def __call__(self, pixels, mode="eval"): return self.seen((pixels - self.mean) / self.std, mode)[0]

    def seen(self, h, mode="eval"):
        "Logits of normalised images, and the mean and variance in front of every norm."
        told = []
        for i, norm in zip((0, 3, 6), self.norms):
            h = F.conv2d(h, self.p[f"model.features.{i}.weight"], stride=2, padding=1)
            mean, var = h.mean((0, 2, 3)), h.var((0, 2, 3), unbiased=False)
            told.append((mean, var))
            if mode == "train": self.remember(norm, mean.detach(), var.detach(), h.numel() / h.shape[1])
            if mode == "eval": mean, var = self.p[f"{norm}.running_mean"], self.p[f"{norm}.running_var"]
            h = (h - mean.view(-1, 1, 1)) / (var.view(-1, 1, 1) + 1e-5).sqrt()
            h = F.relu(h * self.p[f"{norm}.weight"].view(-1, 1, 1) + self.p[f"{norm}.bias"].view(-1, 1, 1))
        return h.flatten(1) @ self.p["model.classifier.weight"].T + self.p["model.classifier.bias"], told

    def remember(self, norm, mean, var, n):
        for name, new in (("running_mean", mean), ("running_var", var * n / (n - 1))):
            self.p[f"{norm}.{name}"] = .9 * self.p[f"{norm}.{name}"] + .1 * new
        self.p[f"{norm}.num_batches_tracked"] += 1

    def apart(self, other, but=()):
        "The largest difference to a network."
        state = other.state_dict()
        return max((t.detach() - state[name]).abs().max().item() for name, t in self.p.items() if name not in but)


def seen_as(x, drawn):
    "The views of a batch, one image after the other: cut out or padded, mirrored, scaled up; a box or a blend of another."
    out = []
    for i, image in enumerate(x.double()):
        top, left, height, width = (int(drawn[k][i]) for k in ("top", "left", "height", "width"))
        part = F.pad(image, (SIDE,) * 4)[:, top + SIDE:top + SIDE + height, left + SIDE:left + SIDE + width]
        part = F.interpolate(part[None], (SIDE, SIDE), mode="bilinear", align_corners=False)[0]
        out.append(part.flip(-1) if drawn["flip"][i] else part)
    v = torch.stack(out)
    if "partner" not in drawn: return v
    other = v[drawn["partner"]]
    if "box" not in drawn: return drawn["share"] * v + (1 - drawn["share"]) * other
    top, left, bottom, right = drawn["box"].tolist()
    mixed = v.clone()
    mixed[:, :, top:bottom, left:right] = other[:, :, top:bottom, left:right]
    return mixed


def cross_entropy(logits, y): return -(logits - logits.logsumexp(1, keepdim=True))[torch.arange(len(y)), y]


def turn(net, x, y, h):
    "How far each image's slope of the batch's mean loss turns, h further along its own direction: lengths, (B,)."
    x = x.clone().requires_grad_()
    g, = torch.autograd.grad(cross_entropy(net(x), y).mean(), x, create_graph=True)
    length = g.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    far = (x + h * g / length).detach().requires_grad_()
    g_far, = torch.autograd.grad(cross_entropy(net(far), y).mean(), far, create_graph=True)
    return (g_far - g).flatten(1).norm(dim=1)


def plain_squeeze(net, data, squeeze, penalty=None):
    "SGD: v = .9 v + (slope + decay * weight); weight -= rate * v; the rate a cosine, from epoch to epoch."
    speed, sizes = [torch.zeros_like(p) for p in net.weights()], [squeeze.batch] * (len(data) // squeeze.batch)
    for shown in showings(squeeze.views, len(data), SIDE, sizes, squeeze.seed):
        if shown.epoch == squeeze.epochs: return
        rate = squeeze.lr * (1 + math.cos(math.pi * shown.epoch / squeeze.epochs)) / 2
        x, y = seen_as(data.x[shown.rows], shown.drawn), data.y[shown.rows]
        loss = cross_entropy(net(x, "train"), y).mean()
        if penalty: loss = loss + penalty.lam * turn(net, x, y, penalty.h).mean()
        weights = net.weights()
        for p, v, slope in zip(weights, speed, torch.autograd.grad(loss, weights)):
            v.mul_(squeeze.momentum).add_(slope + squeeze.weight_decay * p.detach())
            p.data -= rate * v


PENALTIES = {"plain": None, "variant A": Curvature(20., .6, "authors_cifar")}

@pytest.mark.parametrize("name", PENALTIES)
def test_a_squeeze_is_plain_sgd(exact, name, tmp_path):
    data, penalty = images(), PENALTIES[name]
    squeeze = Squeeze(epochs=3, lr=.05, batch=10, views=Views("pad", pad=2), seed=1)
    plain = Plain(NET(data, subseed(1, "init")), data)
    plain_squeeze(plain, data, squeeze, penalty)
    given = replace(squeeze, objective=Exact(**vars(penalty))) if penalty else squeeze
    teacher = given(NET, data, tmp_path, "cpu")
    assert plain.apart(teacher) < 1e-6
    assert Plain(NET(data, subseed(1, "init")), data).apart(teacher) > .01
    assert teacher.state_dict()["model.features.1.num_batches_tracked"] == 9


def teacher_of(data, folder): return SQUEEZE(NET, data, folder, "cpu")

SQUEEZE = Squeeze(epochs=2, lr=.05, batch=10, views=Views("pad", pad=1))
RECOVER = SqueezeRecover(net=NET, squeeze=SQUEEZE, iterations=8, jitter=(-1, 2), crop=(1., .3), r_bn=.05, relabel=None)


def plain_recover(net, data, m, y, block):
    "One block: Adam with betas .5 and .9, one box, one mirror and one roll for the batch, pixels kept in [0, 1]."
    low, high = -net.mean / net.std, (1 - net.mean) / net.std
    noise = torch.randn(len(y), *data.shape, generator=generator_of(0, "noise", block), dtype=torch.float64)
    u = torch.minimum(torch.maximum(noise, low), high)
    first, second, (begin, end) = torch.zeros_like(u), torch.zeros_like(u), m.crop
    for t in range(m.iterations):
        g = generator_of(0, "iteration", block * m.iterations + t)
        least = end + (begin - end) * (1 + math.cos(math.pi * t / m.iterations)) / 2
        box = Views("resized", scale=(least, 1.)).draw(1, SIDE, g)
        dy, dx = torch.randint(m.jitter[0], m.jitter[1] + 1, (2,), generator=g).tolist()
        at = u.clone().requires_grad_()
        v = seen_as_one(at, box).roll((dy, dx), (2, 3))
        logits, told = net.seen(v)
        gaps = [(mean - net.p[f"{norm}.running_mean"]).square().sum().sqrt()
                + (var - net.p[f"{norm}.running_var"]).square().sum().sqrt() for norm, (mean, var) in zip(net.norms, told)]
        loss = cross_entropy(logits, y).mean() + m.r_bn * (10 * gaps[0] + gaps[1] + gaps[2])
        slope, = torch.autograd.grad(loss, at)
        first, second = .5 * first + .5 * slope, .9 * second + .1 * slope**2
        rate = m.lr * (1 + math.cos(math.pi * t / m.iterations)) / 2
        u = u - rate * (first / (1 - .5**(t + 1))) / ((second / (1 - .9**(t + 1))).sqrt() + 1e-8)
        u = torch.minimum(torch.maximum(u, low), high)
    return u


def seen_as_one(x, drawn):
    "One box for all, so that a slope can go through it."
    top, left, height, width = (int(drawn[k]) for k in ("top", "left", "height", "width"))
    part = x[:, :, top:top + height, left:left + width]
    v = F.interpolate(part, (SIDE, SIDE), mode="bilinear", align_corners=False)
    return v.flip(-1) if drawn["flip"] else v


def test_a_recovering_is_plain_adam(exact, tmp_path):
    "Two blocks: the second one's images as doubles, the first one's as bytes."
    data, note = images(), tmp_path / "note"
    made = RECOVER.compress(data, ipc=2, device="cpu", folder=tmp_path, checkpoint=note, every=1)
    plain = Plain(teacher_of(data, tmp_path), data)
    first, second = (plain_recover(plain, data, RECOVER, torch.arange(3), block) for block in (0, 1))
    tensors, head = read_tensors(note, "a note")
    assert head["done"] == 16 and tensors["leaf.u"].dtype == torch.float64
    assert (tensors["leaf.u"] - second).abs().max() < 1e-6
    as_bytes = ((torch.cat([first, second]) * plain.std + plain.mean) * 255)
    assert (as_bytes - made.x).abs().max() < .5 + 1e-4 and made.y.tolist() == [0, 1, 2] * 2


@pytest.mark.parametrize("mode", ["eval", "batch"])
def test_a_relabelling_is_a_teacher_asked(exact, mode, tmp_path):
    "Logits as they leave the teacher, in single precision; in the file rounded to half precision."
    data = images(14)
    kept = replace(data, x=(data.x * 255).byte())
    teacher, how = teacher_of(images(), tmp_path), Relabel(epochs=3, batch=5, teacher_mode=mode, store="teacher")
    asked, stored = (replace(how, store=store)(teacher, NET, kept, seed=4) for store in ("teacher", "logits"))
    rounded = nn.Module.state_dict(teacher)
    plain = Plain(teacher, data)
    plain.p = {name: t.half().to(t.dtype) if t.is_floating_point() else t for name, t in rounded.items()}
    plain.mean, plain.std = plain.p["mean"], plain.p["std"]
    for shown in asked.showings(kept):
        v = seen_as(kept.x[shown.rows].double() / 255, shown.drawn)
        wanted = plain(v, mode).detach()
        assert (asked.of(shown, v) - wanted).abs().max() < 1e-6
        assert (asked.views.show(kept.images()[shown.rows], shown.drawn) - v).abs().max() < 1e-6
        ours = stored.logits[shown.epoch, shown.rows]
        assert ((ours - wanted).abs() <= wanted.abs() * 2**-11 + 1e-6).all()


def softened(z, t): return (z / t - (z / t).logsumexp(1, keepdim=True)).exp()


def test_a_student_is_plain_adamw(exact, tmp_path):
    "KL at temperature 4; decay on matrices and filters, not on norms and biases; the rate from epoch to epoch."
    data = images(12)
    kept = replace(data, x=(data.x * 255).byte())
    how = Relabel(4., epochs=3, batch=6, views=Views("pad", pad=2, mix="cutmix"))
    labels = how(teacher_of(images(), tmp_path), NET, kept, seed=4)
    made = Compressed(kept.x, kept.y, kept.classes, kept.name, views=labels, schedule=how.student)
    student, plain = Trainer()(NET, made, 2, "cpu"), Plain(NET(data, subseed(2, "init")), data)
    first, second = ([torch.zeros_like(p) for p in plain.weights()] for _ in range(2))
    for t, shown in enumerate(labels.showings(kept), 1):
        v = seen_as((kept.x[shown.rows].float() / 255).double(), shown.drawn)
        p, q = softened(labels.logits[shown.epoch, shown.rows].double(), 4), softened(plain(v, "train"), 4)
        loss, weights = (p * (p / q).log()).sum(1).mean(), plain.weights()
        rate = 1e-3 * (1 + math.cos(math.pi * shown.epoch / 3)) / 2
        for w, m, s, slope in zip(weights, first, second, torch.autograd.grad(loss, weights)):
            m.mul_(.9).add_(.1 * slope)
            s.mul_(.999).add_(.001 * slope**2)
            if w.dim() > 1: w.data *= 1 - rate * .01
            w.data -= rate * (m / (1 - .9**t)) / ((s / (1 - .999**t)).sqrt() + 1e-8)
    assert t == 6 and plain.apart(student) < 1e-6


def test_temperature_squared_is_a_rate(exact):
    "SGD with `scaled` at lr / T^2 is SGD without, at lr."
    data = images(12)
    told = dict(images=data.fingerprint, logits=torch.randn(2, 12, 3, generator=generator_of(0)).half())
    def student(scaled, lr):
        labels = ViewLabels(Views("pad"), 0, 2, 6, 5., scaled, **told)
        made = Compressed(data.x, data.y, data.classes, data.name, views=labels)
        return Trainer(lr=lr, weight_decay=0.)(NET, made, 0, "cpu").state_dict()
    plain, scaled = student(False, .5), student(True, .5 / 25)
    for name, t in plain.items(): torch.testing.assert_close(scaled[name], t, rtol=0, atol=1e-12)


@pytest.mark.parametrize("t", [1., 4., 20., 1e4])
def test_limits_of_the_distance(t):
    z, own = torch.randn(2, 7, 10, generator=generator_of(0), dtype=torch.float64) * 5
    def gap(own, scaled=False): return Distil(t, scaled)(lambda x: x, own, softened(z, t)).item()
    assert abs(gap(z)) < 1e-12 and gap(own) > 0 and gap(own, True) == pytest.approx(t**2 * gap(own))
    limit = .5 * (z - own).var(1, unbiased=False).mean().item()
    if t == 1e4: assert gap(own, True) == pytest.approx(limit, rel=1e-2)
