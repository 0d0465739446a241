"""Every objective against its formula in plain autograd: weights, soft labels, passes through the network, draws."""
import copy
from dataclasses import replace
from functools import partial
from importlib.metadata import EntryPoint
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from rdd_lib import core
from rdd_lib.core import BadArgument, UnknownName, digest, generator_of
from rdd_lib.models import seeded
from rdd_lib.data import load, sample
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import PGD
from rdd_lib.models import eval_mode
from rdd_lib.training.curvature import Curvature, cure, unit
from rdd_lib.training.fast import Free, fast
from rdd_lib.training.input_gradient import GradientPenalty
from rdd_lib.training.mart import Mart, boosted
from rdd_lib.training.objectives import (OBJECTIVES, Adversarial, Standard, depends_on_mode, generalized, hard,
                                         objective_of, searching, session_of, trait)
from rdd_lib.training.cost import cost
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trades import Trades, divergence
from rdd_lib.training.trainer import Trainer, batches

THREATS = [Linf(.1), L2(.5)]
PENALTIES = {"curvature": Curvature(2., .7), "sign": cure(2., .7),
             "gradient l2": GradientPenalty(.5), "gradient l1": GradientPenalty(.05, 1),
             "difference l2": GradientPenalty(.5, h=.3), "difference l1": GradientPenalty(.05, 1, h=.05)}
SEARCHING = {"adversarial": Adversarial(PGD(Linf(.1), 3)), "generalized": generalized(PGD(Linf(.1), 3), .05),
             "fast": fast(Linf(.1)), "trades": Trades(Linf(.1), steps=3), "mart": Mart(PGD(Linf(.1), 3))}
AUTHORS = {v: Curvature(2., .7, v) for v in ("authors_cifar", "authors_imagenet")}
ALL = {"standard": Standard()} | PENALTIES | SEARCHING | AUTHORS | {"free": Free(Linf(.1))}


def smooth(dtype=torch.double):
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(3 * 16, 8), nn.Softplus(),
                             nn.Linear(8, 3)).to(dtype)


def with_batch_norm():
    with seeded(0):
        return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(.3), nn.Flatten(),
                             nn.Linear(3 * 16, 3)).train()


@pytest.fixture
def batch():
    g = generator_of(0)
    return torch.rand(10, 1, 6, 6, generator=g, dtype=torch.double) * .6 + .2, torch.randint(3, (10,), generator=g)


def slopes(loss, model):
    weights = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def each(model, x, y): return F.cross_entropy(model(x), y, reduction="none")


def gradient_at(model, x, y, graph=True):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(each(model, x, y).sum(), x, create_graph=graph)[0]


def lengths(d, p=2): return d.flatten(1).norm(p, dim=1)


def probe(model, x, y, direction):
    g = gradient_at(model, x, y, False)
    g = g.sign() if direction == "sign" else g
    return (g / lengths(g).view(-1, 1, 1, 1)).detach()


def bent(model, x, y, z, lam, h):
    "Curvature's loss, z given."
    turn = gradient_at(model, x + h * z, y) - gradient_at(model, x, y)
    return F.cross_entropy(model(x), y) + lam * lengths(turn).square().mean()


# ---------- values and gradients against plain statements

@pytest.mark.parametrize("direction", ["gradient", "sign"])
def test_curvature_is_its_formula_and_so_is_its_gradient(batch, direction):
    x, y = batch
    model, lam, h = smooth(), 2., .7
    z = probe(model, x, y, direction)
    naive = lambda: bent(model, x, y, z, lam, h)
    ours = Curvature(lam, h, direction=direction)(model, x, y)
    torch.testing.assert_close(ours, naive())
    torch.testing.assert_close(slopes(ours, model), slopes(naive(), model))


