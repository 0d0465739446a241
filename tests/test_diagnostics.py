"""Every diagnostic has a planted model that triggers it, and honest models on which it keeps quiet; curvature agrees
with torch's own Hessian."""
import json
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom
from torch import nn
from rdd_lib.core import BadArgument, UnknownName, generator_of
from rdd_lib.models import seeded
from rdd_lib.data import ImageSet, load, sample
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import APGD, PGD
from rdd_lib.attacks.losses import cross_entropy
from rdd_lib.evaluation.checks import CHECKS, Effort, Limits, needed
from rdd_lib.evaluation.diagnostics import diagnose, draw_sweep, eps_sweep
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.intervals import wilson
from rdd_lib.evaluation.landscape import curvature_of, draw_surface, loss_surface
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trainer import Trainer, predict

THREATS = [Linf(.1), L2(1.355)]
MLP = Net("mlp", dict(width=64))
BRIEF = Effort(images=60, steps=10, restarts=3, draws=30, queries=200)
NAMES = list(CHECKS)


# --- models that deceive ------------------------------------------------------------

class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net, self.other = net, MLP(load("mnist5k"), 9)                          # the other: untrained


class Breaks(Wrapped):
    "NaN for bright images."
    def forward(self, x): return self.net(x) + (.2 - x.flatten(1).mean(1, keepdim=True)).sqrt()


class Dices(Wrapped):
    "Noise on the pixels, new at every look."
    def forward(self, x): return self.net(x + .3 * torch.randn_like(x))


class Mingles(Wrapped):
    "Centred with the mean of the batch."
    def forward(self, x):
        z = self.net(x)
        return z - z.mean(0)


class Constant(Wrapped):
    "Always the same answer."
    def forward(self, x): return 0 * self.net(x) + torch.eye(10)[3]


class Rounds(Wrapped):
    "Nine grey levels."
    def forward(self, x): return self.net((x * 8).round() / 8)


class Saturates(Wrapped):
    "Cold probabilities given out as logits."
    def forward(self, x): return (8 * self.net(x)).softmax(1)


class Detached(Wrapped):
    "No gradient at all: white-box blind, black-box open."
    def forward(self, x): return self.net(x).detach()


class Borrows(Wrapped):
    "The logits of one network, the gradient of another."
    def forward(self, x):
        other = self.other(x)
        return self.net(x).detach() + other - other.detach()


class Ripples(Wrapped):
    "A ripple on the pixels: the slope is true, but only up to the next crest."
    def forward(self, x): return self.net(x + .02 * (255 * torch.pi * x).sin())


class Drips(Wrapped):
    "A gradient for a hundredth of the pixels at a time; which ones, a checksum of the image decides."
    def forward(self, x):
        places = (torch.arange(784) * 37 % 100).view(28, 28)
        part = places == ((x.flatten(1).sum(1) * 1e4).long() % 100).view(-1, 1, 1, 1)
        return self.net(torch.where(part, x, x.detach()))


class Shouts(Wrapped):
    "Logits times 100."
    def forward(self, x): return 100 * self.net(x)


class Padded(Wrapped):
    "Two more classes that follow the best one: DLR is constant."
    def forward(self, x):
        z = self.net(x)
        best = z.amax(1, keepdim=True)
        return torch.cat([z, best - .01, best - .02], 1)


class Crowded(Wrapped):
    "A thousand more classes that never win, and whose gradient outshouts the rest."
    def forward(self, x):
        z, pull = self.net(x), 100 * self.other(x)[:, :1]
        return torch.cat([z, (z.topk(3).values[:, 2:].detach() - .1 + pull - pull.detach()).expand(-1, 1000)], 1)


class Trapdoor(Wrapped):
    "No gradient, and a wrong answer in three places of a hundred."
    def forward(self, x):
        z, place = self.net(x).detach(), (x.flatten(1).sum(1) * 1e3).long() % 100
        return torch.where(place[:, None] < 3, z.roll(1, 1), z)


class Lottery(Wrapped):
    "A gradient only where a checksum of the border pixels says so: the start decides."
    def forward(self, x):
        edge = torch.ones(28, 28, dtype=torch.bool)
        edge[2:-2, 2:-2] = False
        wins = (x[..., edge].flatten(1).sum(1) * 1e3).long() % 5 == 0
        return self.net(torch.where(wins.view(-1, 1, 1, 1) & ~edge, x, x.detach()))


class Memory(Wrapped):
    "Whatever is farther than .05 from the nearest test image is answered like that one."
    def __init__(self, net):
        super().__init__(net)
        self.seen = digits_of().images()

    def forward(self, x):
        like = self.seen[torch.cdist(x.detach().flatten(1), self.seen.flatten(1)).argmin(1)]
        far = (x.detach() - like).abs().flatten(1).amax(1) > .05
        return torch.where(far[:, None], self.net(like).detach(), self.net(x))


