"""Students side by side are the students one after another: in float64 to 1e-12, in float32 to rounding."""
from dataclasses import replace
import pytest
import torch
from torch import nn
from rdd_lib.attacks.pgd import APGD, MIFGSM, PGD
from rdd_lib.attacks.threats import L2, Linf, Several
from rdd_lib.compressed import Compressed
from rdd_lib.core import generator_of
from rdd_lib.data import ImageSet, load, pixels, sample
from rdd_lib.evaluation.many import evaluate_many
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.models import Net
from rdd_lib.training.curvature import Curvature
from rdd_lib.training.distil import Distil
from rdd_lib.training.fast import Free
from rdd_lib.training.input_gradient import GradientPenalty
from rdd_lib.training.mart import Mart
from rdd_lib.training.objectives import Adversarial, OBJECTIVES, objective_of, Standard
from rdd_lib.training.squares import Squares
from rdd_lib.training.students import Stacked, why_apart
from rdd_lib.training.trainer import Trainer
from rdd_lib.views import Views

SEEDS = [3, 1, 4]
NET = Net("convnet", dict(width=4, depth=2))
SHORT = Trainer(steps=6, lr=.05, batch=5)


@pytest.fixture(scope="module")
def data():
    "Three classes, 8x8; batches of 5, 5 and 1."
    whole = load("mnist5k")
    few = whole.y < 3
    x = nn.functional.avg_pool2d(whole.x[few, :, 2:26, 2:26].float(), 3).byte()
    return sample(ImageSet(x, whole.y[few], whole.classes[:3], whole.name), 11, seed=1)


@pytest.fixture
def double(monkeypatch):
    "Networks and images in float64."
    monkeypatch.setattr("rdd_lib.training.trainer.pixels", lambda x: pixels(x).double())
    return lambda net: lambda data, seed: net(data, seed).double()


def apart(one, other):
    "The largest difference of a weight or an average."
    tensors = [[*m.state_dict().values()] for m in (*one, *other)]
    pairs = zip(tensors[:len(one)], tensors[len(one):], strict=True)
    return max((p.double() - q.double()).abs().max().item() for a, b in pairs for p, q in zip(a, b, strict=True))

def both(trainer, net, data, device="cpu"):
    return (trainer.many(net, data, SEEDS, device, together=3), [trainer(net, data, seed, device) for seed in SEEDS])


INNER = PGD(Linf(.1), 3)
EXACT = {"standard": Standard(), "pgd": Adversarial(INNER), "l2, restarts": Adversarial(PGD(L2(.5), 3, restarts=2)),
         "apgd": Adversarial(APGD(Linf(.1), steps=5)), "mifgsm": Adversarial(MIFGSM(Linf(.1), 3)),
         "searched in training mode": Adversarial(INNER, search_mode="train"), "mart": Mart(INNER),
         "curvature": Curvature(), "gradient": GradientPenalty(), "gradient, probed": GradientPenalty(h=.1),
         "squares": Adversarial(INNER, Squares())}

@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("objective", EXACT.values(), ids=EXACT)
def test_in_float64_they_are_the_same(double, data, objective, norm):
    net = double(replace(NET, settings=NET.settings | {"norm": norm}))
    trainer = replace(SHORT, objective=objective)
    assert why_apart(trainer, net, data) == ""
    assert apart(*both(trainer, net, data)) < 1e-12


@pytest.mark.parametrize("net", [Net("mlp"), Net("lenet"), Net("strided", dict(width=4)),
                                 Net("convnet", dict(width=4, norm="group"))], ids=lambda n: n.name)
@pytest.mark.parametrize("settings", [dict(optimizer="adam", lr=1e-3), dict(nesterov=True, schedule="cosine")],
                         ids=["adam", "nesterov"])
def test_with_other_networks_and_settings(double, net, settings):
    digits = sample(load("mnist5k"), 11)
    assert apart(*both(replace(SHORT, **settings), double(net), digits)) < 1e-11


@pytest.mark.parametrize("objective", [Standard(), Adversarial(INNER)], ids=["standard", "pgd"])
def test_in_float32_they_are_the_same_up_to_rounding(data, objective):
    assert apart(*both(replace(SHORT, objective=objective), NET, data)) < 1e-4


