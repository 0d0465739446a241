"""Squeeze, recover, relabel: against plain re-statements in double precision, written out here; across interruptions
in every stage; and what the teacher, the boxes, the labels of views and the files have to keep.

`exact` makes double precision the default, so networks and noise are doubles. Pixels are whole 256ths: exact in single
precision too, in which the library reads and shows them."""
import math
from dataclasses import dataclass, replace
from pathlib import Path
import pretend_gpu
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomResizedCrop
from rdd_lib.compressed import Compressed, save
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, BrokenFile, describe, generator_of, subseed
from rdd_lib.coresets.random import Random
from rdd_lib.data import ImageSet
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.relabel import Relabel, Relabelled
from rdd_lib.distill.squeeze_recover import apart, heard, norms_of, SqueezeRecover
from rdd_lib.files import Checkpoint, read_tensors
from rdd_lib.models import Net, statistics
from rdd_lib.published import load_compressed
from rdd_lib.training.curvature import Curvature
from rdd_lib.training.distil import Distil
from rdd_lib.training.squeeze import Squeeze
from rdd_lib.training.trainer import Trainer
from rdd_lib.view_labels import ViewLabels
from rdd_lib.views import batch_sizes, showings, Views

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
    "The views of a batch, image by image: cut out or padded, mirrored, scaled up; a box or a blend of another."
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


def length(v): return v.square().sum().sqrt()


def turn(net, x, y, h):
    "How far each image's slope of the batch's mean loss turns, h further along its own direction: lengths, (B,)."
    x = x.clone().requires_grad_()
    g, = torch.autograd.grad(cross_entropy(net(x), y).mean(), x, create_graph=True)
    own = g.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    far = (x + h * g / own).detach().requires_grad_()
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
        gaps = [length(mean - net.p[f"{norm}.running_mean"]) + length(var - net.p[f"{norm}.running_var"])
                for norm, (mean, var) in zip(net.norms, told)]
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
    plain = Plain(teacher, data)
    plain.p = {name: t.half().double() for name, t in plain.p.items()}
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


# ---- what has to stay as it was ------------------------------------------------------------------------------------

def state_of(model):
    "All that a network holds: bytes of parameters and buffers, flags, hooks."
    tensors = {name: t.numpy().tobytes() for name, t in model.state_dict().items()}
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return tensors, hooks, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.fixture
def teacher(monkeypatch, tmp_path):
    "A teacher of which the caller holds the very object that is asked."
    made = teacher_of(images(), tmp_path)
    list(made.parameters())[1].requires_grad_(False)                     # one of the flags is not like the others
    monkeypatch.setattr(Squeeze, "__call__", lambda self, *args, **how: made)
    return made


FAULTS = {"none": None, "by hand": KeyboardInterrupt, "an error": RuntimeError}
STORED = replace(RECOVER, iterations=3, relabel=Relabel(epochs=3, batch=5))

@pytest.mark.parametrize("at", [1, 5, 12])       # the norms' input, a block later, while relabelling
@pytest.mark.parametrize("fault", FAULTS)
def test_a_teacher_is_left_as_it_was(teacher, monkeypatch, fault, at):
    before, asked, own = state_of(teacher), [], nn.Linear.forward
    def forward(self, x):
        asked.append(1)
        if len(asked) == at and FAULTS[fault]: raise FAULTS[fault]
        return own(self, x)
    monkeypatch.setattr(nn.Linear, "forward", forward)
    def run(): return STORED.compress(images(), ipc=2, device="cpu")
    if FAULTS[fault]:
        with pytest.raises(FAULTS[fault]): run()
    else: run()
    assert state_of(teacher) == before


def test_a_penalty_moves_statistics_as_a_step_without(tmp_path):
    "One step: the weights differ, the running statistics and counters do not."
    plain = Squeeze(epochs=1, lr=.1, batch=30, views=Views("pad", pad=1))
    a, b = (replace(plain, objective=o)(NET, images(), tmp_path, "cpu").state_dict()
            for o in (plain.objective, Curvature(5., .5, "authors_cifar")))
    for name in a:
        kept = "running" in name or "tracked" in name or name in ("mean", "std")
        assert torch.equal(a[name], b[name]) == kept


