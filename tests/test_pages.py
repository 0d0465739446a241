"""Every page of the papers runs to its end, at sizes that a test can afford, and its tables say what they should.

One run goes the whole way, from the shell through a kernel; the others run in this process. `make test-all` runs them
all at full smoke size."""
import os
import subprocess
import sys
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from conftest import FULL
from rdd_lib.cli_app import parse_settings
from rdd_lib.core import MissingData
from rdd_lib.reproduce.index import Listing
from rdd_lib.reproduce.page import Page
from rdd_lib.reproduce.plan import bill
from rdd_lib.reproduce.runner import items

RDD = Path(sys.executable).parent / "rdd"


def stamps(folder, pattern="*"):
    "Which files there are, and when each was written."
    return {p: p.stat().st_mtime_ns for p in folder.glob(pattern)}


def cells(pattern="*.json"): return stamps(Path(os.environ["RDD_STORE"]), pattern)


def within(table, score):
    "Whether every number lies in its interval."
    return ((table[f"{score}_lo"] <= table[score]) & (table[score] <= table[f"{score}_hi"])).all()


def as_planned(page, name, *settings):
    "The folder of a page that ran what was foreseen, and cells that depend on results where the plan says so."
    asked = parse_settings(settings)
    before, folder = bill(name, settings=asked), page(name, *settings)
    after, ran = bill(name, settings=asked), len(Listing.of())
    assert (after["total"]["done"], after["total"]["to_do"], after["disk"]["sets"]["files"]) == (ran, 0, 0)
    if before["pages"][0]["depending"]: assert before["total"]["to_do"] < ran and not after["pages"][0]["depending"]
    else: assert before["total"]["to_do"] == ran
    return folder


def test_from_the_shell_through_a_kernel_to_a_figure(tmp_path):
    "And with worker processes. Nothing is told on stderr, the kernel's end included."
    small = ("n_test=20", "steps=3", "ipcs=1, 2", "seeds=1", "methods=Rand", "workers=2")
    words = [RDD, "reproduce", "mcs/budget", *(w for s in small for w in ("--set", s))]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=600,
                          env=os.environ | {"TQDM_DISABLE": "1"})
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "Rand" in done.stdout and "budget.ipynb" in done.stdout, done.stderr
    made = {p.name for p in (tmp_path / "figures/smoke/mcs").iterdir()}
    assert {"budget.csv", "budget.ipynb", "budget_std.png"} <= made
    assert len(cells("score-*.json")) == 2


def test_a_page_without_any_of_its_data_sets_says_so(monkeypatch):
    "Of several, one may be missing."
    def at_hand(name, split):
        if name == "cifar10": raise MissingData("no cifar10 here")
        return name
    monkeypatch.setattr("rdd_lib.reproduce.page.dataset", at_hand)
    tables = Page("mcs/table1", "cpu")
    assert tables.sources(["mnist", "cifar10"]) == {"mnist": "mnist"} and tables.missing == {"cifar10"}
    with pytest.raises(MissingData, match="no cifar10 here"): tables.sources(["cifar10"])


def test_fig1(page):
    folder = page("mcs/fig1")
    table = pd.read_csv(folder / "fig1.csv")
    assert table.optimal.all() and table.k.is_monotonic_increasing
    assert table.k.iloc[-1] == table.n.iloc[-1]                                  # eta = 0 is the data itself
    assert (folder / "fig1.png").exists() and (folder / "fig1.svg").exists()


def test_fig2_twice_is_the_same_and_takes_its_cells_from_the_store(page):
    small = ("n_test=20", "steps=3", "ipcs=1", "seeds=1", "methods=Raw,Rand,MCS,k-center", "workers=1")
    folder = page("mcs/fig2", *small)
    first, before = (folder / "fig2.csv").read_bytes(), cells()
    table = pd.read_csv(folder / "fig2.csv")
    assert list(table.method) == ["Raw", "Rand 1", "MCS 1", "k-center 1"] and len(before) == 4
    assert within(table, "rob")
    page("mcs/fig2", *small)
    assert (folder / "fig2.csv").read_bytes() == first and cells() == before


