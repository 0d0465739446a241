"""What version 0.1.0 wrote is found, read and gone on from: cells, checkpoints, experts, signals, compressed sets.
See made_before/README.md."""
import json
import shutil
from contextlib import contextmanager
from functools import cache
from pathlib import Path
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from rdd_lib.published import load_compressed
from rdd_lib.core import describe
from rdd_lib.coresets.random import Random
from rdd_lib.coresets.covering import KCenterGreedy, MinimalCoreset, verify_coreset
from rdd_lib.coresets.signals import Proxy, signals
from rdd_lib.data import ImageSet, load
from rdd_lib.distill.backprop import BackpropThroughTraining
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.gradient import GradientMatching
from rdd_lib.distill.trajectory import TrajectoryMatching
from rdd_lib.models import Net
from rdd_lib.reproduce.guard import Condensed, robustness
from rdd_lib.reproduce.proposition1 import bound_terms
from rdd_lib.reproduce.cells import made
from rdd_lib.reproduce.mcs import TwoNorms, three_scores
from rdd_lib.reproduce.grid import run_grid
from rdd_lib.reproduce.cells import Protocol, compressed, score
from rdd_lib.reproduce.store import CellKey, CellStore
from rdd_lib.attacks.pgd import APGD, PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.attacks.autoattack import autoattack
from rdd_lib.training.curvature import Curvature
from rdd_lib.training.objectives import Adversarial
from rdd_lib.certificates.smoothing import Smoothed
from rdd_lib.attacks.square import Square
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trades import Trades
from rdd_lib.training.trainer import Trainer

MADE = Path(__file__).parent / "made_before"
TINY = Net("mlp", dict(width=4))
SHORT = Trainer(steps=3, lr=.05)


@cache
def notes():
    "What was noted when the files were made: torch's version, and what each compressed set held."
    return json.loads((MADE / "made.json").read_text())