# ---- interrupted ---------------------------------------------------------------------------------------------------

AFTER = replace(SQUEEZE, objective=Curvature(5., .5, "authors_cifar"), epochs=1, after=SQUEEZE)
STAGES = {"recover and relabel": replace(STORED, squeeze=AFTER),
          "blocks of two": replace(STORED, squeeze=AFTER, iterations=2, batch=2, crop=None),
          "joint, from chosen crops": replace(STORED, squeeze=AFTER, images="joint", init="chosen"),
          "random images": Relabelled(Random(), NET, AFTER, Relabel(epochs=3, batch=5))}

@pytest.mark.parametrize("name", STAGES)
def test_interrupted_at_every_note(monkeypatch, name, tmp_path):
    "Killed again and again, each time right after its first note: every place of every stage is gone on from once."
    def run(folder): return STAGES[name].compress(images(), ipc=2, seed=1, device="cpu", folder=folder,
                                                  checkpoint=folder / "note")
    whole = save(run(tmp_path / "whole"), tmp_path / "whole" / "set").read_bytes()
    notes, stages, own = [], set(), Checkpoint.write
    def due(self):
        if notes: raise KeyboardInterrupt
        return self.path is not None
    def write(self, tensors, **head):
        notes.append(1)
        stages.add(self.what)
        own(self, tensors, **head)
    monkeypatch.setattr(Checkpoint, "due", due)
    monkeypatch.setattr(Checkpoint, "write", write)
    for kills in range(200):
        notes.clear()
        try: made = run(tmp_path / "killed")
        except KeyboardInterrupt: continue
        break
    recovering = name != "random images"
    assert stages == {"a training", "a relabelling"} | ({"a distillation"} if recovering else set())
    iterations = STAGES[name].turns([2, 2, 2]) if recovering else 0
    assert kills == 9 + iterations + 3 - 1            # steps of both squeezes, epochs of labels; not after the last
    assert save(made, tmp_path / "killed" / "set").read_bytes() == whole
    left = {p.name for p in (tmp_path / "killed").iterdir()}
    assert left == {p.name for p in (tmp_path / "whole").iterdir()} and len(left) == 3       # two teachers and the set


def test_another_run_s_note_is_refused(tmp_path):
    data, note, how = images(12), tmp_path / "note", Relabel(epochs=2, batch=5)
    teacher, kept = teacher_of(images(), tmp_path), replace(data, x=(data.x * 255).byte())
    other = DistributionMatching(net=NET, batch_real=4, iterations=1)
    other.compress(data, ipc=2, device="cpu", checkpoint=note, every=1)
    before = note.read_bytes()
    with pytest.raises(BadArgument, match="is the checkpoint of a distillation, not of a relabelling"):
        how(teacher, NET, kept, 0, note)
    with pytest.raises(BadArgument, match="is the checkpoint of a distillation, not of a training"):
        Trainer(epochs=1)(NET, data, 0, "cpu", checkpoint=note)
    with pytest.raises(BadArgument, match="belongs to another run of a distillation"):
        RECOVER.compress(data, ipc=1, device="cpu", folder=tmp_path, checkpoint=note)
    assert note.read_bytes() == before
    note.write_bytes(before[:200])
    with pytest.raises(BrokenFile, match="is not the checkpoint of a relabelling"): how(teacher, NET, kept, 0, note)


# ---- blocks --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first", [dict(ipc=1), dict(ipc=2), dict(total=20)])
def test_a_smaller_set_begins_a_larger_one(first, tmp_path):
    "Ten classes in blocks of seven; and 25 images, three of some classes and two of others."
    ten, method = images(40, 10), replace(RECOVER, iterations=2, batch=7)
    def run(**size): return method.compress(ten, device="cpu", folder=tmp_path, **size)
    small, large = run(**first), run(total=25)
    assert torch.equal(small.x, large.x[:len(small)]) and torch.equal(small.y, large.y[:len(small)])
    assert torch.bincount(large.y).tolist() == [3] * 5 + [2] * 5
    assert [len(b) for b in method.blocks([3] * 5 + [2] * 5)] == [7, 3, 7, 3, 5]


