"DATM: windows, the guard, labels that begin with the experts' logits; sharpness-aware experts; against restatements."
from dataclasses import replace
from math import inf
import pytest
import torch
from conftest import Stopped
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.threats import Linf
from rdd_lib.augmentation import Scale
from rdd_lib.compressed import save
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, describe, subseed
from rdd_lib.data import DATASETS, load, sample
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.synthetic import first_images
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import Net
from rdd_lib.published import load_compressed
from rdd_lib.reproduce.rehearsal import cut, undeclared
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.training.sharpness import SharpnessAware
from rdd_lib.training.trainer import Trainer
from rdd_lib.training.unrolled import flatten, functional

NET = Net("convnet", dict(width=4, depth=2))
EXPERTS = Experts(n=2, epochs=4, lr=.05, batch=50)
TM = TrajectoryMatching(iterations=4, lr=100., lr_alpha=1e-3, alpha=.05, student_steps=4, expert_epochs=1, max_start=2,
                        net=NET, experts=EXPERTS)
DATM = replace(TM, window=(0, 1, 3, 3), labels="logits", lr_label=5., threshold=3.)


@pytest.fixture(scope="module")
def digits(): return sample(load("mnist5k"), 200)


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    EXPERTS(NET, digits, 4, folder, "cpu")
    return dict(device="cpu", buffers=folder)


@pytest.mark.parametrize("settings", [dict(), dict(labels="hard"), dict(labels="expert"), dict(batch_syn=7),
                                      dict(gradient="tesla"), dict(lr_label=1.), dict(lr_label=1., labels="learned"),
                                      dict(init="noise")], ids=repr)
def test_a_window_that_stands_still_and_no_guard_are_tm(digits, run, settings):
    tm = replace(TM, **settings)
    a, b = (m.compress(digits, ipc=2, **run) for m in (tm, replace(tm, window=(0, 2, 2, 1), max_start=1)))
    c = replace(tm, threshold=1e6, momentum_label=.1).compress(digits, ipc=2, **run)
    for S in (b, c): assert S.x.equal(a.x) and S.schedule == a.schedule
    if a.soft_labels is not None: assert a.soft_labels.equal(b.soft_labels) and a.soft_labels.equal(c.soft_labels)
    assert "skipped" not in a.provenance and c.provenance["skipped"] == 0


@pytest.mark.parametrize("window", [(0, 2, 2, 1), (1, 2, 4, 3), (0, 1, 3, 7), (2, 3, 60, 1000)])
def test_starts_lie_in_the_window(window):
    m, (low, h0, h1, until) = replace(TM, window=window, experts=replace(EXPERTS, epochs=99)), window
    highs = [m.starts(it)[1] for it in range(2 * until)]
    assert {m.starts(it)[0] for it in range(until)} == {low} and highs == sorted(highs)
    assert highs[0] == h0 and highs[until] == highs[-1] == h1 and m.last_matched == h1
    for it, high in enumerate(highs[:until]): assert high == int(h0 + (h1 - h0) * it / until)


def test_epochs_that_are_read(digits, run):
    "All of the window and none beside it, as it opens."
    read = []
    class Watched(TrajectoryMatching):
        def starts(self, it):
            read.append((it, super().starts(it)))
            return read[-1][1]
    Watched(**vars(replace(DATM, iterations=5))).compress(digits, ipc=1, **run)
    assert read == [(0, (0, 1)), (1, (0, 1)), (2, (0, 2)), (3, (0, 3)), (4, (0, 3))]


@pytest.mark.parametrize("stop", [1, 2, 5])
@pytest.mark.parametrize("settings", [dict(), dict(batch_syn=7), dict(threshold=.999)], ids=repr)
def test_resumed_run_ends_in_the_same_bytes(digits, run, tmp_path, stop, settings):
    m, path = replace(DATM, iterations=7, **settings), tmp_path / "run.safetensors"
    log, resumed = [], []
    whole = m.compress(digits, ipc=2, **run, log=log)
    if len(log) < stop: pytest.skip("fewer steps than that are taken")
    note = dict(checkpoint=path, every=1)
    with pytest.raises(KeyboardInterrupt): m.compress(digits, ipc=2, **run, **note, log=Stopped(stop))
    again = m.compress(digits, ipc=2, **run, **note, log=resumed)
    assert again.x.equal(whole.x) and again.soft_labels.equal(whole.soft_labels) and again.schedule == whole.schedule
    assert resumed == log and again.provenance == whole.provenance
    assert len(log) + whole.provenance["skipped"] == 7