def test_table1_leaves_no_method_out(page):
    folder = page("mcs/table1", "n_test=20", "seeds=1", "steps=3", "methods=Rand,k-center")
    table = pd.read_csv(folder / "table1.csv")
    assert len(table) == 12 * 4 * 3 + 2 and set(table.dataset) == {"mnist", "cifar10", "cifar100", "svhn"}
    rand, k_center = (table[(table.dataset == "mnist") & (table.method == m)] for m in ("Rand", "k-center"))
    assert rand.score.tolist() == ["std", "rob", "rob (normalised)"] and rand.published.tolist() == [95.15, 92.5, 92.5]
    assert k_center.score.tolist() == ["std", "rob"] and (k_center.note == "not published").all()
    assert within(rand, "ours") and within(k_center, "ours")
    assert "not yet" not in set(table.note) and (table[table.method == "TM"].note == "not run").all()
    assert (folder / "table1_mnist.png").exists()


def test_budget_has_a_curve_for_every_method(page):
    folder = as_planned(page, "mcs/budget", "n_test=20", "steps=3", "seeds=1", "ipcs=1,3", "methods=Rand,k-center")
    table = pd.read_csv(folder / "budget.csv")
    assert list(zip(table.method, table.ipc)) == [("Rand", 1), ("Rand", 3), ("k-center", 1), ("k-center", 3)]
    assert within(table, "std")
    assert {"budget_std.png", "budget_rob.png"} <= {p.name for p in folder.iterdir()}


def test_curves_have_all_three_judges_for_all_three_ways_of_training(page):
    small = ("n_test=20", "seeds=1", "steps=10", "methods=Raw,Rand,MCS (l2)", "ipcs=10")
    folder = as_planned(page, "mcs/fig3_to_10", *small)
    table = pd.read_csv(folder / "fig3_to_10.csv")
    assert len(table) == 3 * (1 + 2) and set(table.trained) == {"standard", "linf", "l2"}
    for judge in ("clean", "linf", "l2"): assert within(table, judge)
    assert (table.clean >= table[["linf", "l2"]].max(axis=1)).all()              # an attack never helps
    assert {f"fig{k}.png" for k in (3, 5, 7, 9)} <= {p.name for p in folder.iterdir()}
    assert not (folder / "fig4.png").exists()


def test_table3_takes_its_cells_from_the_curves(page):
    page("mcs/fig3_to_10", "n_test=20", "seeds=1", "steps=10", "methods=Raw,Rand", "ipcs=2")
    before = cells("three_scores-*.json")
    assert len(before) == 6
    folder = page("mcs/table3", "n_test=20", "seeds=1", "steps=10", "methods=Raw,Rand", "ipc=2")
    assert cells("three_scores-*.json") == before
    table = pd.read_csv(folder / "table3.csv")
    assert len(table) == 2 * 3 * 3 and (table[table.method == "DM"].note == "not run").all()


def test_tables_1_and_2_of_guard_share_their_sets(page):
    small = ("datasets=mnist:400", "n_test=20", "seeds=1", "iterations=2", "methods=DC,MTT")
    folder = page("guard_early/table1", *small)
    table = pd.read_csv(folder / "table1.csv")
    assert len(table) == 20 and table[table.ours.notna()].method.tolist() == ["DC", "DC", "MTT", "MTT"]
    mnist = table[table.dataset == "mnist"]
    assert {"DiM", "FRePo", "DD"} == set(mnist[mnist.note == "not run"].method) and "not yet" not in set(table.note)
    page("guard_early/table1", *small[:-1], "methods=DC", "kept=True")
    again = pd.read_csv(folder / "table1.csv")
    assert again.drop(columns="note").equals(table.drop(columns="note"))
    assert set(again[(again.method == "MTT") & again.ours.notna()].note) == {"earlier run"}
    sets = Path(os.environ["RDD_STORE"]).parent / "compressed"
    before = stamps(sets)
    assert len(before) == 2
    page("guard_early/table2", *small, "ipcs=10")
    assert stamps(sets) == before                                                # made once
    table, tests = pd.read_csv(folder / "table2.csv"), pd.read_csv(folder / "table2_tests.csv")
    assert len(table) == 2 * 78 + 2 and (table[table.score == "clean"].note == "not published").all()
    assert len(tests) == 7 and (folder / "table2_mnist_10.png").exists()


