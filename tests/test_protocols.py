"Protocols with a name: their attacks are those they say, in both units, and `rdd score --protocol` tells them."
import os
import sys
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from rdd_lib import Linf, load, Net, Random, sample, Trainer
from rdd_lib.attacks.autoattack import autoattack
from rdd_lib.attacks.normalised import check_sees_all, OnNormalised
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.square import Square
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.compressed import save
from rdd_lib.core import BadArgument, with_settings
from rdd_lib.evaluation import protocols
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.evaluation.protocols import missed, must_break, PROTOCOLS, scored_by
from rdd_lib.models import Normalized

SMALL = {"trainer.steps": 20, "trainer.lr": .05, "trainer.batch": 50, "trainer.augment": "", "net.name": "convnet",
         "net.settings": dict(width=4)}


@pytest.fixture(scope="module")
def data(): return Random().compress(load("mnist5k"), ipc=5), sample(load("mnist5k", "test"), 20)


@pytest.fixture(scope="module")
def student(data): return Trainer(steps=60, lr=.05)(Net("convnet", dict(width=4)), data[0], 0, "cpu")


def few(protocol, *names, **settings):
    "The protocol with some of its attacks and a small student."
    def chosen(attacks): return {n: a for n, a in attacks.items() if not names or n.split()[0] in names}
    small = with_settings(protocol, **SMALL | settings)
    return replace(small, attacks=chosen(protocol.attacks), published=chosen(protocol.published))


@pytest.mark.parametrize("name", ["ours", "beard", "ddrobustbench"])
def test_radius_0_is_the_clean_accuracy_to_the_image(name, data, student):
    "Each attack in pixels, those that are borrowed too, and none that moves a pixel."
    for attack in PROTOCOLS[name]("mnist5k", 0.).attacks.values():
        assert attack.threat.eps == 0
        o = evaluate(student, data[1], attack, 0, "cpu")
        assert torch.equal(o.survived, o.correct) and o.forward_samples == len(o)


def published_points(attack, model, x, y):
    "Where a program ends that hands normalised images to torchattacks."
    torchattacks = pytest.importorskip("torchattacks")
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (attack.mean, attack.std))
    inner, (name, settings) = model.model, attack_of_theirs(attack.attack)
    found = getattr(torchattacks, name)(inner, **settings)((x - mean) / std, y)
    return found.detach() * std + mean


def attack_of_theirs(own):
    if own.name == "cw-as-published": return "CW", dict(c=own.c, steps=own.iterations, lr=own.lr)
    if own.name == "torchattacks-deepfool": return "DeepFool", own.settings
    given = dict(eps=own.threat.eps)
    if own.steps == 1: return "FGSM", given
    walk = dict(alpha=own.step_size, steps=own.steps, random_start=False)
    return "PGDL2" if type(own.threat).__name__ == "L2" else "PGD", given | walk


@pytest.mark.parametrize("name", ["fgsm", "pgd-10", "pgd-l2", "cw", "deepfool"])
def test_on_normalised_images_beards_attacks_end_where_torchattacks_does(name, data, student):
    "The student's own constants stand for BEARD's, which are the same for digits."
    attack, x, y = PROTOCOLS["beard"]("mnist5k").published[name], data[1].images(), data[1].y
    shorter = dict(cw=dict(iterations=20), deepfool=dict(settings=dict(steps=4))).get(name, {})
    attack = replace(attack, attack=replace(attack.attack, **shorter))
    ours = attack(student, x, y, 0)
    assert torch.allclose(ours, published_points(attack, student, x, y), atol=1e-5)
    assert (ours - x).abs().max() > 8 / 255                         # farther than its radius says


def test_an_attack_on_normalised_images_leaves_no_trace_and_takes_color(data):
    cifar = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    attack = PROTOCOLS["beard"]("cifar10").published["pgd-10"]
    seen = []
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 10))
    model.register_forward_hook(lambda m, args, out: seen.append(args[0].detach()))
    before = torch.get_rng_state()
    found = attack(model, cifar, torch.arange(4), 0)
    assert torch.equal(before, torch.get_rng_state()) and all(p.grad is None for p in model.parameters())
    low, high = torch.tensor(attack.mean).view(-1, 1, 1), torch.tensor(attack.std).view(-1, 1, 1)
    assert (found >= low - 1e-6).all() and (found <= low + high + 1e-6).all() and len(seen) == 10


