"""Image folders: which part of a photograph is seen, which classes are read, what is said where that fails."""
import os
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from rdd_lib.core import BadArgument, BrokenFile, MissingData
from rdd_lib.data import DATASETS, load, of_classes
from rdd_lib.files import kept
from rdd_lib.folders import class_folders, evaluation_view, pictures_in, training_view
from rdd_lib.models import build

IDS = ("n01440764", "n02102040", "n02979186")
SIDES = [(50, 33), (33, 50), (24, 24), (7, 5), (224, 300)]


def coarse(w, h, seed):
    "A photograph's stand-in: blurred noise."
    noise = np.random.default_rng(seed).integers(0, 256, (max(2, h // 6), max(2, w // 6), 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((w, h))


def theirs(image, scaled, size):
    return np.asarray(transforms.Compose([transforms.Resize(scaled), transforms.CenterCrop(size)])(image))


@pytest.fixture
def nette(tmp_path, monkeypatch):
    "Three classes of five JPEG files of different sides in each split."
    monkeypatch.setenv("RDD_DATA", str(tmp_path))
    root = tmp_path / "imagenette/imagenette2"
    for s, split in enumerate(("train", "val")):
        for c, wnid in enumerate(IDS):
            (root / split / wnid).mkdir(parents=True)
            for n, (w, h) in enumerate(SIDES):
                coarse(w, h, 100 * s + 10 * c + n).save(root / split / wnid / f"{n}.JPEG")
    return root


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("RDD_DATA", str(tmp_path))
    root = tmp_path / "tiny_imagenet/tiny-imagenet-200"
    (root / "val/images").mkdir(parents=True)
    for n, wnid in enumerate(IDS):
        (root / "train" / wnid / "images").mkdir(parents=True)
        coarse(64, 64, n).save(root / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        coarse(64, 64, 9 + n).save(root / f"val/images/val_{n}.JPEG")
    (root / "val/val_annotations.txt").write_text("".join(f"val_{n}.JPEG\t{IDS[2 - n]}\t0\n" for n in range(3)))
    return root


def files(root, split): return sorted(p for f in class_folders(root / split) for p in pictures_in(f))


def arrays(data): return list(data.x.permute(0, 2, 3, 1).numpy())


def same(data, made):
    assert len(data) == len(made) and all(np.array_equal(a, b) for a, b in zip(arrays(data), made))


# --- which part is seen -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, scaled", [(224, 256), (128, 146), (64, 73), (None, 146)])
def test_the_test_split_is_what_torchvision_cuts_out_to_the_byte(nette, size, scaled):
    with_margin = [theirs(Image.open(p), scaled, size or 128) for p in files(nette, "val")]
    same(load("imagenette", "test", size), with_margin)


@pytest.mark.parametrize("size", [64, 224])
def test_the_training_split_has_no_margin(nette, size):
    same(load("imagenette", size=size), [np.asarray(training_view(Image.open(p), size)) for p in files(nette, "train")])


def test_the_training_view_is_the_middle_square():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    assert training_view(image, 10).getextrema() == ((255, 255),) * 3                   # the middle third, all of it
    assert np.array_equal(evaluation_view(image, 16, 1), theirs(image, 16, 16))


def test_tiny_imagenet_at_its_own_size_is_left_alone_and_above_it_has_the_margin(tiny):
    val = [tiny / f"val/images/val_{n}.JPEG" for n in range(3)]
    test = load("tiny_imagenet", "test")
    same(test, [np.asarray(Image.open(p)) for p in val])
    assert test.y.tolist() == [2, 1, 0]
    same(load("tiny_imagenet"), [np.asarray(Image.open(p)) for p in files(tiny, "train")])
    same(load("tiny_imagenet", "test", size=224), [theirs(Image.open(p), 256, 224) for p in val])
    assert load("tiny_imagenet", size=224).shape == (3, 224, 224)


def test_the_margin_is_a_setting_of_the_folder(nette):
    bare = replace(DATASETS["imagenette"], test_margin=1)
    same(bare.load("test", 64), [theirs(Image.open(p), 64, 64) for p in files(nette, "val")])


@pytest.mark.skipif(not (kept("data") / "imagenette").is_dir(), reason="imagenette is not at hand; set RDD_DATA")
def test_photographs_are_cut_as_torchvision_does():
    data = load("imagenette", "test", size=224, classes=["church"])
    paths = sorted(pictures_in(kept("data") / "imagenette/imagenette2/val/n03028079"))
    same(data, [theirs(Image.open(p).convert("RGB"), 256, 224) for p in paths])


# --- some classes -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("classes", [2, ["cassette player", "tench"], [1], np.array([2, 0]), torch.tensor([1, 2])])
def test_some_classes_are_what_is_left_of_all(nette, tiny, split, classes):
    whole, part = load("imagenette", split, 8), load("imagenette", split, 8, classes)
    assert (part.fingerprint, part.classes) == ((rest := of_classes(whole, classes)).fingerprint, rest.classes)
    tinies = load("tiny_imagenet", split, 8, classes)
    assert tinies.fingerprint == of_classes(load("tiny_imagenet", split, 8), classes).fingerprint
    assert build("mlp", part, width=4).classes == part.classes


def test_files_of_other_classes_are_not_read(nette, tiny):
    (nette / "train" / IDS[1] / "0.JPEG").write_bytes(b"")
    assert load("imagenette", size=8, classes=["tench"]).classes == ("tench",)
    with pytest.raises(BrokenFile): load("imagenette", size=8)
    (tiny / "val/images/val_2.JPEG").unlink()                                               # of the first class
    assert load("tiny_imagenet", "test", 8, classes=[2, 1]).y.tolist() == [0, 1]
    (tiny / "val/val_annotations.txt").write_text(f"val_0.JPEG\t{IDS[2]}\t0\n")
    with pytest.raises(MissingData, match="no class folders with images of the classes asked for"):
        load("tiny_imagenet", "test", 8, classes=1)


def test_some_classes_of_arrays():
    whole = load("mnist5k")
    assert torch.equal(load("mnist5k", classes=3).x, whole.x[whole.y < 3])


@pytest.mark.parametrize("classes", [0, -1, 4, True, 1.5, "tench", ["lion"], [3], [-1], [[0]], [None], [], {}])
def test_classes_that_make_no_sense(nette, classes):
    with pytest.raises(BadArgument, match=r"^classes must .* got"): load("imagenette", size=8, classes=classes)


# --- what is broken or too large --------------------------------------------------------------------------------------

def cut(path): return path.read_bytes()[:path.stat().st_size // 2]


@pytest.mark.parametrize("size", [8, 64, 224])
@pytest.mark.parametrize("left", [cut, lambda path: b"", lambda path: b"<html>Not found</html>"])
def test_a_broken_photograph_is_named_in_one_sentence(nette, left, size):
    path = nette / "val" / IDS[1] / "4.JPEG"
    path.write_bytes(left(path))
    before = sorted(os.walk(nette))
    with pytest.raises(BrokenFile) as e: load("imagenette", "test", size)
    assert str(e.value).startswith(f"{str(path)!r} cannot be read as an image (") and "\n" not in str(e.value)
    assert sorted(os.walk(nette)) == before
    load("imagenette", "train", size)


def test_what_does_not_fit_into_memory_is_refused_before_a_file_is_read(nette, monkeypatch):
    for path in files(nette, "train"): path.write_bytes(b"")
    monkeypatch.setattr("rdd_lib.folders._available", lambda: 2e6)
    told = "classes fewer: imagenette/train at size 224 needs 0.00226 GB of memory, and 0.002 GB are available"
    with pytest.raises(BadArgument, match=told): load("imagenette", size=224)
    with pytest.raises(BrokenFile): load("imagenette", size=224, classes=2)
    with pytest.raises(BrokenFile): load("imagenette", size=200)


def test_available_memory_is_known_or_not_limited(monkeypatch):
    from rdd_lib import folders
    assert 1e7 < folders._available()
    monkeypatch.setattr(folders, "Path", lambda _: nothing)
    assert 1e7 < folders._available()
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert folders._available() == float("inf")


class nothing:
    @staticmethod
    def read_text(): raise FileNotFoundError


def test_a_set_of_another_size_and_some_classes_meets_its_own_test_images(nette, rdd):
    done = rdd("compress", "mcs", "imagenette", "--ipc", 2, "--size", 12, "--classes", 2, "-o", "s")
    assert done.returncode == 0 and "4 images of 3x12x12, 2 classes" in done.stdout, done.stderr
    done = rdd("show", "s", "--verify")
    assert done.returncode == 0 and "certificate verified" in done.stdout, done.stderr
    done = rdd("score", "s", "--net", "mlp", "--n-test", 10, "--attack", "quick", "--set", "steps=1")
    assert done.returncode == 0 and "; 10 test images" in done.stdout, done.stderr


def test_the_source_of_a_set_is_found_by_its_classes(nette):
    from rdd_lib.cli_score import source_of
    part = load("imagenette", size=8, classes=["cassette player", "tench"])
    assert source_of(part, "train").fingerprint == part.fingerprint
    assert source_of(part, "test").classes == part.classes
    published = replace(load("imagenette", size=8), classes=("0", "1", "2"))           # no more is known of them
    assert len(source_of(published, "test")) == 15