def told(m, data, x, folder):
    "By hand: what each expert says of images, at its end."
    paths, model = m.experts(m.net, data, m.experts.epochs, folder, "cpu"), m.net(data, 0).eval()
    return torch.stack([functional(model)(paths.read(k, [m.experts.epochs])[0], x) for k in range(len(paths))])


@pytest.mark.parametrize("ipc", [1, 3])
def test_labels_begin_as_the_experts_that_are_right_say(digits, run, ipc):
    still = replace(DATM, lr=1e-9, lr_label=1e-12, lr_alpha=0., iterations=1, threshold=inf)
    S = still.compress(digits, ipc=ipc, **run)
    logits = told(still, digits, S.x, run["buffers"])
    right, everything = logits.argmax(2) == S.y, told(still, digits, digits.images(), run["buffers"])
    known = (everything.argmax(2) == digits.y).any(0)
    for i, y in enumerate(S.y.tolist()):
        wanted = torch.full((10,), .1 / 9)
        wanted[y] = .9
        if right[:, i].any(): wanted = logits[right[:, i], i].mean(0).softmax(0)
        torch.testing.assert_close(S.soft_labels[i], wanted, atol=1e-4, rtol=1e-3)
    for c in range(10):                                     # as many that are known as there are, up to the budget
        wanted = min(ipc, int(known[digits.per_class[c]].sum()))
        assert int(right[:, S.y == c].any(0).sum()) == wanted
        rows = [next(i for i in digits.per_class[c].tolist() if (digits.images()[i] - x).abs().max() < 1e-5)
                for x in S.x[S.y == c]]
        assert len({*rows}) == ipc                          # no image twice


@pytest.mark.parametrize("init", ["noise", "a set"])
def test_images_that_were_asked_for_stay(digits, run, init):
    start = replace(TM, iterations=1).compress(digits, ipc=2, seed=3, **run)
    still = replace(DATM, lr=1e-9, lr_label=1e-12, lr_alpha=0., iterations=1, threshold=inf,
                    init=start if init == "a set" else init)
    S = still.compress(digits, ipc=2, **run)
    scale = Scale(digits)
    u, _ = first_images(digits, [2] * 10, still.init, scale, 0)
    torch.testing.assert_close(S.x, scale.pixels(u), atol=1e-5, rtol=0)
    guarded = replace(still, threshold=9.).compress(digits, ipc=2, **run).provenance
    assert ("start" in guarded, guarded["skipped"]) == (init == "a set", 0)       # both stories are told


def test_all_experts_wrong_are_hard_labels_and_images_by_chance(digits, tmp_path):
    "Untrained experts take all digits for a class or two."
    still = replace(DATM, lr=1e-9, lr_label=1e-12, lr_alpha=0., iterations=1, threshold=inf,
                    experts=replace(EXPERTS, lr=1e-4, n=1))
    S = still.compress(digits, ipc=1, device="cpu", buffers=tmp_path)
    right = told(still, digits, S.x, tmp_path)[0].argmax(1) == S.y
    chance, _ = first_images(digits, [1] * 10, "real", Scale(digits), 0)
    assert 0 < right.sum() < 10 or not right.any()
    for i in (~right).nonzero().flatten().tolist():
        assert S.soft_labels[i, S.y[i]] == pytest.approx(.9, abs=1e-6)
        torch.testing.assert_close(S.x[i], Scale(digits).pixels(chance)[i], atol=1e-5, rtol=0)


def test_the_guard_leaves_everything_where_it_is(digits, run):
    "Images, labels, rate and momenta: an iteration above the threshold is as none."
    class Without(TrajectoryMatching):
        def steps(self, s, *rest):
            if s.it != 2: yield from super().steps(s, *rest)
    losses = {}
    class Watched(TrajectoryMatching):
        def _gap(self, s, *rest):
            loss = super()._gap(s, *rest)
            losses[s.it] = loss.item()
            return loss * 100 if s.it == 2 else loss
    m = replace(DATM, threshold=inf, iterations=5)
    without = Without(**vars(m)).compress(digits, ipc=2, **run)
    guarded = Watched(**vars(replace(m, threshold=20.))).compress(digits, ipc=2, **run)
    assert guarded.provenance["skipped"] == 1 and max(losses.values()) < 20
    assert guarded.x.equal(without.x) and guarded.soft_labels.equal(without.soft_labels)
    assert guarded.schedule == without.schedule