def test_curvature_gradient_against_finite_differences(batch):
    "z is a constant of the training: the differences are taken with z held where it was."
    x, y = batch
    model, lam, h = smooth(), 2., .7
    z = probe(model, x, y, "gradient")
    value = lambda: bent(model, x, y, z, lam, h).item()
    grad = slopes(Curvature(lam, h)(model, x, y), model)
    flat = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    for k in torch.randperm(len(flat), generator=generator_of(1))[:25]:
        there = []
        for step in (1e-5, -1e-5):
            moved = flat.clone()
            moved[k] += step
            torch.nn.utils.vector_to_parameters(moved, model.parameters())
            there.append(value())
        torch.nn.utils.vector_to_parameters(flat, model.parameters())
        assert (there[0] - there[1]) / 2e-5 == pytest.approx(grad[k].item(), rel=1e-5, abs=1e-8)


def test_the_authors_variants(batch):
    x, y = batch
    model = smooth()
    z = probe(model, x, y, "gradient")
    mean_gradient = lambda a: torch.autograd.grad(F.cross_entropy(model(a), y), a, create_graph=True)[0]
    near, far = x.clone().requires_grad_(), (x + .7 * z).requires_grad_()
    cifar = F.cross_entropy(model(x), y) + 2 * lengths(mean_gradient(far) - mean_gradient(near)).mean()
    rise = F.cross_entropy(model(x + .7 * z), y) - F.cross_entropy(model(x), y)
    imagenet = F.cross_entropy(model(x), y) + 2 * rise.abs()
    for variant, naive in (("authors_cifar", cifar), ("authors_imagenet", imagenet)):
        ours = Curvature(2., .7, variant)(model, x, y)
        torch.testing.assert_close(ours, naive)
        torch.testing.assert_close(slopes(ours, model), slopes(naive, model))


