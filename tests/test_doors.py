"""What comes in at a door or goes out at one: image folders, arrays, NumPy's numbers, full disks; as users met them."""
import json
import os
import pwd
import resource
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from rdd_lib.compressed import Compressed, save
from rdd_lib.compressor import METHODS, Compressor, Method, budget, find_method, methods
from rdd_lib.core import BadArgument, BrokenFile, MissingData, UnknownName, Unwritable, plain
from rdd_lib.files import atomic, kept, recalled, require_readable
from rdd_lib.coresets.random import Random
from rdd_lib.coresets.covering import MinimalCoreset, verify_coreset
from rdd_lib.coresets.relaxed import RelaxedCoreset
from rdd_lib.data import DATASETS, ImageSet, load
from rdd_lib.models import MODELS, Net, build, check_classes
from rdd_lib.exports import export, load_weights, published_stats
from rdd_lib.published import load_compressed, load_published
from rdd_lib.evaluation.outcome import evaluate, rob_score, std_score
from rdd_lib.attacks.threats import Linf
from rdd_lib.training.trainer import Trainer

IDS = ("n01440764", "n02102040", "n02979186")
NAMES = ("tench", "English springer", "cassette player")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("RDD_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def picture(path, grey):
    "A picture of one grey, 8x8."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), grey, np.uint8)).save(path)


@pytest.fixture
def nette(place):
    "Three classes of two pictures in each split; the pictures of class c are of grey 40 * (c + 1)."
    root = place / "imagenette/imagenette2"
    for split in ("train", "val"):
        for c, wnid in enumerate(IDS):
            for i in range(2): picture(root / split / wnid / f"{i}.png", 40 * (c + 1))
    return root


def both(): return [load("imagenette", split, size=8) for split in ("train", "test")]