def test_equal_ends_of_the_curriculum_are_sre2l(tmp_path):
    small = dict(iterations=3, net=NET, squeeze=SQUEEZE, relabel=None, jitter=(0, 2), lr=.1, r_bn=.01)
    sre2l = find_method("sre2l").build("imagenette", 1, **small)
    cda = find_method("cda").build("imagenette", 1, crop=(.08, .08), **small)
    a, b = (m.compress(images(), ipc=1, device="cpu", folder=tmp_path) for m in (sre2l, cda))
    assert torch.equal(a.x, b.x) and describe(sre2l) == describe(cda)
    assert {sre2l.least(t) for t in range(4)} == {.08}
    moving = find_method("cda").build("imagenette", 1, **small)
    assert (moving.least(0), moving.least(3)) == pytest.approx((1., .08))
    assert not torch.equal(moving.compress(images(), ipc=1, device="cpu", folder=tmp_path).x, a.x)


@pytest.mark.parametrize("store", ["logits", "teacher"])
def test_a_gpu_gives_what_a_cpu_gives(gpu, store, tmp_path):
    "On a pretended one to the bit; a real one rounds otherwise."
    method = replace(STORED, relabel=replace(STORED.relabel, store=store))
    here, there = (method.compress(images(), ipc=2, device=d, folder=tmp_path / d) for d in ("cpu", gpu))
    students = [Trainer()(NET, made, 0, d) for made, d in ((here, "cpu"), (there, gpu))]
    pairs = [(here.x, there.x), *zip(*(student.state_dict().values() for student in students))]
    if store == "logits": pairs.append((here.views.logits, there.views.logits))
    for a, b in pairs:
        a, b = a.double(), b.cpu().double()
        assert torch.equal(a, b) if pretend_gpu.pretended() else torch.allclose(a, b, atol=.05)


# ---- terms ---------------------------------------------------------------------------------------------------------

class Work:
    "What `terms` looks at."
    def __init__(self, teacher): self.teacher, self.norms = teacher, norms_of(teacher)


def test_own_statistics_leave_nothing_but_the_sample_s_correction(exact, tmp_path):
    "Running variances are those of a sample, n / (n - 1) times the batch's."
    model = teacher_of(images(), tmp_path).train()
    for m in norms_of(model): m.momentum = 1.
    u = torch.randn(12, 3, SIDE, SIDE, generator=generator_of(0))
    with torch.no_grad(), heard(norms_of(model)) as found: model.model(u)
    sizes, variances = (12 * 16, 12 * 4, 12 * 1), [var.norm() for _, _, var in found]
    rest = [v / (n - 1) for v, n in zip(variances, sizes)]
    assert apart(found).item() == pytest.approx((10 * rest[0] + rest[1] + rest[2]).item(), abs=1e-12)


def test_the_loss_and_its_slope(exact, tmp_path):
    "The norms' term is linear in its weight; the slope is that of finite differences, in double precision."
    work, y = Work(teacher_of(images(), tmp_path)), torch.arange(3)
    u = torch.randn(3, 3, SIDE, SIDE, generator=generator_of(0), requires_grad=True)
    (ce, one), (same, three) = (replace(RECOVER, r_bn=r).terms(work, u, y) for r in (.1, .3))
    assert ce.dtype == torch.float64 and torch.equal(ce, same) and three.item() == pytest.approx(3 * one.item())
    none = replace(RECOVER, r_bn=0.).terms(work, u, y)[1]
    assert none.item() == 0 and not torch.autograd.grad(none, u, allow_unused=True)[0].any()
    def loss(u): return sum(RECOVER.terms(work, RECOVER.view(u, "cifar10", 5, generator_of(2)), y))
    assert torch.autograd.gradcheck(loss, u, fast_mode=True)


