"""What is on disk while a result is not safe: checkpoints that stay until it is written, and a cache that cannot be
written and stops nobody."""
import os
import warnings
from dataclasses import dataclass
import pytest
import torch
from typer.testing import CliRunner
from rdd_lib.published import load_compressed
from rdd_lib.compressed import save
from rdd_lib.core import Unwritable
from rdd_lib.coresets.random import Random
from rdd_lib.coresets.signals import Proxy, signals
from rdd_lib.data import load, sample
from rdd_lib.distill.distribution import DistributionMatching
from rdd_lib.distill.experts import Experts
from rdd_lib.models import Net
from rdd_lib import cli
from rdd_lib.reproduce import cells as protocol
from rdd_lib.reproduce.grid import run_grid
from rdd_lib.reproduce.store import CellStore
from rdd_lib import files
from rdd_lib.attacks.pgd import PGD
from rdd_lib.attacks.until_broken import attack_until_broken
from rdd_lib.evaluation.outcome import evaluate
from rdd_lib.certificates.smoothing import Smoothed
from rdd_lib.attacks.threats import Linf
from rdd_lib.training.trainer import Trainer

SMALL = Net("convnet", dict(width=4))
DM = DistributionMatching(iterations=3, batch_real=4, net=SMALL)


@pytest.fixture(scope="module")
def digits(): return sample(load("mnist5k"), 60)


@pytest.fixture
def no_cache(tmp_path, monkeypatch):
    "A cache that nothing can be written to: its folder is a file."
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "file" / "cells"))


@pytest.fixture
def full(monkeypatch):
    "A disk that takes no result: `full.disk = False` empties it."
    class Disk: disk = True
    def fails(real):
        def wrapped(*args):
            if Disk.disk: raise Unwritable("cannot write it: No space left on device")
            return real(*args)
        return wrapped
    monkeypatch.setattr("rdd_lib.compressed.save", fails(save))
    monkeypatch.setattr(files, "save_table", fails(files.save_table))
    return Disk


def rdd(line, folder):
    old = os.getcwd()
    os.chdir(folder)
    try: return CliRunner().invoke(cli.app, line.split())
    finally: os.chdir(old)