def agree(train, test, counts=(2, 2, 2)):
    "Both splits number the classes alike: the grey of each picture tells its class."
    assert train.classes == test.classes == NAMES
    for data in (train, test): assert torch.equal(data.y, data.x[:, 0, 0, 0].long() // 40 - 1)
    assert [len(i) for i in test.per_class] == list(counts)


# --- image folders ----------------------------------------------------------------------------------------------------

def test_folders_as_they_should_be(nette): agree(*both())


def test_a_val_without_one_class_keeps_its_numbers(nette):
    shutil.rmtree(nette / "val" / IDS[0])
    agree(*both(), (0, 2, 2))


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def test_an_empty_class_folder(nette):
    emptied(nette / "val" / IDS[1])
    agree(*both(), (2, 0, 2))
    (nette / "val/n09").mkdir()                                       # a class of nothing, in val only
    agree(*both(), (2, 0, 2))
    emptied(nette / "train" / IDS[0])
    for split in ("train", "test"):                                   # whichever split is asked for
        with pytest.raises(MissingData, match=f"{IDS[0]}; put them there, or remove"):
            load("imagenette", split, size=8)


def test_a_class_folder_that_is_a_link(nette, tmp_path):
    shutil.move(nette / "val" / IDS[0], tmp_path / "elsewhere")
    (nette / "val" / IDS[0]).symlink_to(tmp_path / "elsewhere")
    shutil.move(nette / "train" / IDS[2], tmp_path / "there")
    (nette / "train" / IDS[2]).symlink_to(tmp_path / "there")
    agree(*both())
    (tmp_path / "there" / "up").symlink_to(tmp_path / "there")        # leads back up: is not followed for ever
    agree(*both())


def test_hidden_names_and_strays_are_no_classes(nette):
    for split in ("train", "val"):
        picture(nette / split / ".ipynb_checkpoints/0-checkpoint.png", 7)
        picture(nette / split / "contact_sheet.png", 7)
        (nette / split / IDS[0] / "._0.JPEG").write_bytes(b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X")
        picture(nette / split / IDS[1] / ".ipynb_checkpoints/1.png", 7)
    picture(nette / "val" / "a.png", 7)             # before the ids in the alphabet, in one split only
    agree(*both())


@pytest.mark.parametrize("suffix", [".bmp", ".webp", ".PNG", ".tif", ".ppm"])
def test_one_class_in_another_format_only(nette, suffix):
    for i in range(2):
        (nette / "val" / IDS[0] / f"{i}.png").unlink()
        path = nette / "val" / IDS[0] / f"{i}{suffix}"
        Image.fromarray(np.full((8, 8, 3), 40, np.uint8)).save(path, lossless=True)
    agree(*both())


def test_a_class_that_train_lacks(nette):
    picture(nette / "val/n09/0.png", 7)
    with pytest.raises(MissingData, match="val' has images of n09, but .*train' has no such class folder"): both()


def test_the_flat_val_of_ilsvrc2012(place):
    root = place / "imagenet"
    for c, wnid in enumerate(IDS): picture(root / "train" / wnid / "0.png", 40 * (c + 1))
    for i in range(3): picture(root / "val" / f"ILSVRC2012_val_0000000{i}.png", 40)
    assert load("imagenet", size=8).classes == NAMES
    with pytest.raises(MissingData, match="val' holds no class folders with images.*into a folder a class"):
        load("imagenet", "test", size=8)
    shutil.rmtree(root / "train")
    with pytest.raises(MissingData, match="train' has no class folders, which number the classes"):
        load("imagenet", size=8)


@pytest.fixture
def tiny(place):
    root = place / "tiny_imagenet/tiny-imagenet-200"
    for c, wnid in enumerate(IDS): picture(root / "train" / wnid / "images" / f"{wnid}_0.png", 40 * (c + 1))
    for i, c in enumerate((2, 0, 2, 1)): picture(root / "val/images" / f"val_{i}.png", 40 * (c + 1))
    rows = [f"val_{i}.png\t{IDS[c]}\t0\t0\t62\t62" for i, c in enumerate((2, 0, 2, 1))]
    (root / "val/val_annotations.txt").write_text("\n".join(rows) + "\n")
    return root


def greys(data): return (data.x[:, 0, 0, 0].long() // 40 - 1).tolist()


def test_tiny_imagenet_as_it_comes(tiny):
    test = load("tiny_imagenet", "test", size=8)
    assert test.y.tolist() == greys(test) == [2, 0, 2, 1]
    assert test.classes == load("tiny_imagenet", size=8).classes == NAMES
    (tiny / "val/val_annotations.txt").write_text("val_0.png n01440764\n")
    with pytest.raises(BrokenFile, match="val_annotations.txt' must hold lines"): load("tiny_imagenet", "test")


@pytest.mark.parametrize("below", ["", "images"])
@pytest.mark.parametrize("table", [True, False])
def test_tiny_imagenet_with_its_val_sorted_into_class_folders(tiny, below, table):
    for i, c in enumerate((2, 0, 2, 1)):
        (tiny / "val" / IDS[c] / below).mkdir(parents=True, exist_ok=True)
        shutil.move(tiny / f"val/images/val_{i}.png", tiny / "val" / IDS[c] / below)
    if not table: (tiny / "val/val_annotations.txt").unlink()
    test = load("tiny_imagenet", "test", size=8)
    assert test.y.tolist() == greys(test) == [0, 1, 2, 2] and test.classes == NAMES


def test_tiny_imagenet_annotated_with_one_class_fewer(tiny):
    (tiny / "val/val_annotations.txt").write_text(f"val_0.png\t{IDS[2]}\t0\n")
    assert load("tiny_imagenet", "test", size=8).y.tolist() == [2]


# --- published image folders ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("names", [("new000", "new001", "new002"), ("a", "b", "c")], ids=["numbers", "order"])
def test_published_folders_pass_over_what_is_no_class(tmp_path, names):
    root, three = tmp_path / "set", ImageSet(torch.zeros(3, 3, 8, 8).byte(), torch.arange(3), "xyz")
    for c, name in enumerate(names): picture(root / name / "0.png", 40 * (c + 1))
    shutil.move(root / names[1], tmp_path / "elsewhere")
    (root / names[1]).symlink_to(tmp_path / "elsewhere")
    picture(root / names[2] / "0.bmp", 120)
    (root / names[2] / "0.png").unlink()
    picture(root / ".ipynb_checkpoints/0.png", 7)
    (root / names[0] / "._0.png").write_bytes(b"\x00\x05\x16\x07")
    (root / "logs").mkdir()
    S = load_published(root, three)
    assert S.y.tolist() == greys(S) == [0, 1, 2]


def test_a_stray_folder_does_not_stand_in_for_a_class(tmp_path):
    for c in (0, 2): picture(tmp_path / f"new00{c}/0.png", 40)
    picture(tmp_path / "preview/0.png", 40)
    three = ImageSet(torch.zeros(3, 3, 8, 8).byte(), torch.arange(3), "xyz")
    with pytest.raises(BadArgument, match="has images in .'preview'., no class"): load_published(tmp_path, three)


# --- trained on some classes, judged on others ------------------------------------------------------------------------

def flat(classes, split="train"):
    y = torch.arange(8) % 2
    return ImageSet((y * 200).byte()[:, None, None, None].expand(8, 1, 28, 28).contiguous(), y, classes, "flat", split)


def test_a_set_is_judged_on_its_own_classes_only():
    S, same, turned, more = flat("ab"), flat("ab", "test"), flat("ba", "test"), flat("abc", "test")
    kw = dict(net=Net("mlp", dict(width=4)), trainer=Trainer(steps=2), seeds=(0,), device="cpu")
    assert std_score(S, same, **kw).outcomes[0].classes == ("a", "b")
    for test, told in ((turned, "class 0 is 'a' there and 'b' here"), (more, "2 there, 3 here")):
        with pytest.raises(BadArgument, match=told): std_score(S, test, **kw)
        with pytest.raises(BadArgument, match=told): rob_score(S, test, Linf(.1), **kw)
        with pytest.raises(BadArgument, match=told): evaluate(build("mlp", S, width=4), test, device="cpu")
    evaluate(build("mlp", flat("01"), width=4), turned, device="cpu")       # numbers are places in the order
    check_classes(None, turned)


def test_rdd_score_refuses_other_classes(place, tmp_path, nette):
    from typer.testing import CliRunner
    from rdd_lib.cli import app
    train = load("imagenette", size=8)
    path = save(Compressed(train.x, train.y, ("x", "y", "z"), "imagenette"), tmp_path / "s.safetensors")
    ran = CliRunner().invoke(app, ["score", str(path), "--net", "mlp", "--n-test", "0"])
    assert isinstance(ran.exception, BadArgument) and "or how many of them, got ('x', 'y', 'z')" in str(ran.exception)


# --- numbers of NumPy -------------------------------------------------------------------------------------------------

@pytest.fixture
def ten():
    y = torch.arange(20) % 10
    return ImageSet((torch.arange(20 * 784) % 251).view(20, 1, 28, 28).byte(), y, "0123456789", "mnist5k")


@pytest.mark.parametrize("size", [dict(ipc=np.int64(2)), dict(total=np.int32(20))])
def test_numpys_integers_are_plain_at_the_door(ten, tmp_path, size):
    (name, value), = size.items()
    S = Random().compress(ten, **size, seed=np.int64(3))
    assert type(S.provenance[name]) is int and S.provenance["seed"] == 3
    exported = [export(S, "pt", tmp_path / "s.pt"), export(S, "folder", tmp_path / "s")]
    for path in (save(S, tmp_path / "s.safetensors"), *exported):
        assert load_compressed(path).provenance == S.provenance and S.provenance[name] == value
    assert torch.equal(S.x, Random().compress(ten, **{name: int(value)}, seed=3).x)
    assert all(type(k) is int for k in budget(ten, **size))


def test_classes_radius_and_schedule_of_numpy_can_be_saved(ten, tmp_path):
    S = Compressed(ten.x, ten.y, np.arange(10), "mine", radius=np.float32(.5), lower_bound=torch.tensor(.25),
                   schedule={"lrs": np.array([.5, .25]), "batches": [torch.tensor([0, 1])]},
                   provenance={"n": np.int64(2)})
    back = load_compressed(save(S, tmp_path / "s.safetensors"))
    assert back.classes == S.classes == tuple(range(10)) and (back.radius, back.lower_bound) == (.5, .25)
    assert back.schedule == {"lrs": [.5, .25], "batches": [[0, 1]]} and back.provenance == {"n": 2}
    assert load_compressed(export(S, "pt", tmp_path / "s.pt", normalise=False)).classes == tuple(range(10))
    with pytest.raises(BadArgument, match=r"provenance\['model'\] must be plain data"):
        Compressed(ten.x, ten.y, ten.classes, provenance={"model": object()})


def test_a_generator_is_no_seed_of_a_compression(ten):
    with pytest.raises(BadArgument, match="seed must be a whole number >= 0"):
        Random().compress(ten, ipc=1, seed=torch.Generator())


def test_plain():
    o = plain({"a": (np.int64(1), [np.float64(.5), np.bool_(True)]), 5: torch.tensor([1, 2]), "t": np.str_("x")})
    assert json.loads(json.dumps(o)) == {"a": [1, [.5, True]], "5": [1, 2], "t": "x"}


# --- budgets that classes share ---------------------------------------------------------------------------------------

@pytest.fixture
def uneven():
    g = torch.Generator().manual_seed(0)
    y = torch.tensor([0] * 60 + [1] * 3)
    return ImageSet(torch.randint(256, (63, 1, 4, 4), generator=g).byte(), y, "ab", "uneven")


QUICK = MinimalCoreset(time_limit=0)                              # what farthest-first finds, with its bound


@pytest.mark.parametrize("method, budget, total", [
    (QUICK, "total", 10), (QUICK, "total", 2), (QUICK, "joint", 10), (QUICK, "joint", 1), (QUICK, "joint", 63),
    (RelaxedCoreset(), "joint", 10), (RelaxedCoreset(), "joint", 1), (RelaxedCoreset(), "joint", 63)])
def test_a_shared_budget_needs_no_equal_split(uneven, method, budget, total):
    S = replace(method, budget=budget).compress(uneven, total=total, device="cpu")
    assert len(S) == total and torch.equal(S.x, uneven.x[S.indices])
    if isinstance(method, MinimalCoreset) and S.certificate: verify_coreset(S, uneven)


def test_five_centres_of_ten_classes(ten):
    assert len(replace(QUICK, budget="joint").compress(ten, total=5, device="cpu")) == 5
    with pytest.raises(BadArgument, match="total=21 asks for 21 images"):
        MinimalCoreset(budget="joint").compress(ten, total=21)
    with pytest.raises(BadArgument, match="5 points cannot cover 10 classes"):
        MinimalCoreset(budget="total").compress(ten, total=5)
    with pytest.raises(BadArgument, match="the same number for each class"): MinimalCoreset().counts(ten, total=15)


# --- pictures ---------------------------------------------------------------------------------------------------------

def decoded(path, channels, size):
    "The picture in a file as a published folder of one class gives it, (H, W, C)."
    one = path.parent / "set" / path.name / "new000"
    one.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, one)
    source = ImageSet(torch.zeros(1, channels, *size), torch.tensor([0]), "a")
    return load_published(one.parent, source).x[0].permute(1, 2, 0).numpy()


def test_grey_of_16_bits(tmp_path):
    values = np.array([[0, 257, 128 * 257, 65535], [128, 129, 1000, 40000]], np.uint16)
    for name in ("a.png", "b.tif"):
        Image.fromarray(values).save(tmp_path / name)
        for channels in (1, 3):
            found = decoded(tmp_path / name, channels, (2, 4))
            assert abs(found - (values / 257)[..., None]).max() <= .5


def test_what_is_transparent_is_on_white(tmp_path):
    rgba = np.zeros((1, 4, 4), np.uint8)
    rgba[0] = [(10, 20, 30, 255), (10, 20, 30, 0), (0, 0, 0, 128), (255, 0, 0, 51)]
    Image.fromarray(rgba).save(tmp_path / "a.png")
    wanted = [(10, 20, 30), (255, 255, 255), (127, 127, 127), (255, 204, 204)]
    assert abs(decoded(tmp_path / "a.png", 3, (1, 4)).astype(int) - [wanted]).max() <= 1
    Image.fromarray(np.array([[[40, 255], [40, 0]]], np.uint8)).save(tmp_path / "b.png")
    assert decoded(tmp_path / "b.png", 1, (1, 2)).tolist() == [[[40], [255]]]
    p = Image.fromarray(np.array([[0, 1]], np.uint8))
    p.putpalette([9, 9, 9, 50, 60, 70])
    p.save(tmp_path / "c.png", transparency=0)
    assert decoded(tmp_path / "c.png", 3, (1, 2)).tolist() == [[[255] * 3, [50, 60, 70]]]


@pytest.mark.parametrize("orientation, turned", [
    (1, lambda a: a), (2, np.fliplr), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)])
def test_exif_orientation_is_applied(tmp_path, orientation, turned):
    a = np.zeros((2, 3, 3), np.uint8)
    a[0, 0], a[1, 2] = 200, 90
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(a).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(decoded(tmp_path / "a.png", 3, turned(a).shape[:2]), turned(a))


def test_load_and_load_published_decode_alike(nette, tmp_path):
    Image.fromarray(np.full((8, 8), 80 * 257, np.uint16)).save(nette / "train" / IDS[1] / "0.png")
    agree(*both())
    three = ImageSet(torch.zeros(3, 1, 8, 8).byte(), torch.arange(3), NAMES)
    for c in range(3):
        (tmp_path / f"s/new00{c}").mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 40 * (c + 1) * 257, np.uint16)).save(tmp_path / f"s/new00{c}/0.png")
    S = load_published(tmp_path / "s", three)
    assert S.y.tolist() == greys(S) == [0, 1, 2]