def test_a_loss_that_is_no_number_is_no_matter_for_the_guard(digits, run):
    class Broken(TrajectoryMatching):
        def _gap(self, s, *rest): return super()._gap(s, *rest) * float("nan")
    with pytest.raises(BadArgument, match="the loss is nan in iteration 0"):
        Broken(**vars(DATM)).compress(digits, ipc=1, **run)


def test_a_set_with_such_labels_is_written_and_read(digits, run, tmp_path):
    S = DATM.compress(digits, ipc=1, **run)
    again = load_compressed(save(S, tmp_path / "set.safetensors"))
    assert again.soft_labels.equal(S.soft_labels) and again.provenance["skipped"] == S.provenance["skipped"]
    assert again.provenance["method"] == describe(DATM) | {"is": "TrajectoryMatching"}


# --- sharpness-aware experts ----------------------------------------------------------------------------------------

def test_no_sharpness_is_the_objective_itself(digits, tmp_path):
    assert EXPERTS.identity(NET, digits) == replace(EXPERTS, sharpness=0.).identity(NET, digits)
    assert "sharpness" not in EXPERTS.identity(NET, digits) and EXPERTS.trainer(1).objective == Standard()
    flat = replace(EXPERTS, sharpness=.05, n=1)
    assert flat.identity(NET, digits)["sharpness"] == .05
    a, b = (e(NET, digits, 1, tmp_path / name, "cpu").read(0, (0, 1)) for name, e in
            (("plain", replace(EXPERTS, n=1)), ("flat", flat)))
    assert a[0].equal(b[0]) and not a[1].equal(b[1])
    with pytest.raises(BadArgument, match="holds another expert: sharpness is"):
        flat(NET, digits, 1, tmp_path / "plain")


@pytest.mark.parametrize("objective", [Standard(), Adversarial(PGD(Linf(.1), 2))], ids=lambda o: type(o).__name__)
def test_sharpness_aware_experts_by_hand(digits, tmp_path, objective):
    "The rows of an expert are those of steps written out."
    experts = Experts(objective, n=1, epochs=1, lr=.05, batch=50, augment="", sharpness=.1)
    rows, theta = experts(NET, digits, 1, tmp_path, "cpu").read(0, (0, 1)), []
    aware = SharpnessAware(objective, .1)
    Trainer(aware, epochs=1, lr=.05, momentum=0., weight_decay=0., batch=50)(
        NET, digits, subseed(0, "expert", 0), "cpu", lambda step: theta.append(flatten(step.model)))
    assert theta[-1].equal(rows[1])


def test_the_slope_is_scale_free():
    "Layers scaled against each other, which leaves the network as it is: the climb leads to the same place."
    digits = sample(load("mnist5k"), 20)
    net = Net("mlp", dict(width=8))
    one, other = net(digits, 0), net(digits, 0)
    first, second, *_ = [m for m in other.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        first.weight *= 4
        first.bias *= 4
        second.weight /= 4
    x, y = digits.images(), digits.y
    torch.testing.assert_close(one(x), other(x))
    found = []
    for model in (one, other):
        seen = []
        def inner(model, x, y, w, g):
            loss = Standard()(model, x, y)
            seen.append(loss.item())
            return loss
        SharpnessAware(inner, rho=.5)(model, x, y)
        found.append(seen)
    assert found[0] == pytest.approx(found[1], rel=1e-4) and found[0][1] > found[0][0]


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("ipc", [1, 10, 50, 500, None])
def test_presets_build_describe_and_are_cut(data, ipc):
    m = find_method("datm").build(data, ipc)
    assert describe(m)["labels"] == "logits" and m.experts.sharpness == .01 and m.last_epoch == m.experts.epochs
    assert m.last_matched <= m.experts.epochs and undeclared(m) == set()
    short = cut(m)
    assert short.window == (0, 1, 1, 1) and short.experts.epochs == 2
    settings = {"experts.ema": ".99", "threshold": "inf"}
    robust = find_method("difficulty_aligned_trajectories").build(data, ipc, **settings)
    assert robust.experts.ema == .99 and robust.threshold == inf and "threshold" not in describe(robust)
