"""How often the host waits for a GPU: counted on the pretend one, in n and in 2n steps. And that what is looked at
later is refused all the same, and results are the CPU's."""
import importlib.util
import warnings
from pathlib import Path
import pytest
import torch
import pretend_gpu
from torch import nn
from rdd_lib.augmentation import DSA
from rdd_lib.core import BadArgument, RddError, check, generator_of
from rdd_lib.models import check_values, numbers, one_look
from rdd_lib.models import sent
from rdd_lib.models import build, onto
from rdd_lib.attacks.pgd import APGD, PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.losses import check_logits
from rdd_lib.attacks.carlini_wagner import CW
from rdd_lib.attacks.fab import FAB
from rdd_lib.certificates.smoothing import Smoothed
from rdd_lib.attacks.square import Square
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trainer import Trainer

_path = Path(__file__).parents[1] / "benchmarks" / "waits.py"
_spec = importlib.util.spec_from_file_location("benchmark_of_waits", _path)
counted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(counted)


@pytest.fixture
def pretended(gpu):
    if not pretend_gpu.pretended(): pytest.skip("a real GPU does not count waits")
    return gpu


# Waits of a step: no more than the rule of its kind says, and what is above that has a reason.
RULES = {"training": 1, "evaluation": 1, "attack": 0, "distill": 1, "smoothing": 0, "evaluate, no attack": 0,
         "relabel": 1, "farthest first": 1}
MORE = {"evaluation: cw": 2,         # it leaves the ball, so it is asked which of the misclassified points lie inside
        "evaluation: fab": 6,        # likewise; which images are across the boundary, before the look and after it;
        "evaluation: fab, l2": 6,    # and two planes are solved, with a look in eight rounds each
        "distill: dd, iteration": 2, # `unroll` looks, going back, whether the steps were the same when built again
        "distill: tm, iteration": 2,
        "certify: batch": 4,         # no loop of small steps: a proof is long; labels, logits, soundness in turn
        "signals: batch": 2}         # features and logits go to the CPU batch by batch: a GPU may not hold them all
NONE = ("inner step", "student step", "step of the walk", "standard", "curvature", "gradient", "free", "certified",
        "noisy", "augmented", "squeeze", "variant A", "mixed", "of views")

@pytest.mark.parametrize("flow", counted.FLOWS)
def test_waits_of_a_step(flow, pretended):
    rule = 0 if flow.endswith(NONE) else RULES.get(flow.partition(":")[0])
    found, places = counted.per_step(counted.FLOWS[flow], 2)
    assert found <= MORE.get(flow, rule), dict(places)