@pytest.mark.parametrize("norm", [1, 2])
def test_gradient_penalty(batch, norm):
    x, y = batch
    model = smooth()
    exact = F.cross_entropy(model(x), y) + .5 * lengths(gradient_at(model, x, y), norm).square().mean()
    ours = GradientPenalty(.5, norm)(model, x, y)
    torch.testing.assert_close(ours, exact)
    torch.testing.assert_close(slopes(ours, model), slopes(exact, model))
    g = gradient_at(model, x, y, False)
    v = g.sign() if norm == 1 else g / lengths(g).view(-1, 1, 1, 1)
    slope = (each(model, x + .3 * v, y) - each(model, x, y)) / .3
    difference = F.cross_entropy(model(x), y) + .5 * slope.square().mean()
    ours = GradientPenalty(.5, norm, h=.3)(model, x, y)
    torch.testing.assert_close(ours, difference)
    torch.testing.assert_close(slopes(ours, model), slopes(difference, model))
    torch.testing.assert_close(GradientPenalty(.5, norm, h=1e-6)(model, x, y), exact, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("threat", THREATS)
def test_trades_is_its_formula_and_its_climb_the_published_one(batch, threat):
    x, y = batch
    model = smooth()
    p = model(x).softmax(1).detach()
    noise = torch.randn(x.shape, generator=generator_of(3), dtype=x.dtype)
    at = (x + .001 * noise).clamp(0, 1)
    for _ in range(4):
        at = at.detach().requires_grad_()
        g = torch.autograd.grad((p * (p.log() - model(at).log_softmax(1))).sum(), at)[0]
        if isinstance(threat, Linf):
            at = torch.min(torch.max(at.detach() + .025 * g.sign(), x - .1), x + .1).clamp(0, 1)
        else:
            d = at.detach() + .125 * g / lengths(g).view(-1, 1, 1, 1) - x
            at = (x + d * (threat.eps / lengths(d).clamp_min(threat.eps)).view(-1, 1, 1, 1)).clamp(0, 1)
    q, p = model(at.detach()).softmax(1), model(x).softmax(1)
    naive = F.cross_entropy(model(x), y) + 6 * (p * (p / q).log()).sum(1).mean()
    ours = Trades(threat, steps=4)(model, x, y, None, generator_of(3))
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(slopes(ours, model), slopes(naive, model))


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_boosted_cross_entropy(classes):
    logits, y = torch.randn(40, classes, generator=generator_of(0), dtype=torch.double), torch.arange(40) % classes
    p = logits.softmax(1)
    rival = torch.stack([torch.cat([row[:k], row[k + 1:]]).max() for row, k in zip(p, y)])
    torch.testing.assert_close(boosted(logits, y), -p[torch.arange(40), y].log() - (1 - rival).log())
    assert torch.isfinite(boosted(logits.float() * 1e4, y)).all()


def test_mart(batch):
    x, y = batch
    model, attack = smooth(), PGD(Linf(.1), 3)
    at = attack(model, x, y, generator_of(5))
    p, q = model(x).softmax(1), model(at).softmax(1)
    naive = (boosted(model(at), y) + 4 * (p * (p / q).log()).sum(1) * (1 - p[torch.arange(10), y])).mean()
    ours = Mart(attack, 4.)(model, x, y, None, generator_of(5))
    torch.testing.assert_close(ours, naive)
    torch.testing.assert_close(slopes(ours, model), slopes(naive, model))


def test_fast_is_one_long_step_from_a_uniform_start(batch):
    x, y = batch
    model, u = smooth(), torch.rand(x.shape, generator=generator_of(7), dtype=x.dtype)
    start = (x + .1 * (2 * u - 1)).clamp(0, 1)
    at = torch.min(torch.max(start + .125 * gradient_at(model, start, y, False).sign(), x - .1), x + .1).clamp(0, 1)
    torch.testing.assert_close(fast(Linf(.1))(model, x, y, None, generator_of(7)), F.cross_entropy(model(at), y))


# ---------- free training

@pytest.mark.parametrize("threat", THREATS)
def test_free_against_a_loop_by_hand(threat):
    "Perturbations, losses and weights over two batches of different size, three replays each."
    g = generator_of(0)
    x, y = torch.rand(9, 1, 6, 6, generator=g), torch.randint(3, (9,), generator=g)
    parts = [torch.arange(5), torch.arange(5, 9), torch.arange(5)]
    ours, theirs = smooth(torch.float), smooth(torch.float)
    run, delta = Free(threat, 3, step_size=threat.eps / 2).session(), torch.zeros(5, 1, 6, 6)
    opts = [torch.optim.SGD(m.parameters(), .1, .9) for m in (ours, theirs)]
    for i in parts:
        for _ in range(3):
            n = len(i)
            at = (x[i] + delta[:n]).clamp(0, 1).requires_grad_()
            loss = F.cross_entropy(theirs(at), y[i])
            opts[1].zero_grad()
            loss.backward()
            opts[1].step()
            if isinstance(threat, Linf):
                delta[:n] = (delta[:n] + threat.eps / 2 * at.grad.sign()).clamp(-threat.eps, threat.eps)
            else:
                moved = delta[:n] + threat.eps / 2 * at.grad / lengths(at.grad).view(-1, 1, 1, 1)
                delta[:n] = moved * (threat.eps / lengths(moved).clamp_min(threat.eps)).view(-1, 1, 1, 1)
            mine = run(ours, x[i], y[i])
            opts[0].zero_grad()
            mine.backward()
            opts[0].step()
            torch.testing.assert_close(mine, loss)
            torch.testing.assert_close(run.delta, delta, rtol=1e-4, atol=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters()): torch.testing.assert_close(a, b)


def test_free_without_a_session_or_without_a_backward_pass_is_refused(batch):
    x, y = batch
    with pytest.raises(BadArgument, match="session"): Free(Linf(.1))(smooth(), x, y)
    run = Free(Linf(.1)).session()
    with torch.no_grad(): run(smooth(), x, y), run(smooth(), x, y)                # looking on is no step
    run(smooth(), x, y)
    with pytest.raises(BadArgument, match="never went there"): run(smooth(), x, y)


def test_two_trainings_of_one_free_do_not_share_a_perturbation():
    data, trainer = sample(load("mnist5k"), 60), Trainer(Free(Linf(.1), 2), steps=5, batch=25)
    first, second = ([p.detach() for p in trainer(Net("mlp"), data, 0, "cpu").parameters()] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_the_trainer_replays_batches_and_counts_every_replay_as_a_step():
    data = sample(load("mnist5k"), 60)
    def shown(**settings):
        seen = []
        Trainer(Free(Linf(.1), 3), batch=20, **settings)(Net("mlp"), data, 0, "cpu", watch=seen.append)
        return [tuple(step.rows.tolist()) for step in seen]
    plain = [tuple(i.tolist()) for i, _ in zip(batches(60, 20, generator_of(0, "order")), range(3))]
    assert shown(steps=7) == [plain[0]] * 3 + [plain[1]] * 3 + [plain[2]]
    seen = shown(epochs=3)
    assert len(seen) == 9 and len(set(seen)) == 3         # three epochs' worth of steps, one pass over the data


# ---------- what all of them share

@pytest.mark.parametrize("name", [n for n in ALL if n != "authors_cifar"])      # which divides by the size of its batch
def test_a_weight_of_two_is_an_image_that_stands_there_twice(batch, name):
    x, y = batch
    model = smooth()
    again = torch.cat([torch.arange(10), torch.arange(3)])
    w = torch.ones(10, dtype=torch.double)
    w[:3] = 2
    objective = ALL[name]
    if hasattr(objective, "attack"):
        objective = replace(objective, attack=replace(objective.attack, random_start=False, step_size=.03))
    if name == "trades":                                  # starts differ from row to row: keep them at x
        objective = replace(objective, noise=1e-9, steps=1, step_size=1e-6)
    a, b = (session_of(objective)(model, *args) for args in ((x, y, w * 10 / 13), (x[again], y[again])))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(slopes(a, model), slopes(b, model), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", list(ALL))
def test_soft_labels(batch, name):
    x, y = batch
    model, objective = smooth(), ALL[name]
    soft = F.one_hot(y, 3).double()
    if name == "mart":
        with pytest.raises(BadArgument, match="soft labels of shape"): objective(model, x, soft)
        return
    loss = lambda target: session_of(objective)(model, x, target, None, generator_of(0))
    torch.testing.assert_close(loss(soft), loss(y))
    smeared = loss(.7 * soft + .1)
    smeared.backward()
    assert torch.isfinite(smeared) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("name", list(ALL))
def test_nobody_elses_state_is_touched(batch, name):
    "The global generator, modes (a frozen batch norm's too), running averages but for the loss's own passes, images."
    x, y = (t.float() if t.is_floating_point() else t for t in batch)
    model = with_batch_norm()
    model[1].eval()
    model[3].p = 0.
    before, copies, flags = torch.get_rng_state(), x.clone(), [m.training for m in model.modules()]
    session_of(ALL[name])(model, x, y, None, generator_of(0)).backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(x, copies) and not x.requires_grad and x.grad is None
    assert [m.training for m in model.modules()] == flags and model[1].num_batches_tracked == 0
    model[1].train()
    session_of(ALL[name])(model, x, y, None, generator_of(0))
    two = name in ("trades", "mart")                      # those train on two batches a step: clean and moved
    assert model[1].num_batches_tracked == (2 if two else 1)


@pytest.mark.parametrize("name", list(SEARCHING))
def test_draws_come_from_the_generator(batch, name):
    x, y = batch
    a, b, c = (SEARCHING[name](smooth(), x, y, None, generator_of(s)).item() for s in (0, 0, 1))
    assert a == b and a != c


@pytest.mark.parametrize("name", list(PENALTIES) + list(AUTHORS))
def test_penalties_are_finite_where_gradients_vanish(name):
    "Sure images: gradients that underflow, or are exactly 0."
    x, y = torch.rand(4, 1, 6, 6, generator=generator_of(0)), torch.tensor([0, 0, 1, 1])
    for scale in (0., 1., 30., 1e4):
        model = smooth(torch.float)
        with torch.no_grad(): model[-1].weight *= scale
        loss = (PENALTIES | AUTHORS)[name](model, x, y)
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float, torch.double])
def test_unit(dtype):
    sizes = torch.tensor([1., 1e-20, 1e-30, 1e20, 0.], dtype=dtype).view(-1, 1, 1)
    g = torch.randn(5, 2, 3, generator=generator_of(0), dtype=dtype) * sizes
    u = unit(g)
    torch.testing.assert_close(lengths(u), torch.tensor([1., 1, 1, 1, 0], dtype=dtype))
    largest = lambda d: d.flatten(1).abs().amax(1).view(-1, 1, 1)
    torch.testing.assert_close(u[:4] * largest(g[:4]), g[:4] * largest(u[:4]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", list(PENALTIES))
def test_penalties_work_where_gradients_are_off(batch, name):
    "A loss that is only looked at: under no_grad the value is the same."
    x, y = batch
    with torch.no_grad(): quiet = PENALTIES[name](smooth(), x, y)
    torch.testing.assert_close(quiet, PENALTIES[name](smooth(), x, y))


# ---------- passes

PASSES = {"standard": (1, 1), "adversarial": (4, 4), "generalized": (4, 4), "fast": (2, 2), "free": (1, 1),
          "trades": (5, 5), "mart": (5, 5), "curvature": (2, 4), "sign": (2, 4), "authors_cifar": (2, 4),
          "authors_imagenet": (2, 3), "gradient l2": (1, 2), "gradient l1": (1, 2),
          "difference l2": (2, 3), "difference l1": (2, 3)}
# With batch norm, what eval mode sees is a look of its own.
EXTRA = {"trades": (1, 0)} | dict.fromkeys([*PENALTIES, *AUTHORS], (1, 1))


@pytest.mark.parametrize("name", list(ALL))
def test_passes_through_the_network(batch, name):
    x, y = batch
    count = lambda model, x: tuple(cost(ALL[name], model, x, y)[k] for k in ("forward", "backward"))
    extra = EXTRA.get(name, (0, 0))
    assert count(smooth().train(), x) == PASSES[name]
    assert count(with_batch_norm(), x.float()) == tuple(a + b for a, b in zip(PASSES[name], extra))
    assert count(with_batch_norm().eval(), x.float()) == PASSES[name]


def test_work_counts_the_gradient_of_the_weights(batch):
    "A search computes no gradient of the weights, so it is cheaper than as many training passes."
    x, y = batch
    assert cost(Standard(), smooth(), x, y)["work"] == 1
    work = cost(SEARCHING["adversarial"], smooth(), x, y)["work"]
    assert 1 + 3 * .5 < work < 4
    assert cost(Free(Linf(.1)), smooth(), x, y)["work"] < 1.5


def test_cost_leaves_the_model_alone(batch):
    x, y = batch
    model = with_batch_norm()
    before = copy.deepcopy(model.state_dict())
    cost(SEARCHING["trades"], model, x.float(), y)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert all(p.grad is None for p in model.parameters())


# ---------- small parts

def test_search_modes():
    model = with_batch_norm()
    model[1].eval()
    with searching(model, "eval"): assert not any(m.training for m in model.modules())
    with searching(model, "train"): assert model.training and not model[1].training
    assert model.training and not model[1].training
    makers = (partial(Adversarial, PGD(Linf(.1))), partial(Trades, Linf(.1)), partial(Mart, PGD(Linf(.1))),
              Curvature, GradientPenalty, partial(fast, Linf(.1)))
    for make in makers:
        with pytest.raises(BadArgument, match="search_mode must be 'eval' or 'train', got 'off'"):
            make(search_mode="off")


def test_depends_on_mode_is_careful():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x): return self.fc(F.dropout(x, training=self.training))
    assert depends_on_mode(Own()) and not depends_on_mode(Own().eval())
    assert not depends_on_mode(smooth()) and not depends_on_mode(lambda x: x)
    assert depends_on_mode(nn.Sequential(nn.Linear(4, 2), nn.Dropout()))
    assert not depends_on_mode(nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False)))