def test_a_cut_picture_is_named(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg"):
        Image.fromarray(noise).save(tmp_path / name)
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:2000])
        with pytest.raises(BrokenFile, match=f"{name}' cannot be read as an image"):
            decoded(tmp_path / name, 3, (64, 64))


# --- image sets -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [torch.float32, torch.float64, torch.float16, torch.uint8])
def test_writing_into_images_leaves_the_set_alone(kind):
    data = ImageSet(torch.ones(2, 1, 2, 2).to(kind), torch.tensor([0, 1]), "ab")
    before = data.fingerprint
    data.images().zero_()
    assert bool((data.x == 1).all()) and ImageSet(data.x, data.y, "ab").fingerprint == before


@pytest.mark.parametrize("change, told", [
    (dict(x=np.zeros((2, 1, 2, 2), np.uint8)), "x must be a torch tensor .*got ndarray"),
    (dict(y=[0, 1]), "y must be a torch tensor .*got list"),
    (dict(x=torch.zeros(2, 1, 2, 2).bfloat16()), "of 16, 32 or 64 bits, got torch.bfloat16"),
    (dict(classes=2), "classes must be names"),
    (dict(weights=torch.tensor([1, 2])), "weights must be floating point, got torch.int64"),
    (dict(weights=np.ones(2)), "weights must be a torch tensor, got ndarray"),
    (dict(indices=torch.zeros(2)), "indices must be int64"),
    (dict(soft_labels=torch.ones(2, 3)), r"soft_labels must be of shape \(2, 2\), got \(2, 3\)")])
