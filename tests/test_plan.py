"""What a page would run, and what that would cost: told without computing anything.

That pages then run just that, test_pages.py shows."""
import json
import os
import re
from pathlib import Path
import numpy as np
import pytest
import torch
from rdd_lib import Random, save
from rdd_lib.compressor import Compressor, METHODS
from rdd_lib.core import BadArgument, UnknownName
from rdd_lib.data import load
from rdd_lib.reproduce.cells import compressed, made, needs_set
from rdd_lib.reproduce.foreseen import foresee
from rdd_lib.reproduce.grid import part_of
from rdd_lib.reproduce.index import finished, kind_of, Listing
from rdd_lib.reproduce.plan import bill, bill_text, hours, ToDo
from rdd_lib.reproduce.runner import chosen, parameters_for, items, PROFILES
from rdd_lib.reproduce.sizes import set_bytes, size_of
from rdd_lib.reproduce.store import CellKey, CellStore
from rdd_lib.training.trainer import Trainer

# what these compute is their own: coverings of points, a film of one distillation, seconds of a step
WITHOUT_CELLS = {"mcs/algorithm1", "mcs/example1", "mcs/fig1", "mcs/guarantee", "guard/cost", "guard_early/fig1"}


@pytest.fixture
def nothing_there(tmp_path, monkeypatch):
    "No data set, no store; whoever trains, compresses, covers, reads images or writes is caught."
    monkeypatch.setenv("RDD_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "store" / "cells"))
    assert len(METHODS)                          # a module that is first imported below would keep what is put in

    def caught(*args, **how): raise AssertionError("a plan computes nothing")
    monkeypatch.setattr(Trainer, "__call__", caught)
    monkeypatch.setattr(Compressor, "compress", caught)
    for place in ("rdd_lib.reproduce.cells.load", "rdd_lib.files.tempfile.mkstemp", "torch.nn.Module.__call__",
                  "rdd_lib.covering.set_cover.eta_mcs", "rdd_lib.covering.k_center.k_mcs"):
        monkeypatch.setattr(place, caught)
    yield
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_page_is_foreseen_in_every_profile_and_nothing_is_computed(nothing_there, profile):
    for item in items():
        found = foresee(item, parameters_for(item, profile, {}, "", True), Listing.of())
        assert bool(found.grids) != (item.name in WITHOUT_CELLS), item.name
        in_two_steps = item.name in ("guard_early/strength", "beyond/leaderboard")
        assert found.waiting == in_two_steps and not found.lacking, item.name
        for grid in found.grids:
            assert grid.cells and len(grid.cells) == len(grid.labels) == len(grid.keys)
            assert grid.fn is made or "GradientMatching" not in grid.labels, "the page names its rows"


def test_the_bill_of_everything(nothing_there):
    plan = bill("all", "cpu")
    assert [page["name"] for page in plan["pages"]] == [i.name for i in items()]
    total = plan["total"]
    assert total["done"] == 0 and 500 < total["to_do"] < sum(page["to_do"] for page in plan["pages"])  # some are shared
    assert total["no_cell_of_this_kind"] == total["to_do"] and total["processor"] is total["gpu"] is None
    assert {"mnist", "cifar10", "imagenet", "tiny_imagenet", "imagenette"} == {d["name"] for d in plan["downloads"]}
    text = bill_text(plan)
    assert text.count("no cells: what this page computes") == len(WITHOUT_CELLS)
    assert "no cell of this kind yet" in text and "imagenet: 155 GB" in text and "cells that depend" in text


SMALL = dict(seeds=3, n_test=20, steps=2, methods=["Rand", "MCS"])


def cells_of(name="mcs/fig2", settings=SMALL, profile="smoke"):
    item, = chosen(name)
    found = foresee(item, parameters_for(item, profile, settings, "", True), Listing.of())
    return [key for grid in found.grids for key in grid.keys], found


def plant(keys, seconds, **about):
    about = {"device": "cpu", "threads": 1} | about
    for key, s in zip(keys, seconds): CellStore().put(key, {"images": 10}, seconds=s, **about)


def test_hours_are_those_of_finished_cells_of_the_same_kind():
    "Two students of Rand, each with a set of its own: of MCS, whose students share one, nothing is known."
    keys, found = cells_of()
    sets, students = (grid.keys for grid in found.grids)
    assert [len(sets), len(students)] == [1, 6]
    plant(students[:2], (100., 140.), threads=2)
    plan = bill("mcs/fig2", settings=SMALL)
    mcs, rand = plan["pages"][0]["rows"]
    assert (rand["method"], rand["done"], rand["to_do"], rand["no_cell_of_this_kind"]) == ("Rand", 2, 1, 0)
    assert rand["processor"]["hours"] == pytest.approx(240 / 3600) and rand["processor"]["single"] == 0
    from scipy.stats import t
    half = t.ppf(.975, 1) * (np.var([200, 280], ddof=1) * 1.5)**.5
    assert rand["processor"]["hi"] == pytest.approx((240 + half) / 3600)
    assert (mcs["to_do"], mcs["no_cell_of_this_kind"], mcs["processor"], mcs["hint"]) == (4, 4, None, None)
    assert plan["total"]["no_cell_of_this_kind"] == 4 and plan["total"]["processor"]["cells"] == 1
    assert "no cell of this kind yet (4 of 5)" in bill_text(plan)


def test_a_plan_of_a_part_has_its_cells_and_what_they_need():
    "The set of MCS, which its students share, belongs to each part that has one of them."
    keys, found = cells_of()
    sets, students = (grid.keys for grid in found.grids)
    for k in (1, 2, 3):
        mine = [key for key in students if part_of(key.digest, (k, 3))]
        mcs = any(key.arguments["method"]["is"] != "Random" for key in mine)
        plan = bill("mcs/fig2", settings=SMALL, part=(k, 3))
        assert plan["total"]["to_do"] == len(mine) + mcs and plan["part"] == f"{k}/3"
        assert f"part {k}/3 of mcs/fig2" in bill_text(plan)
    assert bill("mcs/fig2", settings=SMALL)["part"] == ""


def test_the_interval_holds_what_comes():
    "Of grids whose cells take what a normal distribution gives, 95 of 100 cost what the interval says."
    g = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        a, b = (50 + 10 * torch.randn(n, generator=g, dtype=torch.float64) for n in (4, 25))
        h = hours([ToDo(20, tuple(a[:4].tolist())), ToDo(15, tuple(b[:10].tolist()))])
        come = (50 + 10 * torch.randn(20, generator=g, dtype=torch.float64)).sum() + b[10:].sum()
        inside += h["lo"] <= come / 3600 <= h["hi"]
    assert .92 < inside / 400 < .98


def test_a_single_cell_and_a_gpu_are_named():
    keys, _ = cells_of(settings=SMALL | {"device": "cuda"})
    plant(keys[1:2], [360.], device="NVIDIA H200", threads=8)
    plan = bill("mcs/fig2", settings=SMALL | {"device": "cuda"})
    total = plan["total"]
    assert total["processor"] is None and total["gpu"] == {"hours": .2, "lo": None, "hi": None, "cells": 2, "single": 2}
    assert "0.2 (2 cells by a single one) GPU h" in bill_text(plan)


def test_other_settings_are_a_hint_and_no_estimate():
    keys, _ = cells_of()
    plant(keys, [7.] * len(keys))
    assert bill("mcs/fig2", settings=SMALL)["total"]["to_do"] == 0
    again = bill("mcs/fig2", settings=SMALL, resume=False)["total"]
    assert (again["done"], again["to_do"], again["no_cell_of_this_kind"]) == (0, 7, 0)
    total = bill("mcs/fig2", settings=SMALL | {"steps": 3})["total"]
    assert total["done"] == 1 and total["to_do"] == total["no_cell_of_this_kind"] == 6            # the set is the same
    assert total["hint"] == {"cells": 6, "seconds_each": 7.} and total["processor"] is None


def test_cells_of_another_version_or_seed_of_a_teacher():
    "A seed is one wherever it stands; another version is another kind."
    key = CellKey("f", {"data": "x", "seed": 1, "squeeze": {"is": "Squeeze", "seed": 3, "after": {"seed": 4}}})
    alike = CellKey("f", {"squeeze": {"is": "Squeeze", "after": {"seed": 0}, "seed": 0}, "seed": 0, "data": "x"})
    assert kind_of(key) == kind_of(alike) != kind_of(CellKey("f", key.arguments, "0"))
    plant([key, alike], [1., 2.])
    found, = finished(Listing.of()).values()
    assert sorted(found.seconds) == [1., 2.]


def test_disk_is_that_of_sets_of_the_same_kind(tmp_path):
    keys, found = cells_of()
    before = bill("mcs/fig2", settings=SMALL)["disk"]
    assert before["sets"] == {"files": 4, "bytes": 4 * set_bytes("mnist5k", Random(), 10), "unknown": 0}
    assert before["records"] == {"files": 7, "bytes": 0, "unknown": 7}
    (_, one), = needs_set(**found.grids[-1].cells[0])
    compressed(one["data"], one["method"], one["ipc"], one["set_seed"], one["device"])
    there, = (Path(os.environ["RDD_STORE"]).parent / "compressed").glob("*.safetensors")
    plant(keys[1:2], [1.])
    size = CellStore().path(keys[1]).stat().st_size
    after = bill("mcs/fig2", settings=SMALL)["disk"]
    known = 2 * there.stat().st_size + set_bytes("mnist5k", Random(), 10)
    assert after["sets"] == {"files": 3, "bytes": known, "unknown": 0}
    assert after["records"] == {"files": 6, "bytes": 5 * size, "unknown": 1}                          # that of `made`


@pytest.mark.parametrize("name, ipc", [("random", 2), ("dm", 1)])
def test_the_bytes_of_a_set_are_those_of_its_file(tmp_path, name, ipc):
    from rdd_lib import find_method
    method = find_method(name).build("mnist5k", ipc, **{"iterations": 1, "batch_real": 2} if name == "dm" else {})
    S = method.compress(load("mnist5k"), ipc=ipc, device="cpu")
    assert 0 <= save(S, tmp_path / "s.safetensors").stat().st_size - set_bytes("mnist5k", method, ipc) < 4096


def test_data_sets_that_are_not_at_hand_are_planned_and_priced(nothing_there):
    plan = bill("mcs/table1", "paper")
    assert [(d["name"], d["bytes"]) for d in plan["downloads"]] == [
        ("mnist", 11594722), ("cifar10", 170498071), ("cifar100", 169001437), ("svhn", 246316178)]
    assert {row["data"] for row in plan["pages"][0]["rows"]} == {"mnist", "cifar10", "cifar100", "svhn"}
    assert "download   svhn: 246 MB, downloaded on first use" in bill_text(plan)
    assert size_of("imagenet@224").how.startswith("put ILSVRC2012's")
    plan = bill("guard_early/clean", settings={"datasets": ["nowhere/of_mine"]})
    assert plan["downloads"] == [{"name": "nowhere/of_mine", "bytes": None, "pages": ["guard_early/clean"],
                                  "how": "no such file or folder: 'nowhere/of_mine'"}]


def test_what_a_page_refuses_a_plan_refuses():
    for settings, error in (({"metods": "Rand"}, UnknownName), ({"methods": "Rnd"}, UnknownName),
                            ({"seeds": "many"}, BadArgument)):
        with pytest.raises(error): bill("mcs/fig2", settings=settings)
    with pytest.raises(UnknownName): bill("mcs/fig2", "quick")


def test_a_store_is_listed_and_read_without_an_index():
    "Broken, foreign and unfinished files are passed over; the folder is left as it is."
    folder = CellStore().folder
    keys = [CellKey("a.score", {"x": n // 100, "seed": n}) for n in range(500)]
    keys += [CellKey("made", {"seed": n}) for n in range(100)]
    plant(keys, range(1, 601))
    CellStore().path(keys[0]).write_text("{")
    (folder / f".{keys[1].file}.tmp.json").write_text("{")
    (folder / f"{keys[2].file}.broken").write_text("{")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    listing = Listing.of()
    assert listing.counts == {"score": 500, "made": 100} and len(listing) == 600 and keys[0] in listing
    took = finished(listing)
    assert sorted(len(f.seconds) for f in took.values()) == [99, 100, 100, 100, 100, 100]
    assert sorted(took[kind_of(keys[150])].seconds) == [*range(101, 201)]
    assert sum(len(f.runs) for f in finished(listing, ["made"]).values()) == 100
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_from_the_shell(rdd):
    "As a table and as JSON; nothing but the plan is on stdout."
    words = ("reproduce", "mcs/fig2", "--plan", "--set", "methods=Rand,MCS", "--set", "seeds=1")
    told = rdd(*words)
    assert told.returncode == 0 and told.stderr == "" and re.search(r"Rand +mnist5k +0 +1 ", told.stdout)
    plan = json.loads(rdd(*words, "--json").stdout)
    assert plan["schema"] == "rdd_lib.plan/1" and plan["total"]["to_do"] == 2
    assert not Path("figures").exists() and not Path(os.environ["RDD_STORE"]).exists()
    assert "unknown setting" in rdd("reproduce", "mcs/fig2", "--plan", "--set", "nothing=1").stderr