def test_hard():
    assert hard(torch.tensor([[.1, .9]])).tolist() == [1] and hard(torch.tensor([3])).tolist() == [3]


def test_divergence_is_kl():
    p, q = (torch.randn(20, 5, generator=generator_of(s), dtype=torch.double) for s in (0, 1))
    torch.testing.assert_close(divergence(p, q), (p.softmax(1) * (p.softmax(1) / q.softmax(1)).log()).sum(1))


def test_the_adversarial_objective_is_still_the_attack_and_then_the_loss(batch):
    x, y = batch
    model = smooth()
    with eval_mode(model): at = PGD(Linf(.1), 3)(model, x, y, generator_of(2))
    loss = SEARCHING["adversarial"](model, x, y, None, generator_of(2))
    assert torch.equal(loss, F.cross_entropy(model(at), y, reduction="none").mean())


# ---------- names

def named(name, threat, **settings):
    return objective_of(name, threat, .05 if name == "generalized" else None, **settings)


def test_objectives_by_name(batch):
    x, y = batch
    for name in OBJECTIVES:
        o = named(name, Linf(.1))
        assert torch.isfinite(session_of(o)(smooth(), x, y, None, generator_of(0))) and digest(o)
    assert objective_of("adversarial", Linf(.1), steps="5").attack == PGD(Linf(.1), 5)
    settings = {"attack.steps": 5, "search_mode": "train"}
    assert objective_of("adversarial", Linf(.1), **settings) == Adversarial(PGD(Linf(.1), 5), search_mode="train")
    assert objective_of("generalized", Linf(.1), eta=.05) == generalized(PGD(Linf(.1)), .05)
    curved = objective_of("curvature", Linf(.1), lam="3", variant="authors_cifar")
    assert curved == Curvature(3., variant="authors_cifar")
    assert objective_of("TRADES", Linf(.1)) == Trades(Linf(.1))