def test_what_no_set_can_hold(change, told):
    right = dict(x=torch.zeros(2, 1, 2, 2), y=torch.tensor([0, 1]), classes="ab")
    with pytest.raises(BadArgument, match=told): Compressed(**right | change)


# --- axis order -------------------------------------------------------------------------------------------------------

def written(place, name, x):
    (place / name).mkdir(parents=True, exist_ok=True)
    np.savez(place / name / "train.npz", x=x, y=np.zeros(len(x), int))
    return load(name)


@pytest.mark.parametrize("name, shape", [("mnist", (1, 28, 28)), ("cifar10", (3, 32, 32))])
def test_npz_with_channels_first_is_turned(place, name, shape):
    x = np.random.default_rng(0).integers(0, 256, (4, *shape), dtype=np.uint8)
    for given in (x, x.transpose(0, 2, 3, 1)):
        data = written(place, name, given)
        assert data.shape == shape and np.array_equal(data.x.numpy(), x)


@pytest.mark.parametrize("name, shape", [
    ("mnist", (28, 28, 3)), ("mnist", (28, 1, 28)), ("mnist", (1, 28, 1)),
    ("cifar10", (32, 32, 4)), ("cifar10", (3, 32, 3)), ("cifar10", (1, 28, 28))])
def test_npz_of_no_certain_order_is_refused(place, name, shape):
    with pytest.raises(BrokenFile, match=r"must hold x \(N, H, W, C\) with C ="):
        written(place, name, np.zeros((4, *shape), np.uint8))


