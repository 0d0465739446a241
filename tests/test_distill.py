"""The distillers' shared loop, DM and DC: against plain loops written out here, across interruptions, on networks that
look at a batch as a whole."""
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.threats import Linf
from rdd_lib.augmentation import DSA, OPERATIONS, Scale, Siamese
from rdd_lib.compressor import find_method
from rdd_lib.published import load_compressed
from rdd_lib.compressed import save
from rdd_lib.core import BadArgument, drawn, generator_of, subseed
from rdd_lib.data import load
from rdd_lib.distill import synthetic
from rdd_lib.distill.backprop import BackpropThroughTraining, walk_of
from rdd_lib.distill.distribution import DistributionMatching, FeatureMatching, waves
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.gradient import GradientMatching, distance
from rdd_lib.distill.synthetic import RealBatches, State, Story, _Keeper, first_images
from rdd_lib.models import Net
from rdd_lib.reproduce.cells import compressed, seconds_of
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.training.trainer import Trainer

NARROW = Net("convnet", dict(width=6))
SMALL = dict(batch_real=20, net=NARROW)


@pytest.fixture(scope="module")
def digits(): return load("mnist5k")


def plain_dc(method, data, seed, ipc):
    "One iteration of DC, written out: loop over classes, all at once, `backward`, torch's SGD on the images."
    scale = Scale(data)
    u, y = first_images(data, [ipc] * 10, method.init, scale, seed)
    real, g = RealBatches(data, scale), generator_of(seed, "iteration", 0)
    net = method.net(data, subseed(drawn(g))).train()
    u.requires_grad_()
    opt = torch.optim.SGD([u], method.lr, momentum=method.momentum)
    inner = torch.optim.SGD(net.parameters(), method.lr_net)
    for o in range(method.outer):
        if o:
            for _ in range(method.inner):
                torch.randperm(len(u), generator=g)
                Siamese("", data.name, g, len(u))
                inner.zero_grad()
                F.cross_entropy(net.model(u.detach()), y).backward()
                inner.step()
        loss = 0.
        for c in range(10):
            Siamese("", data.name, g)
            x = real(c, method.batch_real, g)
            torch.randint(2**62, (), generator=g)
            weights = [*net.parameters()]
            goal = torch.autograd.grad(F.cross_entropy(net.model(x), torch.full((len(x),), c)), weights)
            own = torch.autograd.grad(F.cross_entropy(net.model(u[y == c]), y[y == c]), weights, create_graph=True)
            for a, b in zip(own, goal):
                if a.dim() == 1: continue
                a, b = a.flatten(1), b.detach().flatten(1)
                loss = loss + (1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-6)).sum()
        opt.zero_grad()
        loss.backward()
        opt.step()
        with torch.no_grad(): u.copy_(scale.normalise(scale.pixels(u)))
    return scale.pixels(u.detach())


@pytest.mark.parametrize("ipc, outer, inner", [(1, 1, 1), (2, 3, 2)])
def test_dc_is_the_published_loop(digits, ipc, outer, inner):
    "The order of labels within the plain inner training does not matter to a full batch."
    method = GradientMatching(iterations=1, outer=outer, inner=inner, **SMALL)
    made = method.compress(digits, ipc=ipc, seed=3, device="cpu")
    assert (made.x - plain_dc(method, digits, 3, ipc)).abs().max() < 2e-4


def test_dm_is_the_published_loss(digits):
    method = DistributionMatching(iterations=1, lr=.5, augment="", **SMALL)
    scale = Scale(digits)
    u, y = first_images(digits, [2] * 10, "real", scale, 1)
    g, real = generator_of(1, "iteration", 0), RealBatches(digits, scale)
    net = NARROW(digits, subseed(drawn(g))).model
    u.requires_grad_()
    loss = 0.
    for c in range(10):
        Siamese("", digits.name, g)
        loss = loss + (net.embed(real(c, 20, g)).mean(0) - net.embed(u[y == c]).mean(0)).square().sum()
    plain = scale.pixels((u - .5 * torch.autograd.grad(loss, u)[0]).detach())
    assert (method.compress(digits, ipc=2, seed=1, device="cpu").x - plain).abs().max() < 1e-4


