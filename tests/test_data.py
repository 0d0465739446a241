"""Data sets: what stands in $RDD_DATA is what it should be; what is broken or cannot be had is said so."""
import os
from types import SimpleNamespace
import numpy as np
import pytest
import torch
from rdd_lib.attacks.threats import Linf
from rdd_lib.cli_score import judged_images
from rdd_lib.core import BrokenFile, MissingData, UnknownName
from rdd_lib.data import CIFAR10, load, sample
from rdd_lib.evaluation.checks import Case, Effort
from rdd_lib.files import kept
from rdd_lib.models import Net
from rdd_lib.reproduce import cells
from rdd_lib.reproduce.cells import dataset, set_and_test
from conftest import needs


@needs("mnist")
def test_full_mnist():
    train, test = load("mnist"), load("mnist", "test")
    assert (len(train), len(test), train.shape) == (60_000, 10_000, (1, 28, 28))
    assert [len(i) for i in train.per_class] == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(train.images().mean() - .1307) < 1e-4


@needs("cifar10")
def test_full_cifar10():
    train, test = load("cifar10"), load("cifar10", "test")
    assert (len(train), len(test), train.shape, train.classes) == (50_000, 10_000, (3, 32, 32), CIFAR10)
    assert [len(i) for i in train.per_class] == [5000] * 10
    mean = train.x.double().mean((0, 2, 3)) / 255
    assert torch.allclose(mean, torch.tensor([.49139968, .48215841, .44653091]).double(), atol=1e-7)


def at_hand(name, inside):
    reason = f"{name} is not at hand; set RDD_DATA to a folder with {name}/{inside}/"
    return pytest.mark.skipif(not (kept("data") / name).is_dir(), reason=reason)


@at_hand("imagenette", "imagenette2")
def test_imagenette():
    data = load("imagenette", "test", size=64)
    assert data.shape == (3, 64, 64) and data.n_classes == 10 and "parachute" in data.classes
    assert all(len(i) for i in data.per_class)


@at_hand("tiny_imagenet", "tiny-imagenet-200")
def test_tiny_imagenet():
    train, test = load("tiny_imagenet"), load("tiny_imagenet", "test")
    assert train.shape == test.shape == (3, 64, 64) and train.classes == test.classes and len(train.classes) == 200
    assert all(len(i) for i in test.per_class)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("RDD_DATA", str(tmp_path))
    return tmp_path


def npz(folder, **arrays):
    (folder / "mnist").mkdir()
    np.savez(folder / "mnist" / "train.npz", **arrays)


TWO = np.zeros((2, 28, 28, 1), np.uint8)
BROKEN = {"no y": dict(x=TWO), "floats": dict(x=TWO.astype(np.float32), y=np.zeros(2, int)),
          "no channel": dict(x=TWO[..., 0], y=np.zeros(2, int)), "lengths": dict(x=TWO, y=np.zeros(3, int)),
          "label": dict(x=TWO, y=np.array([0, 10])), "empty": dict(x=TWO[:0], y=np.zeros(0, int)),
          "pickle": dict(x=np.array([{}], dtype=object), y=np.zeros(1, int))}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_npz_is_named(folder, what):
    npz(folder, **BROKEN[what])
    with pytest.raises(BrokenFile, match="train.npz"): load("mnist")


def test_a_truncated_npz_is_named_and_left(folder):
    npz(folder, x=np.zeros((20, 28, 28, 1), np.uint8), y=np.zeros(20, int))
    path = folder / "mnist" / "train.npz"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(BrokenFile, match="remove it to have it made again"): load("mnist")


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar100", "svhn"])
def test_an_unreachable_download_says_what_to_do(folder, name):
    with pytest.raises(MissingData, match=f"{name} is not in .* and could not be downloaded") as e: load(name)
    assert "RDD_DATA" in str(e.value)
    assert not list((folder).glob("*/*.npz"))                       # nothing half-written


@pytest.mark.parametrize("name", ["imagenette", "tiny_imagenet", "imagenet"])
def test_a_missing_folder_says_what_to_do(folder, name):
    with pytest.raises(MissingData, match="is expected in"): load(name)


def test_an_unknown_name_lists_the_nearest(folder):
    with pytest.raises(UnknownName, match="did you mean 'cifar10'"): load("cifer10")
    assert not os.listdir(folder)


# --- parts keep the shares of the classes, also where a file is in their order: its first n would be one class --------

def counts(data): return torch.bincount(data.y, minlength=data.n_classes).tolist()


@pytest.fixture
def in_order(folder):
    "A CIFAR-10 of 30 training and 15 test images a class, class after class."
    (folder / "cifar10").mkdir()
    for split, n in (("train", 30), ("test", 15)):
        y = np.arange(10).repeat(n)
        x = np.random.default_rng(0).integers(0, 256, (len(y), 32, 32, 3), np.uint8)
        np.savez(folder / "cifar10" / f"{split}.npz", x=x, y=y)
    cells._read.cache_clear()
    yield
    cells._read.cache_clear()


def test_a_sample_keeps_the_shares(in_order):
    data = load("cifar10")
    assert counts(data.subset(range(100))) == [30, 30, 30, 10] + [0] * 6            # what the first hundred would be
    for seed in (0, 1): assert counts(sample(data, 100, seed)) == [10] * 10
    assert sorted(counts(sample(data, 57))) == [5] * 3 + [6] * 7
    uneven = data.subset(torch.cat([rows[:3 * (c + 1)] for c, rows in enumerate(data.per_class)]))
    assert counts(sample(uneven, 55)) == [*range(1, 11)]
    assert counts(sample(load("mnist5k"), 200)) == [20] * 10                        # these digits are in order too


def test_parts_by_name_keep_the_shares(in_order):
    assert counts(dataset("cifar10:100", "train")) == [10] * 10
    assert counts(dataset("cifar10,5:100", "train")) == [20] * 5
    assert counts(dataset("cifar10:100", "test")) == [15] * 10                      # a part of the training images only


def testjudged_images_keep_the_shares(in_order):
    whole, test, about = set_and_test("cifar10", None, None, 0, 40)
    assert counts(whole) == [30] * 10 and counts(test) == [4] * 10 and about["n_test"] == 40
    assert counts(judged_images(SimpleNamespace(n_test=40), whole)) == [4] * 10      # rdd score --n-test 40
    case = Case(Net("mlp", dict(width=4))(whole), load("cifar10", "test"), Linf(.1), effort=Effort(images=20))
    assert torch.bincount(case.all_y).tolist() == [2] * 10                          # rdd score --diagnose


@needs("cifar10")
def test_a_part_of_the_real_file_keeps_the_shares():
    assert counts(dataset("cifar10:100", "train")) == [10] * 10
    assert counts(sample(load("cifar10", "test"), 2000)) == [200] * 10