@pytest.mark.parametrize("bad, error", [
    (dict(name="madry"), UnknownName), (dict(name="trades", gamma=1), UnknownName),
    (dict(name="generalized"), BadArgument), (dict(name="trades", eta=.1), BadArgument),
    (dict(name="trades", beta="lots"), BadArgument), (dict(name="trades", beta="-1"), BadArgument)])
def test_bad_names_and_settings(bad, error):
    with pytest.raises(error): objective_of(**(dict(threat=Linf(.1)) | bad))


def squared(threat):
    "What another package might offer: a plain function."
    def loss(model, x, y, w=None, generator=None): return (model(x) - F.one_hot(y, 10)).square().mean()
    return loss


def test_another_package_adds_an_objective(monkeypatch):
    point = EntryPoint("squared", f"{__name__}:squared", "rdd_lib.objectives")
    monkeypatch.setattr(core, "entry_points", lambda group: [point] if group == point.group else [])
    for name in ("found", "names"): monkeypatch.setattr(OBJECTIVES, name, dict(getattr(OBJECTIVES, name)))
    monkeypatch.setattr(OBJECTIVES, "looked", False)
    loss = objective_of("Squared", Linf(.1))
    assert list(OBJECTIVES)[-1] == "squared" and not trait(loss, "per_image") and session_of(loss) is loss
    data = sample(load("mnist5k"), 40)
    model = Trainer(loss, steps=3, lr=.05)(Net("mlp"), data, 0, "cpu")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("name", list(OBJECTIVES))
def test_training_gives_the_same_bits_twice_and_draws_nothing(name):
    data, before = sample(load("mnist5k"), 40), torch.get_rng_state()
    short = dict(steps=2) if name in ("adversarial", "generalized", "trades", "mart") else {}
    o = named(name, L2(1.), **short)
    first, second = (Trainer(o, steps=3, batch=16)(Net("mlp"), data, 0, "cpu").state_dict().values() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second)) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["trades", "curvature", "gradient", "free"])
def test_weighted_and_soft_sets_train(name):
    from rdd_lib.compressed import Compressed
    data = load("mnist5k")
    soft = F.one_hot(data.y[:20], 10).float() * .9 + .01
    S = Compressed(data.x[:20], data.y[:20], data.classes, "mnist5k", weights=torch.arange(1., 21.), soft_labels=soft)
    model = Trainer(objective_of(name, Linf(.1)), steps=3, batch=8)(Net("mlp"), S, 0, "cpu")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("settings", [dict(epochs=0), dict(epochs=1.5), dict(batch=True), dict(steps="9"),
                                      dict(batch=0)])
def test_whole_numbers_of_the_trainer(settings):
    with pytest.raises(BadArgument, match="must be a whole number >= 1"): Trainer(**settings)