def test_a_real_gpu_is_asked_what_it_warns_of(monkeypatch):
    modes = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    def run(n):
        for _ in range(n): warnings.warn("called a synchronizing CUDA operation (Triggered internally)", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    (place, count), = counted.warned(run, 3).items()
    assert count == 3 and place[2].startswith(__file__) and modes == ["warn", "default"]


def test_a_whole_attack_waits_once(pretended):
    "Images, labels, the logits of every step and the result: one look, where there were five and three a step."
    with pretend_gpu.waits("rdd_lib/") as w: PGD(Linf(.1), 10)(*counted.judged(), generator_of(0, device="cuda"))
    assert len(w) == 1, w.at()


def test_noise_from_the_device(pretended):
    "Votes are the same where both draw the same (here they do), and the noise does not travel."
    model, x, _ = counted.judged()
    with pretend_gpu.waits("rdd_lib/") as w:
        there = Smoothed(model, .1, 10, noise="device").certify(x[:2], 20, 30, seed=5)
    assert not [place for kind, _, _, place in w if kind == "to gpu"]
    here = Smoothed(model, .1, 10).certify(x[:2].cpu(), 20, 30, seed=5, device="cpu")
    assert torch.equal(there.radius, here.radius) and torch.equal(there.predicted, here.predicted)
    model.to("cuda")


# ---- the mechanism -------------------------------------------------------------------------------------------------

def test_notes_are_read_at_the_end_in_their_order(gpu):
    x, reached = torch.arange(3., device=gpu), []
    def run():
        with one_look():
            check_values((x >= 0).all(), lambda: "not this one")
            check_values((x > 0).all(), lambda: f"the smallest is {x.min():.0f}")
            with one_look(): check_values((x > 9).all(), lambda: "nor this one, it comes later", RddError)
            reached.append("the end")
    with pytest.raises(BadArgument, match="the smallest is 0"): run()
    assert reached == ["the end"]
    with pytest.raises(BadArgument, match="at once"): check_values((x > 0).all(), lambda: "outside it is said at once")


def test_numbers_come_with_a_look(gpu):
    x, big = torch.tensor([.1, 3.], device=gpu), torch.tensor(2**62 + 1, device=gpu)
    with one_look():
        assert numbers(x.max(), x.argmax(), (x > 1).any()) == [3., 1., 1.] and numbers(x[0]) == [x[0].item()]
        assert numbers(big, torch.tensor(True, device=gpu)) == [2**62 + 1, 1]
    with pytest.raises(BadArgument, match="above 1"), one_look():
        check_values((x > 1).all(), lambda: "must be above 1")
        numbers(x.sum())
        raise AssertionError("the look before should have said it")
    assert numbers() == []


def test_an_error_on_the_way_does_not_hide_what_was_noted(gpu):
    x = torch.zeros(2, device=gpu)
    with pytest.raises(BadArgument, match="noted first"), one_look():
        check_values((x > 0).all(), lambda: "noted first")
        raise RuntimeError("what came of it")
    with pytest.raises(RuntimeError, match="on its own"), one_look(): raise RuntimeError("on its own")
    with pytest.raises(BadArgument, match="at once"): check_values((x > 0).all(), lambda: "at once again")


def test_long_walks_are_looked_at_in_between(gpu):
    x, steps = torch.zeros(2, device=gpu), 0
    with pytest.raises(BadArgument), one_look():
        for steps in range(1000): check_values((x > 0).all(), lambda: "no")
    assert steps < 200


def test_a_sentence_is_made_when_it_is_needed():
    def dear(): raise AssertionError("nobody asked")
    check(True, dear)
    check_values(torch.tensor(True), dear)
    with pytest.raises(BadArgument, match="7"): check(False, lambda: f"{3 + 4}")


MIXED = (torch.rand(2, 3), torch.tensor(True), torch.arange(7)[::2], torch.zeros(0), torch.rand(3).half())

@pytest.mark.parametrize("tensors", [(torch.arange(5),), MIXED])
def test_sent_arrives(gpu, tensors):
    for a, b in zip(tensors, sent(gpu, *tensors), strict=True):
        assert b.is_cuda and a.dtype == b.dtype and torch.equal(a, b.cpu())
    assert sent(gpu, torch.ones(2, device=gpu), torch.ones(1))[1].is_cuda
    assert not sent("cpu", torch.ones(2, device=gpu))[0].is_cuda


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_a_network_goes_as_a_whole(gpu, norm):
    net, there = (build("convnet", counted.data(), 1, width=4, depth=1, norm=norm).train() for _ in range(2))
    there.model.classifier.bias.requires_grad_(False)
    assert onto(there, torch.device(gpu)) is there and there.training
    for (name, a), (same, b) in zip(net.state_dict().items(), there.state_dict().items(), strict=True):
        assert name == same and b.is_cuda and a.dtype == b.dtype and torch.equal(a, b.cpu())
    kept = there.model.classifier.bias
    assert all(p.requires_grad == (p is not kept) for p in there.parameters())
    there(counted.data().images(gpu)).sum().backward()


# ---- refused all the same ------------------------------------------------------------------------------------------

SAID = {"labels": (lambda m, x, y: (m, x, 0 * y + 3), "y holds the label 3, but the model has 3 classes"),
        "below": (lambda m, x, y: (m, x, 0 * y - 1), "y must hold labels >= 0, got -1"),
        "pixels": (lambda m, x, y: (m, x * 2, y), r"x must lie in \[0, 1\]"),
        "NaN": (lambda m, x, y: (lambda x: m(x) * torch.nan, x, y), "NaN logits for 36 of 36 images"),
        "tuple": (lambda m, x, y: (lambda x: (m(x),), x, y), "got a tuple")}
SHORT = [PGD(Linf(.1), 2), APGD(Linf(.1), "dlr", 2), Square(Linf(.1), 2), CW(L2(.1), steps=2)]

@pytest.mark.parametrize("fault", SAID)
@pytest.mark.parametrize("attack", SHORT, ids=lambda a: a.name)
def test_an_attack_on_a_gpu_refuses(attack, fault, gpu):
    change, says = SAID[fault]
    with pytest.raises(BadArgument, match=says): attack(*change(*counted.judged()))
    with pytest.raises(BadArgument, match=says): attack_until_broken(attack, *change(*counted.judged()))


def test_nan_after_some_steps_is_found_before_anything_is_returned(gpu):
    model, x, y = counted.judged()
    looks = iter(range(100))
    def once(x): return model(x) * (torch.nan if next(looks) == 4 else 1.)
    with pytest.raises(BadArgument, match="pgd-9: the model returned NaN logits for 36"): PGD(Linf(.1), 9)(once, x, y)


def test_an_objective_s_notes_are_read_in_every_step(gpu):
    seen = []
    def objective(model, x, y, w=None, generator=None):
        logits = check_logits(model(x), y, "mine")
        check_values(logits.sum() < -torch.inf, lambda: "never")
        return nn.functional.cross_entropy(logits, y)
    with pytest.raises(BadArgument, match="never"):
        Trainer(objective, steps=5)(counted.NET, counted.data(), device=gpu, watch=seen.append)
    assert not seen


# ---- where a GPU takes another way ---------------------------------------------------------------------------------

WAYS = {"apgd": APGD(Linf(.05), "ce", 12), "apgd, l2": APGD(L2(.3), "dlr", 12, 2), "fab": FAB(Linf(.05), 8, 2),
        "fab, l2": FAB(L2(.3), 8, 2, restarts=2), "cw": CW(L2(.3), steps=12, search_steps=3),
        "square": Square(Linf(.1), 30), "square, l2": Square(L2(.5), 40, p=.5),
        "square, l2, stretched": Square(L2(.4), 40, stretched=True)}

def equal(a, b):
    a, b = a.double(), b.cpu().double()
    return torch.equal(a, b) if pretend_gpu.pretended() else torch.allclose(a, b, atol=1e-3)

@pytest.mark.parametrize("way", WAYS)
def test_its_results_are_the_cpus(way, gpu):
    net = build("convnet", counted.data(), 0, width=4, depth=1)
    x = counted.data().images()
    with torch.no_grad(): y = net(x).argmax(1)
    here, there = (attack_until_broken(WAYS[way], net.to(d), x.to(d), y.to(d), 0, batch_size=10) for d in ("cpu", gpu))
    assert all(equal(getattr(here, f), getattr(there, f)) for f in ("x_adv", "by", "step", "distance"))
    assert here.forward_samples == there.forward_samples and here.backward_samples == there.backward_samples


@pytest.mark.parametrize("operation", DSA.split("_"))
def test_augmented_alike(operation, gpu):
    trainer, data = Trainer(steps=3, batch=12, augment=operation), counted.data()
    method = counted.GradientMatching(net=counted.NET, batch_real=8, iterations=1, outer=2, inner=1, augment=operation)
    here, there = (trainer(counted.NET, data, 0, d).state_dict() for d in ("cpu", gpu))
    assert all(equal(here[k], there[k]) for k in here)
    assert equal(*(method.compress(data, ipc=2, device=d).x for d in ("cpu", gpu)))
