"""Training, unrolled: gradients against the full graph and finite differences, what it remembers, what it refuses."""
import gc
from collections import Counter
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from rdd_lib.core import BadArgument, UnknownName, generator_of
from rdd_lib.models import seeded
from rdd_lib.training.unrolled import UNROLLED, flatten, functional, unroll
from rdd_lib.networks import ConvNet, MLP

EXACT = ("recompute", "graph")


def problem(norm="instance", dtype=torch.double, T=4, width=4, net=None):
    "A network as f, its theta, rates, ten images, logits of soft labels, a goal; and a loss that picks its batch by t."
    if net is None:
        with seeded(0): net = ConvNet(3, 3, 8, width, 2, norm)
    net = net.to(dtype)
    f, theta, g = functional(net), flatten(net), generator_of(1, "problem")
    x, q = torch.rand(10, 3, 8, 8, generator=g).to(dtype), torch.randn(10, 3, generator=g).to(dtype)
    batches = [torch.randperm(10, generator=g)[:6] for _ in range(T)]
    loss = lambda theta, t, x, q: F.cross_entropy(f(theta, x[batches[t]]), q[batches[t]].softmax(1))
    goal = theta + .1 * torch.randn(len(theta), generator=g).to(dtype)
    return loss, theta, torch.linspace(.05, .2, T, dtype=dtype), x, q, goal


def slopes(method, parts, needs=(True, True, True, True)):
    loss, *given, goal = parts
    given = [v.clone().requires_grad_(n) for v, n in zip(given, needs)]
    end = unroll(loss, given[0], given[1], tuple(given[2:]), method)
    away = (end - goal).square().sum() / (given[0].detach() - goal).square().sum()
    return end.detach(), torch.autograd.grad(away, [v for v in given if v.requires_grad])


def apart(p, q): return max(((a - b).norm() / b.norm().clamp_min(1e-30)).item() for a, b in zip(p, q))


# ---------- the gradients

@pytest.mark.parametrize("norm", ["instance", "group", "none", "batch"])
def test_gradients_of_the_full_graph_in_double(norm):
    parts = problem(norm)                                 # batch norm in training mode: with the batch's own statistics
    (end, got), (end2, want) = slopes("recompute", parts), slopes("graph", parts)
    assert torch.equal(end, end2)
    assert len(got) == 4 and apart(got, want) < 1e-10 and all(w.norm() > 0 for w in want)


def test_gradients_of_the_full_graph_in_float():
    parts = problem(dtype=torch.float, T=30, width=16)
    (end, got), (end2, want) = slopes("recompute", parts), slopes("graph", parts)
    assert torch.equal(end, end2)                         # to the bit: a ReLU that flips in one of them would cost more
    assert apart(got, want) < 1e-5


def test_gradients_on_real_digits_with_the_padded_network():
    from rdd_lib.data import load
    from rdd_lib.models import Net
    data = load("mnist5k").subset(range(0, 4000, 200))
    net = Net("convnet", dict(width=8))(data, 0)
    f, theta, y = functional(net), flatten(net), data.y
    goal = theta + .05 * torch.randn(len(theta), generator=generator_of(0))
    parts = (lambda th, t, x: F.cross_entropy(f(th, x), y), theta, torch.full((10,), .05), data.images(), goal)
    assert apart(slopes("recompute", parts, (True,) * 3)[1], slopes("graph", parts, (True,) * 3)[1]) < 1e-5


@pytest.mark.parametrize("method", EXACT)
def test_finite_differences(method):
    with seeded(0): net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    f, theta, g = functional(net), flatten(net), generator_of(0)
    x = torch.randn(5, 3, generator=g).double().requires_grad_()
    q = torch.randn(5, 2, generator=g).double().requires_grad_()
    loss = lambda theta, t, x, q: F.cross_entropy(f(theta, x[t:t + 3]), q[t:t + 3].softmax(1))
    given = (theta.requires_grad_(), torch.tensor([.3, .1, .5]).double().requires_grad_(), x, q)
    assert torch.autograd.gradcheck(lambda th, a, *xs: unroll(loss, th, a, xs, method), given)


@pytest.mark.parametrize("needs", [(n & 1 > 0, n & 2 > 0, n & 4 > 0, n & 8 > 0) for n in range(1, 16)])
def test_only_what_needs_a_gradient(needs):
    parts = problem(T=3)
    got, want = slopes("recompute", parts, needs)[1], slopes("graph", parts, needs)[1]
    assert len(got) == sum(needs) and apart(got, want) < 1e-10


