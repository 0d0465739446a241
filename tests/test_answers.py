"""What is no answer is refused wherever an answer is read: NaN (which an argmax takes for a class), a tuple, too few
logits, a single one."""
import pytest
import torch
from torch import nn
from rdd_lib.core import BadArgument, generator_of
from rdd_lib.data import ImageSet
from rdd_lib.attacks.pgd import APGD, MIFGSM, PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.autoattack import autoattack
from rdd_lib.attacks.carlini_wagner import CW
from rdd_lib.certificates.certificate import certify
from rdd_lib.evaluation.sandwich import sandwich
from rdd_lib.evaluation.checks import Effort
from rdd_lib.evaluation.diagnostics import diagnose, eps_sweep
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.attacks.fab import FAB, boundary_distance
from rdd_lib.evaluation.landscape import curvature_of, loss_surface
from rdd_lib.certificates.smoothing import Smoothed
from rdd_lib.evaluation.sandwich import sandwich_smoothed
from rdd_lib.attacks.square import Square
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trainer import predict

X, Y = torch.rand(12, 1, 4, 4, generator=generator_of(0)), torch.arange(12) % 10
DATA = ImageSet(X, Y, [*"0123456789"], "noise", "test")


class Answers(nn.Sequential):
    "A linear network whose logits are changed before they are handed out."
    def __init__(self, change=lambda z: z, classes=10):
        super().__init__(nn.Flatten(), nn.Linear(16, classes))
        with torch.no_grad(): self[1].weight.copy_(torch.randn(classes, 16, generator=generator_of(1)))
        self.change = change

    def forward(self, x): return self.change(super().forward(x))


SHAPE = r"must return logits of shape \(12, classes\), classes >= 2, got "
def one_nan(z): return z.index_fill(0, torch.tensor([3]), torch.nan)


WRONG = {"NaN": (lambda: Answers(lambda z: z * torch.nan), "the model returned NaN logits for 12 of 12 images"),
         "one NaN": (lambda: Answers(one_nan), "NaN logits for 1 of 12"),
         "a tuple": (lambda: Answers(lambda z: (z, z)), SHAPE + "a tuple"),
         "five of ten": (lambda: Answers(classes=5), "y holds the label 9, but the model has 5 classes"),
         "one logit": (lambda: Answers(classes=1), SHAPE + r"\(12, 1\)"),
         "half of the rows": (lambda: Answers(lambda z: z[::2]), SHAPE + r"\(6, 10\)")}
UNSEEN = [w for w in WRONG if w != "five of ten"]             # without labels nobody knows that classes are missing

T, S = Linf(.05), L2(.2)
SEEN = {"evaluate, no attack": lambda m: evaluate(m, DATA, None, device="cpu"),
        "evaluate": lambda m: evaluate(m, DATA, PGD(T, 2), device="cpu"),
        "autoattack": lambda m: attack_until_broken(autoattack(T, "standard", steps=2, queries=2), m, X, Y),
        "eps_sweep": lambda m: eps_sweep(m, DATA, "linf", [.1], lambda t: PGD(t, 1), device="cpu"),
        "pgd": lambda m: PGD(T, 2)(m, X, Y), "pgd, restarts": lambda m: PGD(T, 2, restarts=2)(m, X, Y),
        "apgd": lambda m: APGD(T, steps=2)(m, X, Y), "mifgsm": lambda m: MIFGSM(T, 2)(m, X, Y),
        "square": lambda m: Square(T, 2)(m, X, Y), "cw": lambda m: CW(S, steps=2)(m, X, Y),
        "cw shortest": lambda m: CW(S, steps=2).shortest(m, X, Y),
        "fab": lambda m: attack_until_broken(FAB(T, 2, 2), m, X, Y),
        "boundary_distance": lambda m: boundary_distance(m, X, Y, steps=2, targets=2, halvings=1),
        "certify": lambda m: certify(m, X, T, y=Y, device="cpu"),
        "sandwich": lambda m: sandwich(m, X, T, PGD(T, 1), y=Y, device="cpu"),
        "loss_surface": lambda m: loss_surface(m, X, Y, .1, 3), "curvature_of": lambda m: curvature_of(m, X, Y, 2)}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("where", SEEN)
def test_no_answer_is_refused(where, wrong):
    make, says = WRONG[wrong]
    with pytest.raises(BadArgument, match=says): SEEN[where](make())


@pytest.mark.parametrize("wrong", UNSEEN)
def test_predict_refuses_what_is_no_answer(wrong):
    make, says = WRONG[wrong]
    with pytest.raises(BadArgument, match=f"predict: .*{says}"): predict(make(), X)


ASKED = {"certify": lambda s: s.certify(X, 12, 12, device="cpu"), "predict": lambda s: s.predict(X, 12, device="cpu"),
         "sandwich_smoothed": lambda s: sandwich_smoothed(s, X, L2(.1), n0=12, n=12, y=Y, device="cpu")}

@pytest.mark.parametrize("wrong", UNSEEN)
@pytest.mark.parametrize("asked", ASKED)
def test_smoothing_counts_no_votes_that_are_none(asked, wrong):
    "NaN was class 0: a model that returns nothing else was certified, with accuracy 1 on images of zeros."
    make, says = WRONG[wrong]
    with pytest.raises(BadArgument, match=f"smoothing: .*{says}"): ASKED[asked](Smoothed(make(), .1))


def test_smoothing_attacks_with_labels_the_model_knows():
    make, says = WRONG["five of ten"]
    with pytest.raises(BadArgument, match=says): ASKED["sandwich_smoothed"](Smoothed(make(), .1))


@pytest.mark.parametrize("wrong", ["a tuple", "five of ten", "one logit", "half of the rows"])
def test_diagnose_refuses_what_is_no_answer(wrong):
    make, says = WRONG[wrong]
    with pytest.raises(BadArgument, match=f"diagnose: .*{says}"): diagnose(make(), DATA, T, device="cpu")


def test_diagnose_finds_nan():
    found = diagnose(WRONG["one NaN"][0](), DATA, T, device="cpu", effort=Effort(12, 1, 2, 1, 1, 1))
    assert found["nan_logits"].state == "warning" and found["nan_logits"].figures["count"] >= 1
    assert all(f.state == "skipped" for f in found.checks if f.name != "nan_logits")


def test_diagnose_says_so_where_nan_comes_later():
    "What first shows in a later check is a finding there, not a class."
    model = Answers(lambda z: z)
    right = ImageSet(X, model(X).argmax(1), DATA.classes, "noise", "test")
    looks = iter(range(10**6))
    model.change = lambda z: z if next(looks) < 4 else z * torch.nan          # the first four are those of `nan_logits`
    found = diagnose(model, right, T, device="cpu", only="random_outputs")
    assert found["random_outputs"].state == "warning" and "NaN logits" in found["random_outputs"].says


def test_hits_in_bfloat16_are_confirmed_by_logits():
    "A model that float32 turns into NaN breaks nothing."
    def change(z): return z if torch.is_autocast_enabled("cpu") or not broken[0] else z * torch.nan
    broken, model = [False], Answers(change)
    y = model(X).argmax(1)
    class Later(PGD):
        def begin(self, *a, **k):
            broken[0] = True
            return super().begin(*a, **k)
    with pytest.raises(BadArgument, match="NaN logits"):
        attack_until_broken(Later(Linf(1.), 3), model, X, y, screen="bf16")