# ---- views ---------------------------------------------------------------------------------------------------------

def test_one_box_and_one_roll_for_a_batch():
    same = torch.rand(1, 3, SIDE, SIDE, generator=generator_of(0)).expand(6, 3, SIDE, SIDE)
    rolled, plain, corner = set(), replace(RECOVER, crop=None, jitter=(-1, 2)), torch.zeros(1, 1, 5, 5)
    corner[..., 0, 0] = 1
    for t in range(60):
        v = RECOVER.view(same, "cifar10", t % 8, generator_of(t))
        assert torch.equal(v, v[:1].expand_as(v))
        rolled.add(tuple(plain.view(corner, "cifar10", 0, generator_of(t))[0, 0].nonzero()[0].tolist()))
    assert {i for i, _ in rolled} == {j for _, j in rolled} == {4, 0, 1, 2}      # -1 comes in at the other end


@pytest.mark.parametrize("side, least", [(224, .08), (64, .4), (32, .9), (8, .08)])
def test_boxes_are_torchvision_s(side, least):
    "Mean area and mean |log shape|, within 2 %; never outside the picture."
    ours = Views("resized", scale=(least, 1.)).draw(40_000, side, generator_of(0))
    g = torch.random.get_rng_state()
    torch.manual_seed(0)
    image = torch.empty(1, 1, 1).expand(1, side, side)
    theirs = [RandomResizedCrop.get_params(image, (least, 1.), (3 / 4, 4 / 3)) for _ in range(4000)]
    torch.random.set_rng_state(g)
    theirs = torch.tensor(theirs)
    for a, b in zip(("top", "left", "height", "width"), theirs.T):
        assert ours[a].min() >= 0 and abs(ours[a].double().mean() - b.double().mean()) < .02 * side
    def told(h, w): return torch.stack([(h * w).double().mean(), 1 + (h / w).double().log().abs().mean()])
    assert (told(ours["height"], ours["width"]) / told(*theirs.T[2:]) - 1).abs().max() < .02
    assert (ours["top"] + ours["height"]).max() <= side and (ours["left"] + ours["width"]).max() <= side


@pytest.fixture
def relabelled(tmp_path):
    "A set with labels of views, and its teacher."
    data = images(14)
    kept, teacher = replace(data, x=(data.x * 255).byte()), teacher_of(images(), tmp_path)
    labels = Relabel(epochs=3, batch=5, views=Views("resized"))(teacher, NET, kept, seed=4)
    return Compressed(kept.x, kept.y, kept.classes, kept.name, views=labels), teacher


@pytest.mark.parametrize("batch", [1, 3, 5, 14])
def test_views_are_drawn_again(relabelled, batch, tmp_path):
    "From the file, in batches of any size as nothing is mixed; the teacher says what is stored, to 2^-10."
    made, teacher = relabelled
    labels = load_compressed(save(made, tmp_path / "set.safetensors")).views
    seen, sizes = torch.zeros(3, 14, dtype=torch.int64), batch_sizes(14, batch)
    for shown in showings(labels.views, 14, SIDE, sizes, labels.seed):
        if shown.epoch == 3: break
        with torch.no_grad(): z = teacher(labels.views.show(made.images()[shown.rows], shown.drawn))
        assert ((z - labels.of(shown, z)).abs() <= z.abs().clamp_min(1) * 2**-10 * 2).all()
        seen[shown.epoch, shown.rows] += 1
    assert (seen == 1).all()


# ---- refused, in one sentence --------------------------------------------------------------------------------------

CHANGED = {"seed": 5, "batch": 7, "answered_by": "0" * 16, "teacher_mode": "batch", "views": Views("pad")}