EXPERTS = Experts(Adversarial(PGD(Linf(.1), 2)), n=2, epochs=2, batch=500, augment="")
ROBUST = FeatureMatching(iterations=1, lr=.5, look="rows", experts=EXPERTS, attacked=PGD(Linf(.1), 2), augment="",
                         gap="l1_squared", weight=.2, ce=3., **SMALL)
WAVES = FeatureMatching(iterations=1, lr=.01, look="line", experts=EXPERTS, gap="characteristic", frequencies=50,
                        weight=300., ce=1., factor=2, optimizer="adam", augment="", **SMALL)


@pytest.fixture(scope="module")
def buffers(digits, tmp_path_factory):
    "A folder with the experts."
    folder = tmp_path_factory.mktemp("experts")
    EXPERTS(NARROW, digits, folder=folder, device="cpu")
    return folder


def an_expert(draw, digits, buffers):
    "The expert that a draw stands for: its rows, and the generator of where to look."
    paths, g = EXPERTS(NARROW, digits, folder=buffers, device="cpu"), generator_of(draw, "look")
    return paths.read(int(torch.randint(2, (), generator=g)), [0, 1, 2]), g


def with_weights(digits, theta):
    net = NARROW(digits, 5).train()
    torch.nn.utils.vector_to_parameters(theta, net.parameters())
    return net


def test_a_robust_look_is_the_loss_written_out(digits, buffers):
    scale = Scale(digits)
    u, y = first_images(digits, [2] * 10, "real", scale, 1)
    g, real, loss = generator_of(1, "iteration", 0), RealBatches(digits, scale), 0.
    draw = drawn(g)
    rows, where = an_expert(draw, digits, buffers)
    net = with_weights(digits, rows[int(torch.randint(3, (), generator=where))])
    u.requires_grad_()
    for c in range(10):
        Siamese("", digits.name, g)
        x, own = scale.pixels(real(c, 20, g)), u[y == c]
        x = scale.normalise(PGD(Linf(.1), 2)(net, x, torch.full((20,), c), generator_of(draw, "attack", c)))
        gap = (net.model.embed(own).mean(0) - net.model.embed(x).mean(0).detach()).abs().sum() / 2
        loss = loss + .2 * gap ** 2 + 3. * F.cross_entropy(net.model(own), y[y == c])
    plain = scale.pixels((u - .5 * torch.autograd.grad(loss, u)[0]).detach())
    made = ROBUST.compress(digits, ipc=2, seed=1, device="cpu", buffers=buffers)
    assert (made.x - plain).abs().max() < 1e-4


def enlarged(u):
    "The four quarters of each image, above first."
    quarters = [u[..., a:a + 14, b:b + 14] for a in (0, 14) for b in (0, 14)]
    big = [F.interpolate(q, size=(28, 28), mode="bilinear", align_corners=False) for q in quarters]
    return torch.stack(big, 1).flatten(0, 1)


def test_a_look_on_the_line_is_the_loss_written_out(digits, buffers):
    "The slope of Adam's first step is its sign; so the loss is compared, and that it went down."
    scale, log = Scale(digits), []
    x, _ = first_images(digits, [8] * 10, "real", scale, 1)
    small = F.avg_pool2d(x, 2).view(20, 2, 2, 14, 14)
    u = small.permute(0, 1, 3, 2, 4).reshape(20, 1, 28, 28)
    g, real, loss = generator_of(1, "iteration", 0), RealBatches(digits, scale), 0.
    draw = drawn(g)
    rows, where = an_expert(draw, digits, buffers)
    net = with_weights(digits, rows[0].lerp(rows[2], torch.rand((), generator=where)))
    judge = with_weights(digits, rows[2])
    t = torch.randn(96, 50, generator=generator_of(draw, "frequencies"))
    for c in range(10):
        Siamese("", digits.name, g)
        own, goal = enlarged(u[2 * c:2 * c + 2]), real(c, 20, g)
        phi = [torch.complex(*waves(net.model.embed(v), t).mean(0).view(2, -1)) for v in (own, goal)]
        gap = ((phi[0] - phi[1]).abs() / 2 ** .5).mean()
        loss = loss + 300 * gap + F.cross_entropy(judge.model(own), torch.full((8,), c))
    made = WAVES.compress(digits, ipc=2, seed=1, device="cpu", buffers=buffers, log=log)
    assert log == [pytest.approx(loss.item(), rel=1e-3)] and len(made) == 80
    moved = (made.x - scale.pixels(enlarged(u))).abs().max()
    assert 0 < moved <= .01 * scale.std.max() * 1.001