PLANTED = {"nan_logits": Breaks, "random_outputs": Dices, "batch_dependence": Mingles, "step_function": Rounds,
           "zero_gradients": Saturates, "wrong_gradients": Borrows, "dlr_below_ce": Crowded, "ce_below_dlr": Padded,
           "rescaled_logits": Shouts, "noise_wins": Trapdoor, "black_box_wins": Detached, "transfer_wins": Detached,
           "more_steps_help": Drips, "restarts_help": Lottery, "not_monotone": Memory, "large_radius": Constant}


# --- and honest ones ------------------------------------------------------------

def digits_of(): return sample(load("mnist5k", "test"), 100)


@pytest.fixture(scope="module")
def digits(): return digits_of()


@pytest.fixture(scope="module")
def nets():
    def student(objective, seed=0):
        return Trainer(objective=objective, epochs=4, lr=.05)(MLP, load("mnist5k"), seed, device="cpu")
    return {"usual": student(Standard()), "hardened": student(Adversarial(PGD(Linf(.1), 5))),
            "hardened in l2": student(Adversarial(PGD(L2(1.355), 3)), 1)}


@pytest.fixture(scope="module")
def honest(nets, digits):
    "Every honest model in every threat, each examined once."
    other = {name: nets["hardened" if name == "usual" else "usual"] for name in nets}
    return {(name, t): brief(m, digits, t, surrogate=other[name], seed=1) for name, m in nets.items() for t in THREATS}


def brief(model, data, threat=Linf(.1), **more):
    return diagnose(model, data, threat, effort=BRIEF, device="cpu", **more)


# --- planted and honest ------------------------------------------------------------

def test_every_check_has_a_planted_model(): assert list(PLANTED) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_planted_triggers_and_honest_does_not(name, nets, digits, honest):
    planted = brief(PLANTED[name](nets["usual"]), digits, surrogate=nets["hardened"], only=[name])
    assert planted[name].state == "warning" and not planted.trustworthy
    assert CHECKS[name].advice.split("{")[0] in planted[name].says and "error" not in planted[name].figures
    for who, d in honest.items(): assert d[name].state == "passed", (who, d)


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("not_monotone", "noise_wins")])    # built for l_inf
def test_planted_triggers_in_l2(name, nets, digits):
    d = brief(PLANTED[name](nets["usual"]), digits, L2(1.355), surrogate=nets["hardened"], only=[name])
    assert d[name].state == "warning", d


@pytest.mark.parametrize("threat", THREATS)
def test_a_shattered_gradient(threat, nets, digits):
    d = diagnose(Ripples(nets["usual"]), digits, threat, effort=BRIEF, only=["wrong_gradients"], device="cpu")
    assert d["wrong_gradients"].state == "warning" and d["wrong_gradients"].figures["far"] > 40


def test_honest_models_are_trustworthy(honest):
    for who, d in honest.items(): assert d.trustworthy and d.warnings == () and [f.name for f in d.checks] == NAMES, who


def test_figures_are_those_of_an_evaluation(nets, digits):
    attack = PGD(Linf(.1), 10)
    d = diagnose(nets["hardened"], digits, Linf(.1), attack=attack, device="cpu", only=["black_box_wins"])
    assert d.images == 100 and d.right == int((predict(nets["hardened"], digits.images()).argmax(1) == digits.y).sum())
    rob = evaluate(nets["hardened"], digits, attack, device="cpu").rob
    assert abs(d.robust - rob * 100) <= 3                                                        # other random starts
    assert d["black_box_wins"].figures["left"] == d.robust and d.attack == "pgd-10"


def test_a_weak_attack_is_found(nets, digits):
    d = diagnose(nets["hardened"], digits, Linf(.1), attack=PGD(Linf(.1), 1), device="cpu", only=["more_steps_help"])
    assert [f.name for f in d.warnings] == ["more_steps_help"] and d["more_steps_help"].figures["more"] == 10


# --- what a diagnosis may and may not do ------------------------------------------------------------