def test_rows_are_of_the_outcomes(data):
    "Several students; what the program counts is at least what stays right; warnings say by whom."
    S, test = data
    score = scored_by(few(PROTOCOLS["beard"]("mnist5k"), "fgsm", "pgd-10"), S, test, (3, 4), "cpu")
    t = score.table().set_index(["attack", "units"])
    assert list(t.index) == [(a, u) for u in ("normalised", "pixels") for a in ("fgsm", "pgd-10")]
    for (name, units), row in t.iterrows():
        rob = [o.rob for o in score.outcomes[name, units]]
        assert row.robust == np.mean(rob) and row.sd == np.std(rob, ddof=1) and row.students == 2
        assert row.lo <= row.robust <= row.hi and row.robust <= row.clean
        if units == "normalised": assert row.as_counted >= row.robust
    assert {*score.images().student} == {0, 1} and len(score.images()) == 4 * 2 * len(test)
    again = scored_by(score.protocol, S, test, (3, 4), "cpu")
    assert score.table().equals(again.table()) and score.beard() == again.beard()


def test_what_stands_under_two_names_runs_once(data):
    S, test = data
    plan = few(PROTOCOLS["beard"]("mnist5k"), "fgsm")
    twice = replace(plan, attacks=plan.attacks | {"again": plan.attacks["fgsm"]}, published={})
    score = scored_by(twice, S, test, device="cpu")
    assert score.outcomes["fgsm", "pixels"][0] is score.outcomes["again", "pixels"][0]


def test_a_diagnosis_of_each_student(data):
    S, test = data
    score = scored_by(few(PROTOCOLS["ours"]("mnist5k", .03), **{"trainer.steps": 5}), S, test, [0], "cpu", True)
    assert len(score.diagnoses) == 1 and score.diagnoses[0].threat == Linf(.03)


def test_who_must_break_what():
    attacks = PROTOCOLS["ddrobustbench"]("cifar10").attacks
    assert must_break(attacks["pgd-10 8/255"], attacks["pgd-10 4/255"])
    assert must_break(attacks["autoattack 4/255"], attacks["jitter-10 4/255"])
    assert not must_break(attacks["autoattack 4/255"], attacks["pgd-10 8/255"])
    assert must_break(attacks["cw-10 4/255"], attacks["fgsm 4/255"])


def test_missed_counts_over_students(data, student):
    test = data[1]
    weak, strong = (evaluate(student, test, PGD(Linf(r)), 0, "cpu") for r in (.3, 0.))
    count, most = missed([strong, strong], [weak, weak])
    assert count == 2 * int((strong.survived & ~weak.survived).sum()) and most > 0