def test_tiles_tell_where_they_began(digits, buffers):
    first = DistributionMatching(iterations=1, **SMALL).compress(digits, ipc=4, device="cpu")
    again = replace(WAVES, init=first).compress(digits, ipc=1, device="cpu", buffers=buffers)
    assert again.provenance["tiles"] == {"stored": 10, "each_holds": 4, "images": 40}
    assert again.provenance["start"]["fingerprint"] == first.fingerprint
    with pytest.raises(BadArgument, match="init has 4 images of class 0, 8 are asked for"):
        replace(WAVES, init=first).compress(digits, ipc=2, device="cpu", buffers=buffers)


@pytest.mark.parametrize("method", [ROBUST, WAVES])
def test_a_look_through_experts_goes_on_to_the_same_bytes(digits, buffers, method, tmp_path):
    method, run = replace(method, iterations=5, augment=DSA), dict(ipc=2, device="cpu", buffers=buffers)
    whole, noted = method.compress(digits, **run), dict(checkpoint=tmp_path / "run", every=1)
    with pytest.raises(KeyboardInterrupt): method.compress(digits, **run, **noted, log=Unplugged(4))
    assert torch.equal(method.compress(digits, **run, **noted).x, whole.x)


def test_experts_are_an_ingredient(digits, own_store, tmp_path):
    what, = ROBUST.ingredients
    kept = what(digits, "cpu")
    assert [p.exists() for p in kept.files] == [True] * 2 and not DistributionMatching().ingredients
    assert ROBUST.compress(digits, ipc=2, device="cpu").x.isfinite().all()
    assert {p.parent for p in kept.files} == {p.parent for p in tmp_path.rglob("expert_*")}


class Unplugged(list):
    "A log that pulls the plug after `n` steps."
    def __init__(self, n):
        super().__init__()
        self.n = n

    def append(self, v):
        super().append(v)
        if len(self) == self.n: raise KeyboardInterrupt


DC = GradientMatching(iterations=4, outer=3, inner=2, augment=DSA, lr_label=.1, **SMALL)
DD = BackpropThroughTraining(iterations=9, epochs=2, batch_real=50, halve_every=3, lr_label=.1, net=NARROW)


@pytest.mark.parametrize("method", [DC, DistributionMatching(iterations=9, **SMALL), DD])
def test_an_interrupted_run_ends_in_the_same_bytes(digits, method, tmp_path):
    path, log, film, whole_log, whole_film = tmp_path / "run", [], {}, [], {}
    run, noted = dict(ipc=2, device="cpu"), dict(checkpoint=path, every=1)
    whole = method.compress(digits, **run, log=whole_log, snapshots=whole_film)
    with pytest.raises(KeyboardInterrupt): method.compress(digits, **run, **noted, log=Unplugged(8), snapshots={})
    resumed = method.compress(digits, **run, **noted, log=log, snapshots=film)
    assert torch.equal(resumed.x, whole.x) and log == whole_log
    assert [*film] == [*whole_film] and all(torch.equal(film[i], whole_film[i]) for i in film)
    assert (whole.soft_labels is None) == (not method.lr_label)
    assert whole.soft_labels is None or torch.equal(whole.soft_labels, resumed.soft_labels)