@pytest.mark.parametrize("name, size", [("cifar10", 32), ("tiny_imagenet", 64), ("imagenette", 48)])
def test_published_images_with_channels_last_are_turned(tmp_path, name, size):
    x = torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    for given in (x, x.permute(0, 2, 3, 1).contiguous()):
        torch.save([given, torch.arange(3)], tmp_path / "s.pt")
        assert torch.equal(load_published(tmp_path / "s.pt", name).x, x)
    torch.save([torch.rand(3, 32, 32, 32), torch.arange(3)], tmp_path / "s.pt")
    with pytest.raises(BadArgument, match="has images of 32x32x32"): load_published(tmp_path / "s.pt", name)


# --- learning rates and statistics beside what is published -----------------------------------------------------------

@pytest.mark.parametrize("files, lr", [
    ({"lr_best": .03}, .03), ({"lr_best": .03, "lr": .02}, .03), ({"lr": .02}, .02), ({"lr_5000": .05}, None)])
def test_the_learning_rate_beside_images_best(tmp_path, files, lr):
    x = (torch.rand(2, 3, 32, 32) - .5) / .25
    torch.save(x, tmp_path / "images_best.pt")
    torch.save(torch.arange(2), tmp_path / "labels_best.pt")
    for name, value in files.items(): torch.save(torch.tensor(value, requires_grad=True), tmp_path / f"{name}.pt")
    assert load_published(tmp_path, "cifar10").schedule == (lr and {"lr": lr})
    torch.save(torch.tensor([.1, .2]), tmp_path / "lr_best.pt")
    with pytest.raises(BrokenFile, match="lr_best.pt' must hold one learning rate"): load_published(tmp_path, "cifar10")