def test_a_net_with_a_normalised_clamp_is_refused(data, student):
    class Cut(torch.nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net
        def forward(self, z): return self.net(z.clamp(0, 1))
    check_sees_all(student, data[1])
    with pytest.raises(BadArgument, match="cuts them itself"):
        check_sees_all(Normalized(Cut(student.model), student.mean, student.std), data[1])


def test_square_begins_inside_where_normalised_images_lie_outside(data, student):
    attack = PROTOCOLS["beard"]("mnist5k").published["square"]
    short = OnNormalised(replace(attack.attack, queries=30), attack.mean, attack.std)
    r = attack_until_broken(short, student, data[1].images(), data[1].y, 0)
    by, (mean,), (std,) = r.by == 1, attack.mean, attack.std
    assert (r.x_adv[by] >= mean - 1e-5).all() and (r.x_adv[by] <= mean + std + 1e-5).all()


@pytest.fixture
def digits(data, tmp_path): return save(data[0], tmp_path / "few.safetensors")


FEW = ("--n-test", "10", "--net", "mlp", "--set", "steps=2", "--set", "net.settings.width=4")


def test_score_by_ours(rdd, digits, tmp_path):
    done = rdd("score", "few.safetensors", "--protocol", "ours", *FEW, "-o", "images.csv")
    assert done.returncode == 0, done.stderr
    assert "2 students, mlp, 2 steps" in done.stdout and "autoattack paper 0.1" in done.stdout
    assert len(pd.read_csv(tmp_path / "images.csv")) == 20
    assert not [*(tmp_path / "store").rglob("*.checkpoint")] and len(os.listdir(tmp_path)) <= 3


@pytest.fixture
def shorter(monkeypatch):
    "The attacks of a protocol that take seconds, cut."
    whole = protocols._beard_in_pixels
    def cut(eps): return whole(eps) | {"square": Square(Linf(eps), 20)}
    monkeypatch.setattr(protocols, "autoattack_as_published", lambda t: autoattack(t, "standard", steps=1, queries=20))
    monkeypatch.setattr(protocols, "_beard_in_pixels", cut)


def test_score_by_beard_in_both_units_with_its_doubts(rdd, digits, shorter):
    done = rdd("score", "few.safetensors", "--protocol", "beard", *FEW, "--seeds", "2", "--set", "eps=4/255")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("linf 4/255") == 10 and "no radius" in done.stdout and "as it counts" in done.stdout
    assert done.stdout.count("never rank by them") == 2 and "2 students" in done.stdout
    assert "no robust accuracies" in done.stdout and "targeted DeepFool and AutoAttack do nothing" in done.stdout
    pixels = rdd("score", "few.safetensors", "--protocol", "beard", *FEW, "--set", "units=pixels")
    assert pixels.returncode == 0 and "normalised" not in pixels.stdout, pixels.stdout


def test_without_torchattacks_the_rest_is_scored_and_said(rdd, digits, shorter, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchattacks", None)
    done = rdd("score", "few.safetensors", "--protocol", "ddrobustbench", *FEW, "--seeds", "1")
    assert done.returncode == 0 and "pgd-10 8/255" in done.stdout, done.stderr
    assert "left out: vmi-fgsm-5 2/255" in done.stdout and "pip install --no-deps torchattacks" in done.stdout


@pytest.mark.parametrize("line, told", [
    ("--protocol beard --attack pgd --threat linf:.1", "cannot be given together with --attack, --threat"),
    ("--protocol ours --train standard", "cannot be given together with --train"),
    ("--protocol ours --train adversarial", "cannot be given together with --train"),     # its default, but typed
    ("--protocol ours --row x.json", "a row holds the score of one attack"),
    ("--protocol ours --certify --eta 0", "together with --eta, --certify"),
    ("--protocol bread", "did you mean 'beard'"), ("--protocol beard --set units=bytes", "units must be"),
    ("--protocol ours --set attack.steps=3", "--set attack.steps"), ("--protocol ours --set eps=-1", "must be"),
    ("--protocol ours --set epoch=3", "did you mean 'epochs'"), ("--protocol ours --seeds 0", "--seeds must be >= 1"),
    ("--protocol ours --data cifar10", "the set was made from 'mnist5k'"),
    ("--protocol ours --n-test 99999", "--n-test must be in 0 ... 1000")])
def test_what_a_protocol_replaces_is_refused_in_a_sentence(rdd, digits, line, told):
    done = rdd("score", "few.safetensors", *line.split())
    assert done.returncode == 2 and told in done.stderr, (done.stdout, done.stderr)
    assert done.stderr.startswith("rdd: ") and done.stderr.count("\n") == 1


def test_a_schedule_that_is_not_followed_is_said(rdd, data, tmp_path):
    save(replace(data[0], schedule=dict(lr=.1)), tmp_path / "few.safetensors")
    done = rdd("score", "few.safetensors", "--protocol", "ours", *FEW)
    assert "the set's own lr is not followed (--set follow=True: it is)" in done.stdout, (done.stdout, done.stderr)
    done = rdd("score", "few.safetensors", "--protocol", "ours", *FEW, "--set", "follow=True")
    assert "students follow the set's own lr" in done.stdout, done.stderr


def test_protocols_are_listed(rdd):
    listed = rdd("list", "protocols").stdout
    assert all(name in listed for name in PROTOCOLS) and "version" in listed