def test_nothing_needs_a_gradient():
    loss, theta, lrs, x, q, _ = problem()
    ends = [unroll(loss, theta, lrs, (x, q), m) for m in UNROLLED]
    with torch.no_grad(): ends += [unroll(loss, theta, lrs, (x, q), m) for m in UNROLLED]
    assert all(apart([e], ends[:1]) < 1e-14 for e in ends) and not ends[0].requires_grad and not ends[3].requires_grad


def test_one_learned_rate():
    loss, theta, _, x, q, goal = problem(T=4)
    found = []
    for m in EXACT:
        alpha = torch.tensor(.1, dtype=torch.double, requires_grad=True)
        found += torch.autograd.grad((unroll(loss, theta, alpha.expand(4), (x, q), m) - goal).square().sum(), alpha)
    torch.testing.assert_close(*found, rtol=1e-10, atol=0)


def test_one_after_another_is_all_at_once():
    loss, theta, lrs, x, q, goal = problem(T=4)
    theta, x, q = (v.clone().requires_grad_() for v in (theta, x, q))
    half = unroll(loss, theta, lrs[:2], (x, q))
    end = unroll(lambda th, t, *xs: loss(th, t + 2, *xs), half, lrs[2:], (x, q))
    got = torch.autograd.grad((end - goal).square().sum(), (theta, x, q))
    want = torch.autograd.grad((unroll(loss, theta, lrs, (x, q)) - goal).square().sum(), (theta, x, q))
    assert apart(got, want) < 1e-10


def test_inputs_that_are_themselves_computed_and_backward_twice():
    loss, theta, lrs, x, q, goal = problem()
    u = x.clone().requires_grad_()
    end = unroll(loss, theta, lrs, (u.sigmoid() * 2, q))
    first, = torch.autograd.grad((end - goal).square().sum(), u, retain_graph=True)
    second, = torch.autograd.grad((end - goal).square().sum(), u)
    want, = torch.autograd.grad((unroll(loss, theta, lrs, (u.sigmoid() * 2, q), "graph") - goal).square().sum(), u)
    assert torch.equal(first, second) and apart([first], [want]) < 1e-10


def test_inputs_that_are_left_alone():
    _, theta, lrs, x, q, goal = problem()
    with seeded(0): f = functional(ConvNet(3, 3, 8, 4, 2).double())
    y = torch.arange(10) % 3
    def loss(theta, t, x, never, y): return F.cross_entropy(f(theta, x if t == 1 else x.detach() * 0 + .5), y)
    found = []
    for m in EXACT:
        u, never = x.clone().requires_grad_(), torch.ones(2, requires_grad=True)
        end = unroll(loss, theta, lrs, (u, never, y), m)
        found.append(torch.autograd.grad(end.square().sum(), (u, never), allow_unused=True))
    assert apart(found[0][:1], found[1][:1]) < 1e-10 and found[0][0].norm() > 0
    assert torch.equal(found[0][1], torch.zeros(2)) and found[1][1] is None


def test_a_loss_that_is_linear_in_theta():
    x = torch.ones(3, requires_grad=True)
    end = unroll(lambda th, t, x: (th * x).sum(), torch.zeros(3), torch.ones(2), (x,))
    assert torch.equal(torch.autograd.grad(end.sum(), x)[0], torch.full((3,), -2.))
    a = torch.ones(2, requires_grad=True)
    end = unroll(lambda th, t: th.sum(), torch.zeros(3), a)
    assert torch.equal(torch.autograd.grad(end.sum(), a)[0], torch.full((2,), -3.))


def test_no_steps_give_the_start():
    theta = torch.ones(3, requires_grad=True)
    for m in UNROLLED: assert unroll(lambda th, t: th.sum(), theta, torch.zeros(0), (), m) is theta


# ---------- TESLA's formula

def test_tesla_is_its_formula():
    loss, theta, lrs, x, q, goal = parts = problem()
    path = [theta]
    for t in range(len(lrs)): path.append(unroll(lambda th, _, *xs: loss(th, t, *xs), path[-1], lrs[t:t + 1], (x, q)))
    v, u = 2 * (path[-1] - goal) / (theta - goal).square().sum(), x.clone().requires_grad_()
    want = 0
    for t, here in enumerate(path[:-1]):                    # theta_t as a constant
        here = here.detach().requires_grad_()
        g, = torch.autograd.grad(loss(here, t, u, q), here, create_graph=True)
        want = want - lrs[t] * torch.autograd.grad(g @ v, u)[0]
    d_theta, d_lrs, d_x, _ = slopes("tesla", parts)[1]
    assert apart([d_x], [want]) < 1e-10 and apart([d_theta], [v]) < 1e-10 and d_lrs.shape == lrs.shape