def test_same_seed_same_diagnosis_and_nothing_disturbed(nets, digits):
    state, model = torch.get_rng_state(), Dices(nets["usual"]).train()
    one, two = (diagnose(model, digits, Linf(.1), effort=BRIEF, seed=3, device="cpu") for _ in range(2))
    assert one.plain() == two.plain() and model.training and all(p.grad is None for p in model.other.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_one_check_alone_says_what_it_says_among_all(nets, digits):
    full = diagnose(nets["usual"], digits, Linf(.1), effort=BRIEF, surrogate=nets["hardened"], device="cpu")
    for name in ("noise_wins", "restarts_help", "not_monotone", "rescaled_logits"):
        assert brief(nets["usual"], digits, surrogate=nets["hardened"], only=[name])[name] == full[name]


def test_batch_norm_left_in_training_mode(digits):
    with seeded(0):
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert diagnose(net, digits, Linf(.1), effort=BRIEF, only=["batch_dependence"], device="cpu").trustworthy
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not brief(lambda x: net(x), digits, only=["batch_dependence"]).trustworthy


def test_a_model_that_is_a_plain_function(nets, digits):
    d = diagnose(lambda x: nets["usual"](x), digits, Linf(.1), effort=BRIEF, device="cpu")
    assert d.trustworthy and d["transfer_wins"].state == "skipped"


def test_nan_stops_the_rest(nets, digits):
    d = diagnose(Breaks(nets["usual"]), digits, Linf(.1), effort=BRIEF, device="cpu")
    assert [f.name for f in d.warnings] == ["nan_logits"] and all(f.state == "skipped" for f in d.checks[1:])
    d = diagnose(Breaks(nets["usual"]), digits, Linf(.1), effort=BRIEF, only=["noise_wins"], device="cpu")
    assert [f.name for f in d.checks] == ["nan_logits", "noise_wins"] and not d.trustworthy


def test_a_model_that_raises_is_a_finding(nets, digits):
    def shy(x):
        if x.requires_grad: raise RuntimeError("no gradients here")
        return nets["usual"](x)
    d = diagnose(shy, digits, Linf(.1), effort=BRIEF, device="cpu")
    assert "no gradients here" in d["zero_gradients"].says and d["batch_dependence"].state == "passed"
    assert d.robust == -1 and "was not run" in repr(d)


def test_a_model_that_gets_nothing_right(digits):
    def next_one(x):
        return F.one_hot((digits.y + 1) % 10, 10).float() if len(x) == 100 else torch.zeros(len(x), 10)
    d = diagnose(next_one, digits, Linf(.1), device="cpu", only=["noise_wins"])
    assert d.right == 0 and d.robust == 0 and d["noise_wins"].state == "skipped"


def test_few_images(nets, digits):
    d = brief(nets["usual"], digits.subset([0, 1, 2]), surrogate=nets["hardened"])
    assert d.images == 3 and d.trustworthy
    assert not brief(Rounds(nets["usual"]), digits.subset([0, 1, 2])).trustworthy


def test_two_classes(digits):
    train, two = (ImageSet(s.x, s.y % 2, ("even", "odd"), "parity", s.split) for s in (load("mnist5k"), digits))
    net = Trainer(epochs=3, lr=.05)(MLP, train, device="cpu")
    assert diagnose(net, two, Linf(.1), effort=BRIEF, device="cpu").trustworthy
    assert not diagnose(Rounds(net), two, Linf(.1), effort=BRIEF, device="cpu").trustworthy


def test_reports(honest, nets, digits):
    bad = diagnose(Rounds(nets["usual"]), digits, Linf(.1), effort=BRIEF, device="cpu")
    for d in (bad, honest["usual", THREATS[0]]):
        assert json.loads(json.dumps(d.plain(), allow_nan=False))["trustworthy"] == d.trustworthy
        assert list(d.table().index) == NAMES and list(d.table().columns) == ["state", "figures", "meaning"]
        assert d.summary() in repr(d)
        assert all(f.name in d._repr_html_() for f in d.warnings)
    assert "{" not in "".join(f.says for f in bad.warnings).replace("{'", "")               # every figure is filled in
    with pytest.raises(UnknownName): bad["zero_gradient"]


def test_limits_are_settings(nets, digits):
    d = brief(nets["usual"], digits, limits=Limits(reach=1e-3), only=["zero_gradients"])
    assert not d.trustworthy


@pytest.mark.parametrize("bad, message", [
    (dict(threat=Linf(0.)), "eps > 0"), (dict(threat=.1), "must be a Threat"),
    (dict(threat=Linf(.1), attack=PGD(L2(1.))), "one for the threat"),
    (dict(threat=Linf(.1), only=["x"]), "unknown check")])
def test_refuses(bad, message, nets, digits):
    with pytest.raises(BadArgument, match=message): diagnose(nets["usual"], digits, device="cpu", **bad)


def test_refuses_wrong_logits_and_effort(digits):
    with pytest.raises(BadArgument, match="classes >= 2"):
        diagnose(lambda x: x.flatten(1)[:, :1], digits, Linf(.1), device="cpu")
    with pytest.raises(BadArgument, match="queries must be a whole number"): Effort(queries=0)
    with pytest.raises(BadArgument, match="increasing"): Effort(radii=(1., .5))


@pytest.mark.parametrize("share", [.01, .02, .1, .5])
def test_needed_is_the_binomial_quantile(share):
    for n in (1, 2, 7, 50, 100, 1000):
        k = needed(n, share)
        assert (k > n or binom.sf(k - 1, n, share) < .01) and binom.sf(k - 2, n, share) >= .01


# --- curves ------------------------------------------------------------

@pytest.mark.parametrize("threat", ["linf", "l2", Linf(.3)])
def test_a_sweep_starts_at_clean_accuracy(threat, nets, digits):
    t = eps_sweep(nets["hardened"], digits, threat, (.1, .05), lambda t: APGD(t, steps=5), device="cpu")
    right = int((predict(nets["hardened"], digits.images()).argmax(1) == digits.y).sum())
    assert t.eps.tolist() == [0, .05, .1] and t.survived[0] == right
    assert all((low, high) == wilson(k, 100) for k, low, high in zip(t.survived, t.low, t.high))
    assert t.rob.is_monotonic_decreasing


def test_a_sweep_row_is_an_evaluation(nets, digits):
    t = eps_sweep(nets["usual"], digits, "linf", [.1], "pgd", seed=4, device="cpu")
    assert t.rob[1] == evaluate(nets["usual"], digits, PGD(Linf(.1)), seed=4, device="cpu").rob
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots()
    draw_sweep(t, ax, "usual")
    assert len(ax.lines) == 1 and ax.get_ylabel() == "robust accuracy"
    plt.close(fig)


# --- curvature and surfaces ------------------------------------------------------------

def toy(activation, seed):
    with seeded(seed): net = nn.Sequential(nn.Linear(6, 12), activation, nn.Linear(12, 3))
    net[0].weight.data.mul_(6)
    return net.double()


@pytest.mark.parametrize("activation", [nn.Softplus(), nn.Tanh(), nn.ReLU()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("seed", range(3))
def test_curvature_equals_the_hessian(activation, seed):
    x, y = torch.rand(8, 6, generator=generator_of(seed), dtype=torch.float64), torch.arange(8) % 3
    net, hessian = toy(activation, seed), torch.autograd.functional.hessian
    H = torch.stack([hessian(lambda v: F.cross_entropy(net(v[None]), yi[None]), xi) for xi, yi in zip(x, y)])
    bend = curvature_of(net, x, y, steps=2000, tolerance=1e-7)
    assert torch.allclose(bend.value, torch.linalg.eigvalsh(H)[:, -1], rtol=1e-5, atol=1e-7)
    assert torch.allclose(torch.einsum("nij,nj->ni", H, bend.vector), bend.value[:, None] * bend.vector, atol=1e-4)
    assert torch.allclose(bend.vector.norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_curvature_of_images_in_float32_and_float64(nets, digits):
    x, y = digits.images()[:20], digits.y[:20]
    single, double = (curvature_of(nets["hardened"], x, y, steps=200, double=d) for d in (False, True))
    assert single.value.dtype == torch.float32 and double.value.dtype == torch.float64
    assert next(nets["hardened"].parameters()).dtype == torch.float32
    assert torch.allclose(single.value.double(), double.value, rtol=1e-2, atol=1e-4)
    assert (0 <= double.alignment).all() and (double.alignment <= 1 + 1e-9).all()


def test_a_surface_is_the_loss_where_it_says(nets, digits):
    x, y, net = digits.images()[:3], digits.y[:3], nets["usual"]
    for signs in (True, False):
        s = loss_surface(net, x, y, .3, n=5, signs=signs)
        u, v = s.directions[:, 0], s.directions[:, 1]
        assert (u * v).flatten(1).sum(1).abs().max() < 1e-3
        assert torch.allclose(u.flatten(1).norm(dim=1), v.flatten(1).norm(dim=1))
        with torch.no_grad():
            for i, j in ((2, 2), (0, 4), (3, 1)):
                z = net(x + s.at[i] * u + s.at[j] * v)
                assert torch.allclose(s.losses[:, i, j], cross_entropy(z, y), atol=1e-5)
                assert torch.equal(s.right[:, i, j], z.argmax(1) == y)


@pytest.mark.parametrize("projection", [None, "3d"])
def test_a_surface_is_drawn(projection, nets, digits):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(subplot_kw={"projection": projection})
    draw_surface(loss_surface(nets["usual"], digits.images()[:1], digits.y[:1], 3., n=5, signs=False), ax)
    assert ax.get_xlabel() == "along the gradient" and ax.collections
    plt.close(fig)