@pytest.mark.parametrize("name", CHANGED)
def test_labels_of_other_views_are_refused(relabelled, name, tmp_path):
    "In memory, and in a file whose head was changed."
    made, _ = relabelled
    with pytest.raises(BadArgument, match="answer to other views or are by another teacher than they say"):
        replace(made.views, **{name: CHANGED[name]})
    path = save(made, tmp_path / "set.safetensors")
    if name != "seed": return
    old = path.read_bytes()
    path.write_bytes(old.replace(rb'\"seed\": 4, \"teacher', rb'\"seed\": 5, \"teacher'))
    assert path.read_bytes() != old
    with pytest.raises(BrokenFile, match="answer to other views"): load_compressed(path)


def test_labels_of_another_set_are_refused(relabelled):
    made, teacher = relabelled
    few = made.subset(range(6))
    assert not hasattr(few, "views")
    for change, told in ((dict(x=few.x, y=few.y), "for 14 images of 3 classes, the set has 6 of 3"),
                         (dict(classes="abcd"), "for 14 images of 3 classes, the set has 14 of 4"),
                         (dict(y=made.y.flip(0)), "were made for other images")):
        with pytest.raises(BadArgument, match=told): replace(made, **change)
    none = Relabel(epochs=3, batch=5, store="none")(teacher, NET, few)
    online, other = replace(none, teacher=teacher), NET(images(), 9)
    assert torch.equal(online.of(next(online.showings(few)), few.images()).argmax(1), teacher(few.images()).argmax(1))
    with pytest.raises(BadArgument, match="these labels of views are by"): replace(none, teacher=other)
    with pytest.raises(BadArgument, match="not kept .store='none'.: give views.teacher"):
        Trainer()(NET, Compressed(few.x, few.y, few.classes, few.name, views=none), 0, "cpu")


@pytest.mark.parametrize("cut", [1, 100, 2000])
def test_a_file_cut_short_is_refused(relabelled, cut, tmp_path):
    path = save(relabelled[0], tmp_path / "set.safetensors")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(BrokenFile, match="is not a compressed set"): load_compressed(path)


@pytest.mark.parametrize("crop", [(0., 1.), (.5, 1.1), (math.nan, 1.), (.5,), .5, ("a", "b"), (None, 1.)])
def test_bounds_of_crops(crop):
    told = "must be two shares of the area in .0, 1."
    with pytest.raises(BadArgument, match=f"crop {told}"): replace(RECOVER, crop=crop)
    with pytest.raises(BadArgument, match=f"scale {told}"): Views("resized", scale=crop)


@pytest.mark.parametrize("jitter", [4, (0, .5), (3, 1), "ab", ()])
def test_bounds_of_rolls(jitter):
    with pytest.raises(BadArgument, match="jitter must be two whole numbers"): replace(RECOVER, jitter=jitter)


STILL = [Net("convnet", dict(width=2, depth=1)), Net("mlp"), Net("resnet18", dict(width=8, norm="instance"))]

@pytest.mark.parametrize("net", STILL, ids=lambda net: net.name)
def test_a_teacher_without_running_statistics(net, tmp_path):
    with pytest.raises(BadArgument, match="keeps none; take norm='batch'"):
        replace(RECOVER, net=net).compress(images(), 1, device="cpu", folder=tmp_path / "t", checkpoint=tmp_path / "n")
    assert not list(tmp_path.iterdir())


def test_an_earlier_set_with_too_few_images(tmp_path):
    one = RECOVER.compress(images(), ipc=1, device="cpu", folder=tmp_path)
    with pytest.raises(BadArgument, match="init has 1 images of class 0, 2 are asked for"):
        replace(RECOVER, init=one).compress(images(), ipc=2, device="cpu", folder=tmp_path)


# ---- files ---------------------------------------------------------------------------------------------------------

BEFORE = sorted((Path(__file__).parent / "made_before" / "compressed").glob("*.safetensors"))

@pytest.mark.parametrize("path", BEFORE, ids=lambda path: path.stem)
def test_a_set_without_views_is_written_as_ever(path, tmp_path):
    "What an earlier version wrote is read, and written again byte for byte."
    made = load_compressed(path)
    assert made.views is None and save(made, tmp_path / "again").read_bytes() == path.read_bytes()
