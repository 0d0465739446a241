"""Condensed sets under attack: the cells of the early GUARD paper and of MAT."""
import os
from dataclasses import replace
from pathlib import Path
import pytest
import torch
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, UnknownName, generator_of
from rdd_lib.coresets.random import Random
from rdd_lib.models import Net
from rdd_lib.reproduce.guard import (CONDENSED_PLANS, CONDENSERS, Condensed, condensed_cells, hardened, more_attacks,
                                     robustness, scoreboard, student_trainer, three_attacks)
from rdd_lib.reproduce.guard_final import guard_attacks
from rdd_lib.reproduce.proposition1 import attacked_at, bound_of, terms_at
from rdd_lib.reproduce.cells import made, needs_set, packed, survivors, unpacked
from rdd_lib.reproduce.grid import run_grid
from rdd_lib.reproduce.jobs import Job
from rdd_lib.reproduce.cells import dataset
from rdd_lib.reproduce.tables import published
from rdd_lib.data import sample
from rdd_lib.attacks.pgd import PGD
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.evaluation.comparison import compare
from rdd_lib.attacks.threats import Linf
from rdd_lib.training.trainer import Trainer

SMALL = Condensed(Net("mlp", dict(width=16)), Trainer(steps=20, lr=.1), three_attacks("mnist5k"), n_test=60)
CELL = dict(data="mnist5k", method=Random(), ipc=5, seed=0, protocol=SMALL, device="cpu")

# --- published numbers ------------------------------------------------------------------------------------------------

def test_tables_of_the_early_paper_are_complete():
    df = published("guard_early")
    one, two = (df[df["item"] == f"table{k}"] for k in (1, 2))
    assert len(one) == 5 * 2 * 2 and set(one.method) == {"DD", "DC", "MTT", "DiM", "FRePo"} and (one.ipc == 10).all()
    assert len(two) == 7 * 2 * 2 * 3 - 2 * 3                        # DD has no row for 1 image per class
    assert not two.duplicated(["method", "dataset", "ipc", "score"]).any()
    assert two[two.ipc == 1].method.nunique() == 6 and set(two.score) == {"linf*", "linf", "l2"}
    for t in (one, two): assert t["mean"].between(0, 100).all() and t["sd"].notna().all() and (t["n"] == 50).all()

def test_what_stands_in_both_tables_is_the_same():
    df = published("guard_early")
    both = df[df["item"] == "table1"].merge(df[df["item"] == "table2"], on=["method", "dataset", "ipc", "score"])
    assert len(both) == 4 * 2 and (both.mean_x == both.mean_y).all() and (both.sd_x == both.sd_y).all()

def test_what_the_text_says_of_guard_follows_from_the_table_to_a_tenth():
    df = published("guard_early")
    shown = df[(df["item"] == "table2") & (df.dataset == "cifar10") & (df.ipc == 10)]
    t = shown.pivot(index="score", columns="method", values="mean")
    gains = df[df["item"] == "text"].assign(score=lambda d: d.score.str.split(",").str[0]).set_index("score")["mean"]
    assert ((t.GUARD - t.drop(columns="GUARD").max(axis=1)).sub(gains).abs() < .11).all() and len(gains) == 3

def test_mat_has_published_nothing():
    assert published("mat").empty and "ipc" in published("mat")

@pytest.mark.parametrize("method, dataset, ipc, score, mean, sd", [
    ("GUARD", "cifar10", 10, "linf", 23.5, .4), ("DD", "mnist", 10, "l2", 52.1, 2.6),
    ("FRePo", "cifar10", 1, "linf", 7.6, .8), ("MTT", "mnist", 1, "linf*", 0, 0),
    ("DSA", "cifar10", 1, "linf*", 3.1, .5)])
def test_numbers_of_table_2(method, dataset, ipc, score, mean, sd):
    df = published("guard_early").query("item == 'table2' and method == @method and dataset == @dataset "
                                        "and ipc == @ipc and score == @score")
    assert df[["mean", "sd"]].to_numpy().tolist() == [[mean, sd]]

def test_tables_of_the_final_guard_paper_are_complete():
    df = published("guard")
    main = df[df["item"].isin(["imagenette", "tiny", "imagenet"])]
    assert len(main) == 6 * ((4 * 2 + 3 * 2) + 3 * 4 + 2 * 2) and {*main.method} == {"GUARD", "SRe2L", "MTT", "TESLA"}
    assert len(df[df["item"] == "transfer"]) == 6 * (2 * 6 + 4) and len(df[df["item"] == "adversarial"]) == 6 * 2
    assert len(df[df["item"] == "penalty"]) == 2 * 9 and len(df[df["item"] == "elsewhere"]) == 1
    assert not df.duplicated(["item", "method", "dataset", "ipc", "score"]).any()
    assert {*df.score} == {"clean", *[*guard_attacks()][:5]} and df["mean"].between(0, 100).all()