def test_stats_of_a_code_base_for_weights(tmp_path):
    data = ImageSet(torch.zeros(2, 3, 32, 32), torch.arange(2), "ab", "cifar10")
    torch.save(build("mlp", data, 1, width=4).model.state_dict(), tmp_path / "w.pt")
    for name in ("cifar10", data):
        model = load_weights(build("mlp", data, width=4), tmp_path / "w.pt", stats="dc", data=name)
        assert torch.equal(model.std.flatten(), torch.tensor(published_stats("dc", "cifar10")[1]))
    with pytest.raises(BadArgument, match="stats='dc' .* give data="):
        load_weights(model, tmp_path / "w.pt", stats="dc")


# --- files and folders ------------------------------------------------------------------------------------------------

@contextmanager
def full_disk(size=4096):
    "No file may grow beyond `size` bytes: what a writer meets on a full disk, but for the number of the error."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def writers():
    import pandas as pd
    from rdd_lib.coresets.signals import Signals
    from rdd_lib.data import _write_npz
    from rdd_lib.reproduce import tables as report
    from rdd_lib.reproduce.store import CellKey, CellStore
    from rdd_lib.files import save_table, write_tensors
    g = torch.Generator().manual_seed(0)
    S = Compressed(torch.randint(256, (20, 3, 32, 32), generator=g).byte(), torch.arange(20) % 10, "0123456789", "mine")
    rows = pd.DataFrame({"a": torch.rand(5000, generator=g).numpy()})
    seen = Signals(torch.rand(999, 9), torch.rand(999, 2), torch.zeros(999).long())
    return {"save": lambda p: save(S, p / "s.safetensors"), "export pt": lambda p: export(S, "pt", p / "s.pt"),
            "export folder": lambda p: export(S, "folder", p / "s"), "csv": lambda p: save_table(rows, p / "t.csv"),
            "parquet": lambda p: save_table(rows, p / "t.parquet"), "report": lambda p: report.save_table(rows, p, "t"),
            "npz": lambda p: _write_npz(p / "t.npz", np.zeros((9, 32, 32, 3), np.uint8), np.zeros(9)),
            "signals": lambda p: write_tensors(p / "s.safetensors", seen._tensors()),
            "text": lambda p: CellStore(p).put(CellKey("f", {}), "x" * 9999),
            "checkpoint": lambda p: write_tensors(p / "c", {"a": torch.zeros(9999)}, done=1)}


WRITERS = "save, export pt, export folder, csv, parquet, report, npz, signals, text, checkpoint".split(", ")


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_unwritable_for_every_writer(tmp_path, name):
    write = writers()[name]
    with full_disk(2000), pytest.raises(Unwritable, match="cannot write .*File too large"): write(tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())      # nothing half-written is left


def test_errors_about_other_files_are_not_about_writing(tmp_path):
    with pytest.raises(FileNotFoundError) as e, atomic(tmp_path / "out") as tmp:
        tmp.write_text((tmp_path / "gone").read_text())
    assert not isinstance(e.value, Unwritable)
    with pytest.raises(MissingData), atomic(tmp_path / "out"): raise MissingData("no such set")
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small(tmp_path, ten):
    return save(Random().compress(ten, ipc=1), tmp_path / "kept" / "s.safetensors")