def test_tesla_is_exact_for_one_step_only():
    one, four = problem(T=1), problem(T=4)
    assert apart(slopes("tesla", one)[1][1:], slopes("graph", one)[1][1:]) < 1e-10
    assert apart(slopes("tesla", four)[1], slopes("graph", four)[1]) > 1e-3


# ---------- precision

@pytest.mark.parametrize("method", list(UNROLLED))
def test_bfloat16_is_restored_where_the_steps_are_built_again(method):
    loss, theta, lrs, x, q, goal = problem(dtype=torch.float)
    seen = []
    def spying(theta, t, *inputs):
        seen.append((t, torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return loss(theta, t, *inputs)
    u = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16): end = unroll(spying, theta, lrs, (u, q), method)
    low, = torch.autograd.grad((end - goal).square().sum(), u)
    high, = torch.autograd.grad((unroll(loss, theta, lrs, (u, q)) - goal).square().sum(), u)
    assert low.dtype == end.dtype == torch.float and torch.isfinite(low).all()
    assert F.cosine_similarity(low.flatten(), high.flatten(), 0) > (.8 if method == "tesla" else .95)
    order = [0, 1, 2, 3] + ([] if method == "graph" else [3, 2, 1, 0])
    assert seen == [(t, True, torch.bfloat16) for t in order] and not torch.is_autocast_enabled("cpu")


def test_backward_within_autocast_of_a_float_run_stays_float():
    loss, theta, lrs, x, q, goal = problem(dtype=torch.float)
    u = x.clone().requires_grad_()
    def gradient(inside):
        d = (unroll(loss, theta, lrs, (u, q)) - goal).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside): return torch.autograd.grad(d, u)[0]
    assert torch.equal(gradient(True), gradient(False))


# ---------- memory

def peak_saved(run):
    "The most bytes that autograd holds at one time while `run()` runs."
    held, live, peak = Counter(), 0, 0

    class Held:
        def __init__(self, x):
            nonlocal live, peak
            self.x, self.of = x, (x.untyped_storage().data_ptr(), x.untyped_storage().nbytes())
            live += 0 if held[self.of] else self.of[1]
            held[self.of] += 1
            peak = max(peak, live)

        def __del__(self):
            nonlocal live
            held[self.of] -= 1
            live -= 0 if held[self.of] else self.of[1]
    with torch.autograd.graph.saved_tensors_hooks(Held, lambda h: h.x): run()
    gc.collect()
    return peak


def test_memory_grows_by_one_vector_a_step():
    def peak(method, T):
        loss, theta, lrs, x, q, goal = problem(dtype=torch.float, T=T, width=8)
        u, a = x.clone().requires_grad_(), lrs.requires_grad_()
        away = lambda: (unroll(loss, theta, a, (u, q), method) - goal).square().sum()
        return peak_saved(lambda: torch.autograd.grad(away(), (u, a))), len(theta)
    (ten, P), (thirty, _), (full, _) = peak("recompute", 10), peak("recompute", 30), peak("graph", 30)
    assert 20 * P * 4 <= thirty - ten <= 20 * (P + 10) * 4       # a rate a step, and padding of nothing else
    assert thirty < full / 10


# ---------- what is refused

def test_loss_that_draws():
    loss, theta, lrs, x, q, goal = problem()
    drops = lambda theta, t, x, q: loss(theta, t, F.dropout(x, .5), q)
    u = x.clone().requires_grad_()
    back = lambda loss: unroll(loss, theta, lrs, (u, q)).sum().backward()
    with pytest.raises(BadArgument, match="same value for the same theta and t"): back(drops)
    late = lambda theta, t, x, q: loss(theta, t, F.dropout(x, .5) if t == 2 else x, q)
    with pytest.raises(BadArgument, match="but step 2 came out otherwise"): back(late)


def test_training_that_diverges_is_not_blamed_on_the_loss():
    loss, theta, lrs, x, q, goal = problem(dtype=torch.float)
    u = x.clone().requires_grad_()
    got, = torch.autograd.grad(unroll(loss, theta, lrs * 1e38, (u, q)).sum(), u)
    assert not torch.isfinite(got).all()


def test_a_learned_tensor_that_was_not_handed_in():
    loss, theta, lrs, x, q, _ = problem()
    with pytest.raises(BadArgument, match=r"shape \(10, 3, 8, 8\) that requires grad and is not in inputs"):
        unroll(lambda th, t, q: loss(th, t, x.requires_grad_() * 2, q), theta, lrs, (q,))