@pytest.mark.parametrize("item, method, ipc, score, mean", [
    ("imagenette", "GUARD", 10, "CW (as published)", 41.47), ("elsewhere", "GUARD", 10, "CW (as published)", 58.67),
    ("imagenette", "SRe2L", 100, "Square", 19.18), ("tiny", "SRe2L", 50, "PGD100", .27),
    ("imagenet", "GUARD", 50, "AutoAttack", 7.03), ("adversarial", "SRe2L + Adv", 10, "clean", 12.81),
    ("transfer", "DC+", 1, "PGD100", 46.88), ("transfer", "CDA+", 50, "MIM", 33.03),
    ("penalty", "gradient penalty 0.1", 50, "PGD100", 29.2), ("imagenette", "TESLA", 100, "AutoAttack", 28.99)])
def test_numbers_of_the_final_guard_paper(item, method, ipc, score, mean):
    df = published("guard").query("item == @item and method == @method and ipc == @ipc and score == @score")
    assert df["mean"].tolist() == [mean]

# --- the cell ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("n", [1, 7, 8, 9, 1000])
def test_bits_come_back(n):
    hits = torch.rand(n, generator=generator_of(n)) < .3
    assert (unpacked(packed(hits), n) == hits.numpy()).all()
    with pytest.raises(BadArgument, match="must hold"): unpacked(packed(hits), n + 8)

def test_a_cell_says_what_evaluate_says():
    found = robustness(**CELL)
    test = sample(dataset("mnist5k", "test"), 60)
    S = Random().compress(dataset("mnist5k", "train"), ipc=5, seed=0, device="cpu")
    model = SMALL.trainer(SMALL.net, S, 0, "cpu")
    for name, attack in SMALL.attacks.items():
        o = evaluate(model, test, attack, 0, "cpu")
        assert found[name] == o.rob and found[f"{name}_hits"] == int(o.survived.sum())
        assert (unpacked(found[f"{name}_bits"], 60) == o.survived.numpy()).all()
    assert found["clean"] == o.std and found["test_images"] == test.fingerprint and found["images"] == 50

def test_an_attack_does_not_depend_on_those_beside_it():
    alone = robustness(**CELL | {"protocol": replace(SMALL, attacks={"l2": SMALL.attacks["l2"]})})
    assert alone["l2_bits"] == robustness(**CELL)["l2_bits"]

def test_survivors_of_any_attack_are_right_on_the_clean_image():
    found = [robustness(**CELL | {"seed": s}) for s in (0, 1)]
    clean = survivors(found, "clean")
    for name in SMALL.attacks: assert not (survivors(found, name) & ~clean).any()

def test_adversarial_students_survive_more_and_take_longer():
    attack = PGD(Linf(.1), 10, .03)
    protocol = replace(SMALL, trainer=replace(SMALL.trainer, steps=60))
    plain = robustness(**CELL | {"protocol": protocol})
    hard = robustness(**CELL | {"protocol": hardened(protocol, attack)})
    assert hard["linf_hits"] > plain["linf_hits"] and hard["train_seconds"] > 0

def test_the_student_gets_the_augmentation_of_its_set():
    from rdd_lib.augmentation import DSA
    from rdd_lib.distill.distribution import DistributionMatching
    dm = DistributionMatching()
    plain = replace(SMALL, augmented=False)
    assert student_trainer(SMALL, dm, "mnist").augment == DSA
    assert student_trainer(plain, dm, "mnist") == student_trainer(SMALL, Random(), "mnist") == SMALL.trainer
    dc = find_method("dc").build("mnist", 1)
    assert student_trainer(SMALL, dc, "mnist5k").augment == "crop_scale_rotate"
    assert student_trainer(SMALL, dc, "cifar10").augment == ""

def test_other_images_are_not_compared():
    a, b = robustness(**CELL), robustness(**CELL | {"protocol": replace(SMALL, n_test=50)})
    with pytest.raises(BadArgument, match="2 different sets"): survivors([a, b], "linf")
    with pytest.raises(BadArgument, match="same images"):
        compare({"a": survivors([a], "linf"), "b": survivors([b], "linf")})

# --- the table --------------------------------------------------------------------------------------------------------

def sets_before(cells): return len({Job.of(*need).digest for c in cells for need in needs_set(**c)})

