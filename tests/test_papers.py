"""The papers' notebooks run end to end by the command line, at sizes that a test can afford."""
import os
import subprocess
import sys
from pathlib import Path
import pandas as pd

RDD = Path(sys.executable).parent / "rdd"


def reproduce(item, *settings, cwd):
    words = [RDD, "reproduce", item, *(w for s in settings for w in ("--set", s))]
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=600, env=os.environ | {"TQDM_DISABLE": "1"})
    assert done.returncode == 0, done.stderr
    return cwd / "figures" / "smoke" / "mcs", done.stdout


def test_fig1_is_drawn(tmp_path):
    folder, told = reproduce("mcs/fig1", cwd=tmp_path)
    table = pd.read_csv(folder / "fig1.csv")
    assert table.optimal.all() and table.k.is_monotonic_increasing and table.k.iloc[-1] == table.n.iloc[-1]        # eta = 0 is the data itself
    assert (folder / "fig1.png").exists() and (folder / "fig1.svg").exists() and "fig1.ipynb" in told


def test_fig2_twice_is_the_same_and_takes_its_cells_from_the_store(tmp_path):
    small = ("n_test=20", "steps=3", "ipcs=2", "seeds=1")
    folder, told = reproduce("mcs/fig2", *small, cwd=tmp_path)
    first = (folder / "fig2.csv").read_bytes()
    table = pd.read_csv(folder / "fig2.csv")
    assert list(table.method) == ["Raw", "Rand 2", "MCS 2", "DM 2", "k-center 2"]
    assert ((table.rob_lo <= table.rob) & (table.rob <= table.rob_hi)).all() and "MCS 2" in told
    cells = {p: p.stat().st_mtime_ns for p in Path(os.environ["RDD_STORE"]).glob("*.json")}
    assert len(cells) == 5
    reproduce("mcs/fig2", *small, cwd=tmp_path)
    assert (folder / "fig2.csv").read_bytes() == first
    assert cells == {p: p.stat().st_mtime_ns for p in Path(os.environ["RDD_STORE"]).glob("*.json")}


def test_table1_leaves_no_method_out(tmp_path):
    folder, _ = reproduce("mcs/table1", "n_test=20", "seeds=1", "methods=Rand,SubMod,k-center", cwd=tmp_path)
    table = pd.read_csv(folder / "table1.csv")
    assert len(table) == 12 * 4 * 3 + 2 and set(table.dataset) == {"mnist", "cifar10", "cifar100", "svhn"}
    rand, submod, k_center = (table[(table.dataset == "mnist") & (table.method == m)] for m in ("Rand", "SubMod", "k-center"))
    assert rand.score.tolist() == ["std", "rob", "rob (normalised)"] and rand.published.tolist() == [95.15, 92.5, 92.5]
    assert submod.ours.notna().all() and k_center.score.tolist() == ["std", "rob"] and (k_center.note == "not published").all()
    for ours in (rand, submod): assert ((ours.ours_lo <= ours.ours) & (ours.ours <= ours.ours_hi)).all()
    assert "not yet" not in set(table.note) and (table[table.method == "TM"].note == "not run").all() and (folder / "table1_mnist.png").exists()


def test_budget_has_a_curve_for_every_method(tmp_path):
    folder, told = reproduce("mcs/budget", "n_test=20", "steps=3", "seeds=1", "ipcs=1,3", "methods=Rand,k-center", cwd=tmp_path)
    table = pd.read_csv(folder / "budget.csv")
    assert list(zip(table.method, table.ipc)) == [("Rand", 1), ("Rand", 3), ("k-center", 1), ("k-center", 3)]
    assert ((table.std_lo <= table["std"]) & (table["std"] <= table.std_hi)).all() and {"budget_std.png", "budget_rob.png"} <= {p.name for p in folder.iterdir()}