@cache
def digits(split="train", each=12):
    "Digits 0 ... 4 at 6x6 pixels, in whole numbers alone: the same bytes on every machine."
    data = load("mnist5k", split)
    rows = torch.cat([rows[:each] for rows in data.per_class[:5]])
    blocks = data.x[rows, :, 2:26, 2:26].long().reshape(-1, 1, 6, 4, 6, 4)
    return ImageSet((blocks.sum((3, 5)) // 16).byte(), data.y[rows], data.classes[:5], "mnist5k", split)


def nearest_mean():
    "A classifier with weights of few binary digits, which no machine rounds."
    data = digits()
    means = torch.stack([data.x[rows].flatten(1).long().sum(0) // len(rows) for rows in data.per_class]).float() / 256
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    model.load_state_dict({"1.weight": 2 * means, "1.bias": -means.square().sum(1)})
    return model.eval()


class Stop(Exception): "What a run is interrupted by."


@contextmanager
def asked(model, stop=None):
    "How often the model is asked; the `stop`-th time it raises `Stop`."
    calls = []
    def count(*_):
        calls.append(1)
        if len(calls) == stop: raise Stop
    hook = model.register_forward_hook(count)
    yield calls
    hook.remove()


@contextmanager
def steps():
    "How many steps all optimisers take."
    taken = []
    hook = register_optimizer_step_post_hook(lambda *_: taken.append(1))
    yield taken
    hook.remove()


@pytest.fixture
def store(own_store, tmp_path):
    "A copy of the folder that the cells were kept in, with its neighbours, as the one of this test."
    shutil.copytree(MADE / "store", tmp_path / "store")
    before = contents(tmp_path / "store")
    yield tmp_path / "store"
    assert contents(tmp_path / "store") == before                          # nothing new, nothing set aside


def contents(folder): return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# --- cells ----------------------------------------------------------------------------------------------------------
DM = DistributionMatching(iterations=2, batch_real=4, net=TINY)
GUARD = GradientMatching(iterations=1, batch_real=4, outer=1, inner=1, net=TINY, real_objective=Curvature())
MAT = TrajectoryMatching(iterations=1, student_steps=2, expert_epochs=1, max_start=1, net=TINY,
                         experts=Experts(Adversarial(PGD(Linf(.1), 2)), ema=.9, n=1, epochs=1))
MCS_PAPER = Protocol(TINY, SHORT, Linf(.1), train_steps=2, attack="quick", n_test=10)
APPENDIX_C = TwoNorms(TINY, SHORT, Linf(.1), train_steps=2, attack="quick", n_test=10, l2_steps=2, alpha=.1)
ATTACKS = {"linf": PGD(Linf(.1), 3), "l2": APGD(L2(1.), steps=3), "square": Square(Linf(.1), 5),
           "autoattack": autoattack(Linf(.1), "standard", steps=2, queries=5)}
EARLY_GUARD = Condensed(TINY, SHORT, ATTACKS, n_test=10)
HARDENED = Condensed(TINY, Trainer(Trades(Linf(.1), steps=2), steps=3, lr=.05), {"linf": PGD(Linf(.1), 3)}, n_test=10)
GRIDS = {
    score: [dict(method=Random(), ipc=1, seed=0, protocol=MCS_PAPER, set_seed=1),
            dict(method=None, ipc=None, seed=0, protocol=MCS_PAPER, scores=("rob",)),
            dict(method=KCenterGreedy(norm=float("inf")), ipc=1, seed=2, protocol=MCS_PAPER)],
    three_scores: [dict(method=None, ipc=None, seed=0, protocol=APPENDIX_C),
                   dict(method=MinimalCoreset(solver="greedy"), ipc=1, seed=0, protocol=APPENDIX_C, trained="l2",
                        weighting="sum")],
    robustness: [dict(method=DM, ipc=1, seed=0, protocol=EARLY_GUARD),
                 dict(method=Random(), ipc=1, seed=0, protocol=HARDENED, set_seed=1)],
    made: [dict(method=GUARD, ipc=1), dict(method=MAT, ipc=1)],
    bound_terms: [dict(net=TINY, trainer=Trainer(Curvature(), steps=3, lr=.05), rhos=(.1, .3), seed=0, n_test=20),
                  dict(net=TINY, trainer=SHORT, rhos=(.1,), seed=0, n_test=20, sets={"DM": DM}, ipc=1)]}


def cells_of(fn): return [dict(data="mnist5k", device="cpu") | cell for cell in GRIDS[fn]]


class Refuses:
    "An executor to which no cell may come."
    def submit(self, fn, *args): raise AssertionError(f"{args} was not found")


@pytest.mark.parametrize("fn", GRIDS, ids=lambda fn: fn.__name__)
def test_a_grid_finds_its_cells(store, fn):
    rows = run_grid(cells_of(fn), fn, executor=Refuses(), progress=False)
    for row, cell in zip(rows, cells_of(fn), strict=True):
        record = json.loads((MADE / "store" / "cells" / CellKey.of(fn, **cell).file).read_text())
        assert record["seconds"] >= 0 and record["versions"]["rdd_lib"] == "0.1.0"
        for name, value in record["result"].items():
            if isinstance(value, dict): assert {f"{name}.{k}" for k in value} <= {k.rpartition(".")[0] for k in row}
            else: assert row.get(f"result.{name}", row.get(name)) == value


def test_no_cell_is_left_over(store):
    known = {CellKey.of(fn, **cell).file for fn in GRIDS for cell in cells_of(fn)}
    assert {p.name for p in (store / "cells").iterdir()} == known and len(CellStore()) == len(known)


# --- checkpoints ----------------------------------------------------------------------------------------------------
STANDARD = autoattack(Linf(.12), "standard", steps=8, queries=30)
EVALUATIONS = {"apgd_t": 33, "fab": 100, "square": 140}        # stopped at this question to the model


def evaluation(checkpoint=None, stop=None):
    "The result of an evaluation, and how often the model was asked."
    model, data, kept = nearest_mean(), digits("test", 2), dict(checkpoint=checkpoint, every=0.)
    with asked(model, stop) as calls:
        found = attack_until_broken(STANDARD, model, data.images(), data.y, 3, batch_size=4, **kept)
    return found, len(calls)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_an_evaluation_goes_on(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", notes()["torch"])            # which a checkpoint is bound to
    path = shutil.copy(MADE / "checkpoints" / name, tmp_path / name)
    (again, few), (whole, many) = evaluation(path), evaluation()
    assert few <= many - EVALUATIONS[name] + 10
    same_outcome(again, whole)


def test_an_evaluation_goes_on_in_the_cache(own_store, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", notes()["torch"])
    path = tmp_path / "store" / "evaluations" / notes()["evaluation"]
    path.parent.mkdir(parents=True)
    shutil.copy(MADE / "checkpoints" / "fab", path)
    (again, few), (whole, many) = evaluation(True), evaluation()
    assert few <= many - EVALUATIONS["fab"] + 10 and not path.exists()
    same_outcome(again, whole)


def same_outcome(a, b):
    for name in ("by", "step", "logits"): assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert (a.names, a.forward_samples, a.backward_samples) == (b.names, b.forward_samples, b.backward_samples)
    torch.testing.assert_close(a.x_adv, b.x_adv)
    torch.testing.assert_close(a.distance, b.distance)


RUNS = {"certify": dict(n0=10, n=60), "certify_from_5": dict(n0=5, n=40, alpha=.05, first=5), "predict": dict(n=50)}


def smoothing(name, checkpoint=None, stop=None):
    "The result of a smoothing, and how often the model was asked."
    model = nearest_mean()
    run = getattr(Smoothed(model, .25, batch=30), name.partition("_")[0])
    with asked(model, stop) as calls:
        found = run(digits("test", 1).images(), **RUNS[name], seed=4, device="cpu", checkpoint=checkpoint, every=0.)
    return {"predicted": found} if torch.is_tensor(found) else vars(found), len(calls)


@pytest.mark.parametrize("name", RUNS)
def test_a_smoothing_goes_on(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "__version__", notes()["torch"])
    path = shutil.copy(MADE / "checkpoints" / name, tmp_path / name)
    (again, few), (whole, many) = smoothing(name, path), smoothing(name)
    assert few == 2 * many // 5                                            # three of five images were done
    for key, value in whole.items():
        assert torch.equal(again[key], value) if torch.is_tensor(value) else again[key] == value


EXPERTS = {"plain": Experts(n=2, epochs=3, batch=20, lr=.1, augment=""),
           "robust": Experts(Adversarial(PGD(Linf(.1), 2)), ema=.9, n=1, epochs=2, batch=20, lr=.1)}
DISTILLERS = {"dm": DistributionMatching(iterations=4, lr=20., batch_real=6, net=TINY),
              "dd": BackpropThroughTraining(iterations=4, lr=.2, epochs=2, batch_real=20, net=TINY, halve_every=2),
              "tm": TrajectoryMatching(iterations=4, lr=100., lr_alpha=1e-4, lr_label=1., alpha=.05, student_steps=3,
                                       expert_epochs=1, max_start=2, batch_syn=3, net=TINY, experts=EXPERTS["plain"])}


def distilled(name, checkpoint=None, log=None):
    every = {} if checkpoint is None else {"every": 1}
    return DISTILLERS[name].compress(digits(), ipc=1, seed=1, device="cpu", checkpoint=checkpoint, log=log, **every)


@pytest.mark.parametrize("name", DISTILLERS)
def test_a_distillation_goes_on(store, name, tmp_path):
    path, log, logged = shutil.copy(MADE / "checkpoints" / name, tmp_path / name), [], []
    with steps() as few: again = distilled(name, path, log)
    with steps() as many: whole = distilled(name, log=logged)
    assert (len(few), len(many)) == (2, 4)
    assert log == pytest.approx(logged) and len(log) == 4
    same_set(again, whole)


def same_set(a, b):
    "The same up to the last digits of floats: the machine may be another."
    for name in ("x", "y", "indices", "weights", "soft_labels"):
        one, other = getattr(a, name), getattr(b, name)
        if not (one is other is None): torch.testing.assert_close(one, other)
    assert (a.radius, a.lower_bound) == (b.radius, b.lower_bound)
    assert (a.schedule is None) == (b.schedule is None)
    for name, value in (a.schedule or {}).items():
        assert value == (b.schedule[name] if name == "batches" else pytest.approx(b.schedule[name]))
    assert story(a) == story(b)


def story(made): return {name: told for name, told in made.provenance.items() if name != "versions"}


# --- what is kept in the cache --------------------------------------------------------------------------------------
PROXY = Proxy(TINY, Trainer(epochs=2, lr=.05, batch=20))
ATTACKED = {"plain": None, "attacked": PGD(Linf(.1), 2)}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_found(store, name):
    experts = EXPERTS[name]
    with steps() as taken: paths = experts(TINY, digits(), device="cpu")
    assert not taken and len(paths) == experts.n and all(store in path.parents for path in paths.files)
    assert paths.read(0, range(experts.epochs + 1)).shape == (experts.epochs + 1, 193)


@pytest.mark.parametrize("name", ATTACKED)
def test_signals_are_found(store, name):
    with steps() as taken: found = signals(digits(), PROXY, ATTACKED[name], "cpu")
    assert not taken and len(found) == 60 and found.epochs == 2 and found.features.shape == (60, 4)


def test_a_compressed_set_is_found(store, monkeypatch):
    def refuses(*args, **more): raise AssertionError("it was not found")
    monkeypatch.setattr(Random, "make", refuses)
    found = compressed("mnist5k", Random(), 1, 1, "cpu")
    assert found.provenance["method"] == describe(Random()) and len(found) == 10


# --- compressed sets ------------------------------------------------------------------------------------------------
SETS = {"random": (Random(), 2), "k_center": (KCenterGreedy(), 2), "minimal": (MinimalCoreset(solver="lp"), 2),
        "minimal_total": (MinimalCoreset(solver="lp", norm=float("inf"), budget="total", weights="ball"), 3),
        "dd": (DISTILLERS["dd"], 1), "tm": (DISTILLERS["tm"], 1)}


def compress(name):
    method, ipc = SETS[name]
    return method.compress(digits(), ipc=ipc, seed=1, device="cpu")


def facts(made):
    "What a set holds, as plain data."
    plain = {name: getattr(made, name) for name in ("fingerprint", "radius", "lower_bound", "schedule")}
    tensors = {name: getattr(made, name) for name in ("indices", "weights", "soft_labels")}
    return plain | {name: None if t is None else t.tolist() for name, t in tensors.items()}


@pytest.mark.parametrize("name", SETS)
def test_a_set_is_read_and_made_again(store, name):
    kept = load_compressed(MADE / "compressed" / f"{name}.safetensors")
    assert json.loads(json.dumps(facts(kept))) == notes()["sets"][name]
    assert kept.provenance["method"] == describe(SETS[name][0]) and kept.provenance["versions"]["rdd_lib"] == "0.1.0"
    same_set(compress(name), kept)
    if kept.certificate: assert 0 < verify_coreset(kept, digits()) <= kept.lower_bound <= kept.radius