def test_cells_share_their_sets_and_names_are_checked():
    cells = [c for _, c in condensed_cells("smoke", "mnist5k", ["DM"], (1, 2), seeds=3, device="cpu")]
    assert len(cells) == 6 and sets_before(cells) == 2
    assert {c["method"].net.settings["width"] for c in cells} == {8}
    with pytest.raises(UnknownName, match="condensation method"): condensed_cells("smoke", "mnist5k", ["KIP"])
    with pytest.raises(UnknownName, match="iteration"):
        condensed_cells("smoke", "mnist5k", ["DM"], settings={"DM": {"iteration": 3}})

def test_a_row_may_be_judged_in_another_way():
    "FRePo's students without norm, and DiM's of the frozen sample, are students of the same sets."
    labels = ["FRePo", "FRePo (no norm)", "DiM", "DiM (frozen)"]
    cells = dict(condensed_cells("smoke", "mnist5k", labels, (1,), seeds=1))
    assert sets_before(cells.values()) == 2
    assert cells["FRePo (no norm)"]["protocol"].net.settings == {
        "norm": "none", "widen": 2, "norm_first": True, "init": "lecun", "width": 8}
    assert [cells[name]["protocol"].deploy for name in ("DiM", "DiM (frozen)")] == [None, "frozen"]

def test_a_set_is_made_once():
    cells = [CELL | {"seed": s} for s in (0, 1)]
    first = run_grid([needs_set(**cells[0])[0][1]], made)
    folder = Path(os.environ["RDD_STORE"]).parent / "compressed"
    files = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    run_grid(cells, robustness)
    assert len(files) == 1 and files == {p: p.stat().st_mtime_ns for p in folder.iterdir()} and first[0]["images"] == 50

def test_scoreboard_keeps_what_was_not_run():
    cells = [("DM", CELL | {"seed": s}) for s in (0, 1)]
    theirs = published("guard_early").query("item == 'table2' and dataset == 'mnist'")
    side = scoreboard(cells, [robustness(**c) for _, c in cells], theirs, ["clean", *SMALL.attacks])
    assert set(side[side.ours.isna()].note) == {"not run"}
    assert len(side) == 6 * 3 + 7 * 3 + 4                      # the ipc of our students, 5, was not published
    ours = side[side.ours.notna()]
    assert ours.score.tolist() == ["clean", "linf*", "linf", "l2"]
    assert (ours.ours_lo <= ours.ours).all() and (ours.ours <= ours.ours_hi).all()

def test_plans_name_methods_that_are_known():
    for plan in CONDENSED_PLANS.values(): assert set(plan.changes) <= {"", *CONDENSERS.values()}
    paper = CONDENSED_PLANS["paper"]
    assert paper.seeds == 50 and paper.protocol.trainer.epochs == 1000
    assert not paper.changes and paper.protocol.n_test is None

def test_the_papers_radii():
    mnist, cifar = three_attacks("mnist"), three_attacks("cifar10")
    assert [(a.threat.eps, a.step_size, a.steps) for a in mnist.values()] == [(.3, .1, 10), (.1, .03, 10), (1., .3, 10)]
    assert [(a.threat.eps, a.step_size) for a in cifar.values()] == [(8 / 255, 2 / 255), (2 / 255, .5 / 255), (.2, .05)]
    more = more_attacks("cifar10")
    assert more["square"].queries == 5000 and all(a.threat == cifar["linf"].threat for a in more.values())

# --- Proposition 1 ----------------------------------------------------------------------------------------------------

class Bowl(torch.nn.Module):
    "Its loss is log(1 + exp(k (|x|^2 - 1))) for label 0: convex in x."
    def forward(self, x):
        v = x.flatten(1).square().sum(1) - 1
        return torch.stack([-v, v], 1)

def test_the_bound_holds_where_the_loss_is_convex_and_the_ball_small():
    x = torch.rand(20, 1, 2, 2, generator=generator_of(0)) * .6 + .2
    y = torch.zeros(20, dtype=torch.long)
    t = terms_at(Bowl(), x, y)
    for rho in (.001, .01):
        attacked = attacked_at(Bowl(), x, y, rho)
        assert (t["loss"] <= attacked + 1e-6).all() and (attacked <= bound_of(t, rho) * (1 + 1e-4)).all()
    assert (bound_of(t, 0.) == t["loss"]).all() and (t["bend"] > 0).all()

def test_a_loss_that_bends_downwards_does_not_lower_the_bound():
    t = {"loss": torch.tensor([1.]), "slope": torch.tensor([2.]), "bend": torch.tensor([-5.])}
    assert bound_of(t, .5).item() == 2.