def test_each_is_augmented_by_itself(data):
    assert apart(*both(replace(SHORT, augment="color_crop_cutout_flip_scale_rotate"), NET, data)) < 1e-4


def test_what_a_set_says_is_followed(data):
    made = Compressed(data.x, data.y, data.classes, data.name)
    rule = {"batches": [[0, 1], [2, 3, 4], [0, 1]], "lrs": [.1, .05, .01], "momentum": 0.}
    soft = torch.rand(len(data), 3, generator=generator_of(0)).softmax(1)
    for more in (dict(schedule=rule), dict(weights=torch.arange(1., 12.)), dict(soft_labels=soft)):
        assert apart(*both(SHORT, NET, replace(made, **more))) < 1e-4
    assert apart(*both(replace(SHORT, objective=Distil(2.)), NET, replace(made, soft_labels=soft))) < 1e-4


def test_students_are_ordinary_models(data):
    many, loop = both(SHORT, NET, data)
    for a, b in zip(many, loop, strict=True):
        assert str(a) == str(b) and a.classes == b.classes and not a.training
        assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in b.parameters()]
        assert all(p.grad is None and p.is_leaf for p in a.parameters())
    own = {p.untyped_storage().data_ptr() for m in many for p in m.parameters()}
    assert len(own) == 3 * len([*NET(data).parameters()])


def test_the_order_of_seeds_and_uneven_parts(data):
    for together in (1, 2, 4):
        seven = SHORT.many(NET, data, range(7), "cpu", together=together)
        assert apart(seven, [SHORT(NET, data, seed, "cpu") for seed in range(7)]) < 1e-4


class Own(nn.Module):
    "A network of unknown make."
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x): return self.net(x)

APART = {"free": dict(objective=Free(Linf(.1), replays=2)), "views": dict(views=Views("pad")),
         "channels last": dict(channels_last=True), "norms spared": dict(decay_norms=False),
         "batch as a whole": dict(objective=Curvature(variant="authors_cifar")),
         "a callable": dict(objective=lambda model, x, y, w, g: model(x).square().mean())}

@pytest.mark.parametrize("settings", APART.values(), ids=APART)
def test_what_is_in_the_way_is_trained_one_after_another(data, settings):
    trainer = replace(SHORT, **settings)
    assert why_apart(trainer, NET, data) and apart(*both(trainer, NET, data)) == 0


def test_networks_of_unknown_make_are_trained_one_after_another(data):
    own = lambda data, seed: Own(NET(data, seed))
    assert "unknown make" in why_apart(SHORT, own, data) and apart(*both(SHORT, own, data)) == 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_trained_either_way(data, name):
    trainer = replace(SHORT, steps=2, objective=objective_of(name, Linf(.1), .05 if name == "generalized" else None))
    many, loop = both(trainer, NET, data)
    assert apart(many, loop) < 1e-4


def test_a_stack_in_a_stack_of_attacks_is_put_back(data):
    "Modes and gradients of a stack are those of a model for whoever handles it."
    stack = Stacked([NET(data, seed) for seed in SEEDS]).train()
    g = Several([generator_of(seed) for seed in SEEDS])
    INNER(stack, data.images()[:2].repeat(3, 1, 1, 1), data.y[:2].repeat(3), g)
    assert stack.training and all(p.requires_grad and p.grad is None for p in stack.parameters())


def test_outcomes_of_students_that_differ_much(data):
    "One that is right everywhere, one that knows nothing: their images leave the queue at other times."
    able = Trainer(steps=60, lr=.1, batch=11)(NET, data, device="cpu")
    models, judge = [NET(data, 1), able, NET(data, 2)], PGD(Linf(.05), 4)
    for batch in (1, 4, None):
        for a, b in zip(evaluate_many(models, data, judge, SEEDS, "cpu", batch, together=3),
                        [evaluate(m, data, judge, s, "cpu") for m, s in zip(models, SEEDS)], strict=True):
            assert torch.equal(a.by, b.by) and torch.equal(a.step, b.step)
            assert a.forward_samples == b.forward_samples and a.names == b.names