def test_what_is_kept_and_broken_is_set_aside(small):
    whole = small.read_bytes()
    small.write_bytes(whole[:500])
    with pytest.warns(RuntimeWarning, match="the set .*is broken.*kept as 's.safetensors.broken'"):
        assert recalled(small, load_compressed, "the set") is None
    assert (small.parent / "s.safetensors.broken").read_bytes() == whole[:500] and not small.exists()


@contextmanager
def unreadable(path):
    "As if this file might not be read: tests may run as someone who may read everything."
    real = open

    def refused(file, *more, **kw):
        if str(file) == str(path): raise PermissionError(13, "Permission denied", str(file))
        return real(file, *more, **kw)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("builtins.open", refused)
        m.setattr("safetensors.safe_open", refused)
        yield


def test_what_may_not_be_read_stays_where_it_is(small):
    whole = small.read_bytes()
    with unreadable(small):
        for read in (lambda p: recalled(p, load_compressed, "the set"), load_compressed, require_readable):
            with pytest.raises(BrokenFile, match="cannot read .*Permission denied"): read(small)
    assert small.read_bytes() == whole and os.listdir(small.parent) == [small.name]


@pytest.mark.parametrize("damage", ["cut", "no permission"])
def test_a_protocol_never_deletes_a_kept_set(monkeypatch, damage, ten):
    from rdd_lib.reproduce import cells as protocol
    monkeypatch.setattr(protocol, "dataset", lambda name, split: ten)
    made = protocol.compressed("mnist5k", Random(), 1, 0, "cpu")
    path, = kept("compressed").iterdir()
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:300])
        with pytest.warns(RuntimeWarning, match="is broken"):
            again = protocol.compressed("mnist5k", Random(), 1, 0, "cpu")
        assert torch.equal(again.x, made.x) and path.read_bytes() == whole
        assert path.with_name(path.name + ".broken").read_bytes() == whole[:300]
    else:
        with unreadable(path), pytest.raises(BrokenFile, match="Permission denied"):
            protocol.compressed("mnist5k", Random(), 1, 0, "cpu")
        assert path.read_bytes() == whole and list(kept("compressed").iterdir()) == [path]


def test_broken_signals_are_set_aside_too(tmp_path):
    from rdd_lib.coresets.signals import _read
    save_file({"features": torch.zeros(2, 2)}, tmp_path / "s.safetensors")
    with pytest.warns(RuntimeWarning, match="the file of signals .*is broken"):
        assert recalled(tmp_path / "s.safetensors", _read, "the file of signals") is None
    assert os.listdir(tmp_path) == ["s.safetensors.broken"]


@pytest.fixture
def homeless(monkeypatch):
    "No $HOME, and a user whom the system does not know."
    for name in ("HOME", "XDG_CACHE_HOME", "RDD_DATA", "RDD_STORE"): monkeypatch.delenv(name, raising=False)

    def nobody(uid): raise KeyError(uid)
    monkeypatch.setattr(pwd, "getpwuid", nobody)