def test_a_kept_set_knows_its_seconds_if_it_was_made_in_one_go(own_store, tmp_path, monkeypatch):
    method = DistributionMatching(iterations=9, **SMALL)
    compressed("mnist5k:200", method, 1, 1, "cpu")
    look = Story.look
    def cut(self, s, it, last):
        look(self, s, it, last)
        if it == 5: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Story, "look", cut)
        m.setattr(synthetic, "_Keeper", lambda *args: whenever(_Keeper(*args)))
        with pytest.raises(KeyboardInterrupt): compressed("mnist5k:200", method, 1, 2, "cpu")
    assert [*tmp_path.rglob("*.checkpoint")]
    compressed("mnist5k:200", method, 1, 2, "cpu")
    assert seconds_of("mnist5k:200", method, 1, 1) > 0 and seconds_of("mnist5k:200", method, 1, 2) is None


def whenever(keeper):
    "Notes every iteration, not only after two seconds."
    keeper.note.every = 0.
    return keeper


def test_another_run_refuses_the_checkpoint(digits, tmp_path):
    path, method = tmp_path / "run", GradientMatching(iterations=4, **SMALL)
    run = dict(ipc=1, device="cpu", checkpoint=path)
    with pytest.raises(KeyboardInterrupt): method.compress(digits, **run, every=1, log=Unplugged(3))
    before = path.read_bytes()
    for other, seed in ((GradientMatching(iterations=4, lr=.2, **SMALL), 0), (method, 1)):
        with pytest.raises(BadArgument, match="belongs to another run of a distillation: other"):
            other.compress(digits, **run, seed=seed)
    assert path.read_bytes() == before


@pytest.mark.parametrize("norm, parts", [("instance", 3), ("batch", 1), ("none", 3)])
def test_a_network_that_looks_at_the_batch_gets_it_whole(digits, norm, parts):
    method = GradientMatching(batch_real=40, net=Net("convnet", dict(width=4, norm=norm)))
    seen = []
    net = method.net(digits).train()
    net.register_forward_hook(lambda m, i, o: seen.append(len(o)))
    x = digits.images()[:40]
    method._real_gradient(net, [p for p in net.parameters() if p.dim() > 1], x, 0, generator_of(0))
    assert len(seen) == parts and sum(seen) == 40


def test_an_objective_of_the_whole_batch_gets_it_whole(digits):
    class Whole:
        def __call__(self, model, x, y, w=None, generator=None):
            seen.append(len(x))
            return Standard()(model, x, y)

    seen, method = [], GradientMatching(real_objective=Whole(), **SMALL)
    net = method.net(digits).train()
    method._real_gradient(net, [*net.parameters()][:1], digits.images()[:20], 0, generator_of(0))
    assert seen == [20]


def test_parts_of_a_gradient_add_up(digits):
    x = digits.images()[:50]
    gradients = []
    for chunk in (50, 16):
        method = GradientMatching(chunk=chunk, **SMALL)
        net = method.net(digits).double().train()
        weights = [p for p in net.parameters() if p.dim() > 1]
        gradients.append(method._real_gradient(net, weights, x.double(), 3, generator_of(0)))
    for a, b in zip(*gradients): assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)


def test_dead_rows_make_no_nan():
    a = torch.zeros(3, 2, requires_grad=True)
    loss = distance([a], [torch.zeros(3, 2)])
    assert loss == 3 and torch.autograd.grad(loss, a)[0].isfinite().all()


def test_presets_and_overrides():
    dsa, dc = (find_method(name).build("cifar10", 10) for name in ("dsa", "dc"))
    dm = find_method("dm").build("cifar10", 100)
    assert (dsa.augment, dsa.init, dc.augment, dc.init, dm.lr) == (DSA, "real", "", "noise", 10.)
    changed = find_method("dsa").build("cifar10", 10, lr=".3", **{"net.settings.width": "32"})
    assert changed.lr == .3 and changed.net.settings == {"width": 32} and changed.augment == DSA


def test_an_extractor_is_trained_on_the_real_set(digits):
    methods = [DistributionMatching(iterations=2, extractor=e, extractors=2, **SMALL) for e in (None, Trainer(steps=3))]
    plain, trained = (method.compress(digits, ipc=1, device="cpu") for method in methods)
    assert not torch.equal(plain.x, trained.x)