TINY = ("datasets=mnist:400", "n_test=10", "seeds=1", "iterations=2", "ipcs=1")
SQUEEZED = ("n_test=10", "epochs=2", "iterations=2", "ipcs=1", "attacks=PGD100,MIM")
FEW = ("datasets=mnist:400", "n_test=20", "ipcs=1", "sets=2")
OTHERS = {"beyond/leaderboard": ((*FEW, "rows=random,class means,random: views", "tables=hard,labels"),
                                 ("leaderboard.csv", "leaderboard_mnist5k_400_1_MLP.png")),
          "beyond/rome": ((*FEW, "students=MLP", "rows=random,class means"),
                          ("rome.csv", "rome_mnist5k_400_1_MLP_hard.png")),
          "beyond/labels": ((*FEW, "students=MLP", "rows=random: views,random: hard labels", "tried=False"),
                            ("labels.csv", "labels_steps.csv")),
          "mcs/algorithm1": (("patience=2",), ("algorithm1.csv", "algorithm1.png")),
          "mcs/example1": ((), ("example1.csv", "example1.png")),
          "mcs/guarantee": (("ks=1, 5",), ("guarantee.csv", "guarantee.png")),
          "guard_early/attacks": ((*TINY, "methods=DC,DM"),
                                  ("attacks.csv", "attacks_tests.csv", "attacks_mnist_1.png")),
          "guard_early/adversarial": ((*TINY, "methods=DC"),
                                      ("adversarial.csv", "adversarial_seconds.csv", "adversarial_making.csv")),
          "guard_early/clean": (TINY, ("clean.csv", "clean_mnist_1.png")),
          "guard_early/fig1": (("iterations=2",), ("fig1.csv", "fig1.png", "fig1_way.png", "fig1_loss.png")),
          "guard_early/fig2": (("iterations=2", "methods=DC", "ipc=2", "epochs=1"), ("fig2.csv", "fig2_mnist_DC.png")),
          "guard_early/proposition1": (("datasets=mnist:400", "steps=10", "seeds=1", "n_test=10", "methods=DM",
                                        "lams=1"),
                                       ("proposition1.csv", "proposition1_sigma.csv", "proposition1_mnist.png")),
          "guard_early/strength": ((*TINY[1:], "lams=1", "sets=1, 2"),
                                   ("strength.csv", "strength_test.csv", "strength.png", "strength_pairs.png")),
          "guard/attribution": (("n_test=10", "sets=1", "students=1", "epochs=2", "iterations=2", "images=400"),
                                ("attribution_mnist.csv", "attribution_gains.csv", "attribution_mnist_10.png")),
          "guard/cost": (("repeats=1",), ("cost.csv", "cost_stages.csv", "cost.png")),
          "guard/adversarial": (("methods=SRe2L,GUARD", *SQUEEZED), ("adversarial.csv", "adversarial_boards.csv")),
          "guard/imagenet": (("methods=SRe2L,GUARD", *SQUEEZED), ("imagenet.csv", "imagenet_imagenet.png")),
          "guard/imagenette": (("methods=SRe2L,GUARD with r_bn 10", *SQUEEZED),
                               ("imagenette.csv", "imagenette_gains.csv")),
          "guard/tiny": (("methods=SRe2L,CDA+", *SQUEEZED), ("tiny.csv", "tiny_tests.csv")),
          "guard/transfer": (("methods=SRe2L,SRe2L+,CDA,real images with S labels,SRe2L with hard labels", *SQUEEZED),
                             ("transfer.csv", "transfer_fairness.csv", "transfer_cifar10.png")),
          "mat/main": (TINY, ("main.csv", "main_tests.csv", "main_mnist_1.png"))}
ALIKE = {"guard/adversarial", "guard/imagenet", "guard/imagenette", "guard/tiny"}
ABOVE = {"mcs/fig1", "mcs/fig2", "mcs/table1", "mcs/table3", "mcs/budget", "mcs/fig3_to_10",
         "guard_early/table1", "guard_early/table2"}


@pytest.mark.parametrize("name", OTHERS)
def test_the_page_runs_to_its_end(page, name):
    if name in ALIKE and not FULL: pytest.skip("shares its cells with guard/transfer; make test-all runs it too")
    settings, files = OTHERS[name]
    folder = as_planned(page, name, *settings)
    assert set(files) <= {p.name for p in folder.iterdir()}
    table = pd.read_csv(folder / files[0])
    assert len(table) and np.isfinite(table.select_dtypes("number").dropna(axis=1).to_numpy()).all()


def test_no_page_is_left_out(): assert {i.name for i in items()} == ABOVE | set(OTHERS)