def test_inputs_changed_before_backward():
    loss, theta, lrs, x, q, _ = problem()
    u = x.clone().requires_grad_()
    end = unroll(loss, theta, lrs, (u, q))
    with torch.no_grad(): u.clamp_(.4, .6)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"): end.sum().backward()


def test_second_derivatives():
    loss, theta, lrs, x, q, _ = problem(T=2)
    u = x.clone().requires_grad_()
    once, = torch.autograd.grad(unroll(loss, theta, lrs, (u, q)).square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"): once.sum().backward()
    once, = torch.autograd.grad(unroll(loss, theta, lrs, (u, q), "graph").square().sum(), u, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(once.square().sum(), u)[0]).all()


@pytest.mark.parametrize("bad, message", [
    (dict(theta=torch.zeros(2, 3)), r"theta must be a flat vector of floats, got shape \(2, 3\)"),
    (dict(theta=torch.zeros(3).long()), "got shape .* of torch.int64"),
    (dict(theta=[1., 2.]), r"theta must be .* got \[1.0, 2.0\]"),
    (dict(lrs=.1), "alpha.expand"),
    (dict(lrs=torch.tensor(.1)), r"lrs must be a tensor of shape \(T,\), got shape \(\)"),
    (dict(inputs=torch.zeros(3)), "inputs must be a tuple of tensors, got shape"),
    (dict(inputs=(torch.zeros(3), 1.)), "inputs must be a tuple"),
    (dict(loss=lambda th, t: th), r"loss must return a scalar tensor that depends on theta, got shape \(3,\) at t = 0"),
    (dict(loss=lambda th, t: 1.), "got float"), (dict(loss=lambda th, t: torch.tensor(1.)), "depends on theta")])
@pytest.mark.parametrize("method", list(UNROLLED))
def test_bad_arguments(method, bad, message):
    usual = dict(loss=lambda th, t: th.sum(), theta=torch.zeros(3), lrs=torch.ones(2), method=method)
    with pytest.raises(BadArgument, match=message): unroll(**usual | bad)


def test_unknown_method():
    with pytest.raises(UnknownName, match="unknown method of unrolling 'full'"):
        unroll(lambda th, t: th.sum(), torch.zeros(3), torch.ones(2), method="full")


# ---------- networks as functions

def test_functional_is_the_model_and_leaves_it_alone():
    with seeded(0): net = MLP(1, 3, 4, 8)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    x = torch.rand(5, 1, 4, 4, generator=generator_of(0))
    f, theta = functional(net), flatten(net).requires_grad_()
    assert len(theta) == sum(p.numel() for p in net.parameters()) and torch.equal(f(theta, x), net(x))
    f(theta, x).sum().backward()
    grads, theta.grad = theta.grad, None
    net(x).sum().backward()
    torch.testing.assert_close(grads, torch.cat([p.grad.flatten() for p in net.parameters()]))
    assert not torch.equal(f(theta + 1, x), net(x))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(isinstance(p, nn.Parameter) for p in net.parameters())
    says = rf"theta must be a vector of the model's {len(theta)} parameters, got shape \(7,\)"
    with pytest.raises(BadArgument, match=says): f(torch.zeros(7), x)


def test_flatten_is_a_copy():
    with seeded(0): net = nn.Linear(2, 2)
    theta = flatten(net)
    theta.zero_()
    assert net.weight.abs().sum() > 0 and not theta.requires_grad


def test_mode_and_buffers_are_the_models():
    with seeded(0): net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(.5))
    x = torch.rand(6, 1, 2, 2, generator=generator_of(0))
    f, theta = functional(net), flatten(net)
    net.eval()
    net[2].running_mean += 1
    assert torch.equal(f(theta, x), net(x))
    net.train()
    f(theta, x)
    assert net[2].num_batches_tracked == 1


def test_shared_parameters_stand_once():
    with seeded(0): net = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    net[2].weight = net[0].weight
    theta, x = flatten(net), torch.rand(4, 3, generator=generator_of(0))
    assert len(theta) == 9 + 3 + 3 and torch.equal(functional(net)(theta, x), net(x))
    double = theta.clone()
    double[:9] *= 2
    with torch.no_grad(): net[0].weight.mul_(2)
    assert torch.equal(functional(net)(double, x), net(x))


def test_nothing_is_drawn():
    parts, state = problem(), torch.get_rng_state()
    assert torch.equal(slopes("recompute", parts)[1][2], slopes("recompute", parts)[1][2])
    assert torch.equal(torch.get_rng_state(), state)