def test_a_saved_set_is_where_the_next_begins(digits, tmp_path):
    first = GradientMatching(iterations=1, **SMALL).compress(digits, ipc=2, device="cpu")
    path = save(first, tmp_path / "first.safetensors")
    methods = [DistributionMatching(iterations=2, init=init, **SMALL) for init in (first, str(path))]
    a, b = (method.compress(digits, ipc=1, device="cpu") for method in methods)
    assert torch.equal(a.x, b.x) and a.provenance["start"]["fingerprint"] == first.fingerprint
    assert load_compressed(save(a, tmp_path / "a.safetensors")).provenance["start"] == a.provenance["start"]
    with pytest.raises(BadArgument, match="init has 2 images of class 0, 3 are asked for"):
        GradientMatching(init=first, **SMALL).compress(digits, ipc=3)


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_augmentation_of_one_image_is_that_of_the_batch(name):
    "Colour images, a draw for each: the same as image by image, and the gradient flows."
    u = torch.randn(5, 3, 32, 32, generator=generator_of(0)).requires_grad_()
    r = torch.rand(3, 5, generator=generator_of(1))
    whole = OPERATIONS[name](u, r)
    assert whole.shape == u.shape
    for i in range(5): assert torch.allclose(whole[i], OPERATIONS[name](u[i:i + 1], r[:, i:i + 1])[0], atol=1e-5)
    assert torch.autograd.grad(whole.square().sum(), u)[0].abs().sum() > 0


def test_labels_keep_their_classes(digits):
    s = State(*first_images(digits, [2, 1] + [0] * 7 + [3], "noise", Scale(digits), 0), Scale(digits), 10)
    assert [s.y[rows].tolist() for rows in s.rows] == [[0, 0], [1]] + [[]] * 7 + [[9, 9, 9]]


def plain_dd(method, data, seed, ipc):
    "DD written out: the walk in one graph on the network's own parameters, torch's Adam."
    scale = Scale(data)
    u, y = first_images(data, [ipc] * 10, "noise", scale, seed)
    raw = torch.full((ipc * method.epochs,), method.first_rate).expm1().log()
    u.requires_grad_()
    raw.requires_grad_()
    opt, real = torch.optim.Adam([u, raw], method.lr, betas=(.5, .999)), RealBatches(data, scale)
    for it in range(method.iterations):
        for group in opt.param_groups: group["lr"] = method.lr * .5 ** (it // method.halve_every)
        g = generator_of(seed, "iteration", it)
        x, labels = real.mixed(method.batch_real, g)
        net = method.net(data, subseed(drawn(g))).model
        names, weights = zip(*net.named_parameters())
        run = lambda w, v: torch.func.functional_call(net, dict(zip(names, w)), v)
        for t in range(len(raw)):
            batch = [c * ipc + t % ipc for c in range(10)]
            grads = torch.autograd.grad(F.cross_entropy(run(weights, u[batch]), y[batch]), weights, create_graph=True)
            weights = [w - F.softplus(raw)[t] * d for w, d in zip(weights, grads)]
        opt.zero_grad()
        F.cross_entropy(run(weights, x), labels).backward()
        opt.step()
        with torch.no_grad(): u.copy_(scale.normalise(scale.pixels(u)))
    return scale.pixels(u.detach()), F.softplus(raw.detach())


def test_dd_is_the_published_loop(digits):
    method = BackpropThroughTraining(iterations=3, epochs=2, batch_real=50, halve_every=2, first_rate=.1, net=NARROW)
    made, (x, rates) = method.compress(digits, ipc=2, seed=5, device="cpu"), plain_dd(method, digits, 5, 2)
    assert (made.x - x).abs().max() < 1e-3 and torch.allclose(torch.tensor(made.schedule["lrs"]), rates, atol=1e-4)


def test_a_student_follows_the_walk_from_the_file(digits, tmp_path):
    made = load_compressed(save(DD.compress(digits, ipc=2, device="cpu"), tmp_path / "dd.safetensors"))
    assert [len(b) for b in made.schedule["batches"]] == [10] * 4 == [len(i) for i in walk_of(made.y, 2)]
    seen = []
    Trainer(steps=7)(NARROW, made, 0, "cpu", watch=lambda step: seen.append(step.rows.tolist()))
    assert seen == made.schedule["batches"]