def test_folders_without_a_home(homeless, monkeypatch, tmp_path):
    with pytest.raises(MissingData, match="there is no home folder .*set RDD_DATA"): load("mnist")
    with pytest.raises(MissingData, match="set RDD_STORE"): kept("compressed")
    monkeypatch.setenv("RDD_DATA", str(tmp_path))
    assert kept("data") == tmp_path
    assert written(tmp_path, "mnist", np.zeros((2, 28, 28, 1), np.uint8)).shape == (1, 28, 28)
    monkeypatch.delenv("RDD_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept("data") == tmp_path / "rdd_lib/data" and kept("cells") == tmp_path / "rdd_lib/cells"


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RDD_DATA", "~/d")
    monkeypatch.setenv("RDD_STORE", "~/s/cells")
    assert [kept("data"), kept("cells"), kept("signals")] == [tmp_path / p for p in ("d", "s/cells", "s/signals")]
    for name in ("RDD_DATA", "RDD_STORE"): monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", "~/c")
    assert kept("data") == tmp_path / "c/rdd_lib/data" and kept("compressed") == tmp_path / "c/rdd_lib/compressed"


# --- what other packages announce -------------------------------------------------------------------------------------

class Point:
    "An entry point of a package that is called mine."
    value = "mine:thing"

    def __init__(self, name, thing): self.name, self.thing = name, thing

    def load(self):
        if self.thing is None: raise ImportError("no module named 'mine'")
        return self.thing


@pytest.fixture
def announced(monkeypatch):
    "Makes a registry look again, at things of a package that is not there."
    def look(registry, **things):
        group = f"rdd_lib.{registry.kind.replace(' ', '')}s"
        assert len(registry) > 4                          # modules enter their things once: what is put back is whole
        points = {group: [Point(name, thing) for name, thing in things.items()]}
        monkeypatch.setattr("rdd_lib.core.entry_points", lambda group: points.get(group, []))
        for name, value in (("looked", False), ("found", dict(registry.found)), ("names", dict(registry.names))):
            monkeypatch.setattr(registry, name, value)
        with pytest.warns(RuntimeWarning) as told: assert len(registry) > 4
        return [str(w.message) for w in told]
    return look


@dataclass(frozen=True)
class First(Compressor):
    "The first of each class."
    skip: int = 0

    def make(self, data, counts, seed, device):
        return {"indices": torch.cat([rows[self.skip:][:k] for rows, k in zip(data.per_class, counts)])}


def test_methods_of_other_packages(announced, ten):
    preset = Method("second", First, "nobody 1999", preset=lambda data, ipc: {"skip": 1})
    told = announced(METHODS, first=First, second=preset, gone=None, odd=dict, mcs=First)
    assert find_method("FIRST").build("mnist5k", 1, skip="2") == First(2)
    assert METHODS.build("first", "mnist5k", 1, skip=2) == First(2)
    assert METHODS.build("second", "mnist5k", 1) == First(1) and str(methods()["second"]).endswith("nobody 1999.")
    assert str(methods()["first"]) == f"The first of each class. From the package {__name__}."
    assert METHODS["first"]("mnist5k", 1).compress(ten, ipc=1, device="cpu").indices.tolist() == list(range(10))
    assert "the method 'gone' of 'mine:thing' cannot be loaded (ImportError: no module named 'mine')" in told[0]
    assert "a method is a Compressor or a Method, got <class 'dict'>" in told[1] and "the name is taken" in told[2]
    assert find_method("mcs").name == "minimal_coreset" and "gone" not in methods() and "odd" not in methods()


def test_models_of_other_packages(announced, ten):
    class Linear(torch.nn.Module):
        def __init__(self, channels, classes, size, bias=True):
            super().__init__()
            self.layer = torch.nn.Linear(channels * size * size, classes, bias)

        def forward(self, x): return self.layer(x.flatten(1))
    told, = announced(MODELS, linear=Linear, gone=None)
    assert Net("linear", dict(bias=False))(ten, 1)(ten.images()).shape == (20, 10)
    with pytest.raises(BadArgument, match="model 'linear' cannot take these settings"): build("linear", ten, width=3)
    assert "the model 'gone' of 'mine:thing' cannot be loaded" in told and "gone" not in MODELS


def test_data_sets_of_other_packages(announced, ten):
    def some(split):
        "Twenty stripes."
        return ten

    told, = announced(DATASETS, stripes=some, none=lambda split: None, gone=None)
    data = load("stripes", "test")
    assert (data.name, data.split, data.fingerprint) == ("stripes", "test", ten.fingerprint)
    assert str(DATASETS["stripes"]) == "Twenty stripes." and build("mlp", data).classes == ten.classes
    with pytest.raises(BadArgument, match="data set 'none' must be an ImageSet, got a NoneType"): load("none")
    with pytest.raises(BadArgument, match="size is for image folders; stripes has its"): load("stripes", size=8)
    assert "the data set 'gone' of 'mine:thing' cannot be loaded" in told
    with pytest.raises(UnknownName, match="unknown data set 'gone'"): load("gone")


def test_a_published_set_of_anothers_data_set_asks_for_its_classes(announced, tmp_path, ten):
    announced(DATASETS, stripes=lambda split: ten, gone=None)
    torch.save([ten.images(), ten.y], tmp_path / "s.pt")
    with pytest.raises(BadArgument, match=r"are known when it is read: give data=load\('stripes'\)"):
        load_published(tmp_path / "s.pt", "stripes")
    assert load_published(tmp_path / "s.pt", load("stripes")).name == "stripes"