# --- checkpoints ------------------------------------------------------------------------------------------------------
def test_a_checkpoint_stays_until_the_set_is_written(digits, tmp_path):
    path, whole = tmp_path / "run", DM.compress(digits, ipc=1, device="cpu")
    made = DM.compress(digits, ipc=1, device="cpu", checkpoint=path, every=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(Unwritable): save(made, tmp_path / "file" / "set.safetensors")
    assert path.exists()
    again = DM.compress(digits, ipc=1, device="cpu", checkpoint=path, every=1)              # the work is not gone
    assert torch.equal(again.x, whole.x)
    save(again, tmp_path / "set.safetensors")
    assert not path.exists() and torch.equal(load_compressed(tmp_path / "set.safetensors").x, whole.x)


def test_compress_keeps_its_checkpoint_when_the_disk_is_full(tmp_path, monkeypatch, full):
    from rdd_lib.distill import synthetic
    keep = synthetic._Keeper.keep
    def at_once(self, done):
        self.every = 1
        keep(self, done)
    monkeypatch.setattr(synthetic._Keeper, "keep", at_once)
    line = "compress dm mnist5k --ipc 1 --set iterations=2 --set batch_real=4 --set net.name=mlp --device cpu -o x"
    assert isinstance(rdd(line, tmp_path).exception, Unwritable)
    assert os.listdir(tmp_path) == ["x.checkpoint"]
    full.disk = False
    assert rdd(line, tmp_path).exit_code == 0
    assert os.listdir(tmp_path) == ["x"]


def test_score_keeps_its_evaluations_until_the_table_is_written(tmp_path, full):
    full.disk = False
    save(Random().compress(load("mnist5k"), ipc=1, device="cpu"), tmp_path / "set.safetensors")
    line = "score set.safetensors --net mlp --n-test 20 --attack quick --set steps=3 --seeds 2 --device cpu -o t.csv"
    full.disk = True
    assert isinstance(rdd(line, tmp_path).exception, Unwritable)
    assert len([n for n in os.listdir(tmp_path) if n.startswith("t.csv.") and n.endswith(".checkpoint")]) == 2
    full.disk = False
    assert rdd(line, tmp_path).exit_code == 0
    assert sorted(n for n in os.listdir(tmp_path) if n != "store") == ["set.safetensors", "t.csv"]


def test_an_evaluation_stays_until_it_is_saved(digits, tmp_path):
    model, path = SMALL(digits), tmp_path / "run"
    asked = []
    model.register_forward_hook(lambda *_: asked.append(1))
    first = evaluate(model, digits, PGD(Linf(.2)), device="cpu", checkpoint=path)
    asked.clear()
    again = evaluate(model, digits, PGD(Linf(.2)), device="cpu", checkpoint=path)
    assert len(asked) == 1 and torch.equal(again.by, first.by) and torch.equal(again.step, first.step)
    assert again.forward_samples == first.forward_samples
    assert path.exists() and again.checkpoint == path
    again.save(tmp_path / "t.csv")
    assert not path.exists()


@pytest.mark.parametrize("run", [
    lambda digits, path: DM.compress(digits, ipc=1, device="cpu", checkpoint=path, log=Refuses()),
    lambda digits, path: attack_until_broken(PGD(Linf(.1)), never, digits.images(), digits.y, checkpoint=path),
    lambda digits, path: Smoothed(Never(), .3).certify(digits.images(), device="cpu", checkpoint=path),
    ], ids=["distiller", "attack", "smoothing"])
def test_a_folder_as_checkpoint_is_refused_before_the_work(digits, tmp_path, run):
    (tmp_path / "folder").mkdir()
    with pytest.raises(Unwritable, match="folder': it is a folder$"): run(digits, tmp_path / "folder")
    assert (tmp_path / "folder").is_dir() and not os.listdir(tmp_path / "folder")


class Refuses(list):
    def append(self, loss): raise AssertionError("the work had begun")


def never(x): raise AssertionError("the work had begun")


class Never(torch.nn.Module):
    def forward(self, x): never(x)


# --- a cache that cannot be written -----------------------------------------------------------------------------------
def test_score_needs_no_cache(tmp_path, no_cache):
    save(Random().compress(load("mnist5k"), ipc=1, device="cpu"), tmp_path / "set.safetensors")
    with pytest.warns(RuntimeWarning, match="cannot be kept.*set RDD_STORE"):
        done = rdd("score set.safetensors --net mlp --n-test 20 --attack quick --set steps=3 --device cpu", tmp_path)
    assert done.exit_code == 0 and "robust" in done.output, done.exception


def test_an_evaluation_needs_no_cache(digits, no_cache):
    model = SMALL(digits)
    told = "the checkpoint of an evaluation cannot be kept: cannot write .*; set RDD_STORE"
    with pytest.warns(RuntimeWarning, match=told):
        found = evaluate(model, digits, PGD(Linf(.2)), device="cpu", checkpoint=True)
    assert torch.equal(found.by, evaluate(model, digits, PGD(Linf(.2)), device="cpu").by)


def test_an_evaluation_survives_a_cache_that_fills_up(digits, monkeypatch):
    model, tries = SMALL(digits), []
    def fills(path):
        tries.append(path)
        raise Unwritable("cannot write it: No space left on device")
    monkeypatch.setattr("rdd_lib.files.atomic", fills)
    with pytest.warns(RuntimeWarning, match="No space left on device; set RDD_STORE"):
        evaluate(model, digits, PGD(Linf(.2)), device="cpu", checkpoint=True, every=0)
    assert len(tries) == 1


def test_signals_need_no_cache(digits, no_cache):
    proxy = Proxy(SMALL, Trainer(steps=2))
    with pytest.warns(RuntimeWarning, match="the signals cannot be kept.*set RDD_STORE"):
        found = signals(digits, proxy, device="cpu")
    assert torch.equal(found.logits, signals(digits, proxy, device="cpu", keep=False).logits)


def test_experts_need_no_cache(digits, no_cache, tmp_path):
    experts = Experts(n=2, epochs=1, batch=30)
    with pytest.warns(RuntimeWarning, match="the experts cannot be kept.*set RDD_STORE"):
        paths = experts(SMALL, digits, device="cpu")
    kept = experts(SMALL, digits, folder=tmp_path / "experts", device="cpu")
    assert all(torch.equal(paths.read(k, (0, 1)), kept.read(k, (0, 1))) for k in range(2))
    with pytest.raises(Unwritable):                                                         # asked for: refused
        experts(SMALL, digits, folder=tmp_path / "file" / "experts", device="cpu")
    files = paths.files
    del paths
    assert not files[0].exists()


@pytest.mark.parametrize("method", [Random(), DM])
def test_a_compressed_set_needs_no_cache(digits, no_cache, monkeypatch, method):
    monkeypatch.setattr(protocol, "dataset", lambda name, split: digits)
    with pytest.warns(RuntimeWarning, match="the compressed set cannot be kept.*set RDD_STORE") as said:
        made = protocol.compressed("mnist5k", method, 1, 0, "cpu")
    assert len(said) == 1 and torch.equal(made.x, method.compress(digits, ipc=1, seed=0, device="cpu").x)


@dataclass(frozen=True)
class Double:
    def __call__(self, n): return 2 * n


def test_cells_need_no_default_store(no_cache, tmp_path):
    with pytest.warns(RuntimeWarning, match="results cannot be kept.*set RDD_STORE"):
        assert [r["result"] for r in run_grid([dict(n=1), dict(n=2)], Double(), progress=False)] == [2, 4]
    with pytest.raises(Unwritable):
        run_grid([dict(n=1)], Double(), CellStore(tmp_path / "file" / "mine"), progress=False)


def test_a_cache_that_can_be_written_is_kept_without_a_word(digits, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(SMALL(digits), digits, PGD(Linf(.2)), device="cpu", checkpoint=True)
        signals(digits, Proxy(SMALL, Trainer(steps=2)), device="cpu")
        Experts(n=1, epochs=1, batch=30)(SMALL, digits, device="cpu")
        run_grid([dict(n=1)], Double(), progress=False)
    assert sorted(os.listdir(tmp_path / "store")) == ["cells", "evaluations", "experts", "signals"]
    assert not os.listdir(tmp_path / "store" / "evaluations")
