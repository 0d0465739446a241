"""Other people's files: every layout written here by hand, hostile and broken ones refused, weights judged by the
logits of nets stated again here."""
import json
import os
import subprocess
import warnings
from functools import partial
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from rdd_lib.compressed import Compressed, save
from rdd_lib.core import BadArgument, BrokenFile, MissingData, UnknownName, Unwritable, generator_of
from rdd_lib.models import seeded
from rdd_lib.data import CIFAR10, DATASETS, ImageSet
from rdd_lib.models import STATS, Normalized, build
from rdd_lib.networks import ResNet18
from rdd_lib.exports import PUBLISHED_STATS, export, load_weights, published_stats, stats_of
from rdd_lib.published import load_compressed, load_published
from rdd_lib.files import read_torch
from rdd_lib.whitening import whitening

MEAN = torch.tensor([.4914, .4822, .4465]).view(3, 1, 1)
STD = torch.tensor([.2023, .1994, .2010]).view(3, 1, 1)


def photos(n=20, channels=3, size=32, seed=0):
    "Smooth images over the whole range of pixels, two of each class."
    g = generator_of(seed, "photos")
    x = nn.functional.interpolate(torch.rand(n, channels, 4, 4, generator=g), size, mode="bilinear")
    low, high = x.amin((1, 2, 3), keepdim=True), x.amax((1, 2, 3), keepdim=True)
    x = (x - low) / (high - low)
    return x, torch.arange(n) % 10


def z(x): return (x - MEAN) / STD


@pytest.fixture
def xy(): return photos()


@pytest.fixture(autouse=True)
def quiet(recwarn):
    "No test here warns unless it says so."
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def written(path, o):
    torch.save(o, path)
    return path


# --- layouts ----------------------------------------------------------------------------------------------------------

def dc(path, *sets):
    accuracies = {"ConvNet": [np.float64(.25), np.float64(.75)]}
    return written(path, {"data": [[x, y] for x, y in sets], "accs_all_exps": accuracies})


def near(S, x, eps=1.2e-7): return bool((S.x - x).abs().max() < eps)


def test_dc_dsa_dm(tmp_path, xy):
    x, y = xy
    path = dc(tmp_path / "res_DSA_CIFAR10_ConvNet_2ipc.pt", (z(x), y), (z(x.flip(3)).requires_grad_(), y))
    for which, wanted in enumerate((x, x.flip(3))):
        S = load_compressed(path, data="cifar10", which=which)
        assert S.x.dtype == torch.float32 and not S.x.requires_grad and near(S, wanted)
        assert torch.equal(S.y, y) and S.classes == CIFAR10 and S.name == "cifar10"
        assert S.soft_labels is None and S.ipc == 2
        p = S.provenance
        assert p["pixels"]["stats"] == "dc" and p["pixels"]["std"] == [.2023, .1994, .2010]
        assert p["pixels"]["clipped"] == 0 and p["reported"] == {"ConvNet": {"runs": 2, "mean": .5}}
        assert p["which"] == which and p["sets"] == 2 and str(tmp_path) not in json.dumps(p)
    assert load_compressed(save(S, tmp_path / "s.safetensors")).provenance == S.provenance
    for bad in (2, -1, "0"):
        with pytest.raises(BadArgument, match="which must be in 0 ... 1"): load_compressed(path, "cifar10", which=bad)


def test_a_list_of_pairs_and_a_single_pair_under_data(tmp_path, xy):
    x, y = xy
    torch.save([[z(x), y], (z(x), y)], tmp_path / "a.pt")
    torch.save({"data": (z(x), y)}, tmp_path / "b.pth")
    for name in ("a.pt", "b.pth"): assert near(load_compressed(tmp_path / name, "cifar10"), x)


@pytest.mark.parametrize("legacy", [False, True])
def test_files_of_old_torch_and_numpy(tmp_path, xy, legacy, monkeypatch):
    x, y = xy
    path = tmp_path / "old.pt"
    accuracies = {"ConvNet": [np.float64(.5), np.float32(.25)], "a": np.arange(3.), "b": np.array([1, 2], "i2")}
    torch.save({"data": [[z(x), y]], "accs_all_exps": accuracies}, path, _use_new_zipfile_serialization=not legacy)
    raw = path.read_bytes()
    assert b"numpy._core.multiarray" in raw
    if legacy: path.write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))  # NumPy 1's name
    assert load_compressed(path, "cifar10").provenance["reported"]["ConvNet"]["runs"] == 2


@pytest.mark.parametrize("name", ["images_best.pt", "images_5000.pt", "images.pt"])
def test_mtt(tmp_path, xy, name):
    x, y = xy
    torch.save(z(x), tmp_path / name)
    torch.save(y, tmp_path / name.replace("images", "labels"))
    torch.save(torch.tensor(.0312), tmp_path / "lr.pt")
    for path in (tmp_path, tmp_path / name):
        S = load_compressed(path, data="cifar10")
        assert near(S, x) and torch.equal(S.y, y)
        assert S.schedule == {"lr": .0312} and S.provenance["pixels"]["stats"] == "mtt"


def test_mtt_without_labels_or_with_several_sets(tmp_path, xy):
    torch.save(z(xy[0]), tmp_path / "images_1.pt")
    with pytest.raises(MissingData, match="labels_1.pt"): load_compressed(tmp_path, "cifar10")
    torch.save(z(xy[0]), tmp_path / "images_2.pt")
    with pytest.raises(BadArgument, match="images_1.pt, images_2.pt"): load_compressed(tmp_path, "cifar10")
    torch.save(z(xy[0]), tmp_path / "x.pt")
    with pytest.raises(BadArgument, match="its name must say images"): load_compressed(tmp_path / "x.pt", "cifar10")


def test_learned_soft_labels(tmp_path, xy):
    x, y = xy
    logits = 3 * torch.randn(20, 10, generator=generator_of(1))
    torch.save(z(x), tmp_path / "images_best.pt")
    torch.save(logits, tmp_path / "labels_best.pt")
    S = load_compressed(tmp_path, "cifar10", temperature=2.)
    assert torch.allclose(S.soft_labels, (logits / 2).softmax(1)) and torch.equal(S.y, logits.argmax(1))
    torch.save(logits.softmax(1), tmp_path / "labels_best.pt")
    assert torch.equal(load_compressed(tmp_path, "cifar10").soft_labels, logits.softmax(1))
    S = load_compressed(tmp_path, "cifar10", soft="logits")
    assert torch.allclose(S.soft_labels, logits.softmax(1).softmax(1))
    S = load_compressed(tmp_path, "cifar10", soft=False)
    assert S.soft_labels is None and torch.equal(S.y, logits.argmax(1))
    torch.save(logits, tmp_path / "labels_best.pt")
    with pytest.raises(BadArgument, match="soft='probabilities', but"):
        load_compressed(tmp_path, "cifar10", soft="probabilities")


def test_pairs_and_named_tensors(tmp_path, xy):
    x, y = xy
    torch.save((x, y), tmp_path / "idc.pt")
    torch.save({"images": (x * 255).round().to(torch.uint8), "labels": y.view(-1, 1).float()}, tmp_path / "bytes.pt")
    torch.save([z(x), y], tmp_path / "unknown.pt")
    S = load_compressed(tmp_path / "idc.pt", "cifar10")
    assert torch.equal(S.x, x) and S.provenance["pixels"]["stats"] == "pixels"
    S = load_compressed(tmp_path / "bytes.pt", "cifar10")
    assert S.x.dtype == torch.uint8 and torch.equal(S.y, y)
    with pytest.raises(BadArgument, match="does not say how its pixels"):
        load_compressed(tmp_path / "unknown.pt", "cifar10")
    for stats in ("dc", ".4914,.4822,.4465/.2023,.1994,.2010", (MEAN.flatten(), STD.flatten()),
                  ((.4914, .4822, .4465), [.2023, .1994, .2010])):
        assert near(load_compressed(tmp_path / "unknown.pt", "cifar10", stats=stats), x)


def folder(root, x, y, name, suffix):
    seen = {}
    for image, c in zip((x * 255).round().to(torch.uint8), y.tolist()):
        file = root / name(c, seen.get(c, 0))
        seen[c] = seen.get(c, 0) + 1
        file.parent.mkdir(parents=True, exist_ok=True)
        image = image.permute(1, 2, 0).numpy()
        if image.shape[2] == 1: image = image[:, :, 0]
        Image.fromarray(image).save(file.with_suffix(suffix), quality=95)              # of no meaning for PNG
    return root


NAMES = {"sre2l": lambda c, i: f"new{c:03}/class{c:03}_id{i:03}.x",
         "rded": lambda c, i: f"{c:05}/class{c:05}_id{i:05}.x",
         "wordnet": lambda c, i: f"n0{c}/{i}.x", "names": lambda c, i: f"{CIFAR10[c]}/{i}.x"}


@pytest.mark.parametrize("layout", NAMES)
def test_image_folders(tmp_path, xy, layout):
    x, y = xy
    folder(tmp_path / "s", x, y, NAMES[layout], ".png")
    order = torch.argsort(y, stable=True)
    S = load_compressed(tmp_path / "s", data="cifar10")
    assert S.x.dtype == torch.uint8 and torch.equal(S.y, y[order])
    assert torch.equal(S.x, (x[order] * 255).round().to(torch.uint8))
    logits = torch.randn(20, 10, generator=generator_of(2))
    torch.save(logits, tmp_path / "s" / "soft_labels.pt")
    np.save(tmp_path / "elsewhere.npy", logits.numpy())
    for soft in (None, tmp_path / "elsewhere.npy", logits):
        S = load_compressed(tmp_path / "s", "cifar10", soft=soft, temperature=20.)
        assert torch.allclose(S.soft_labels, (logits / 20).softmax(1))
    assert load_compressed(tmp_path / "s", "cifar10", soft=False).soft_labels is None


def test_jpeg_folders_and_grey_ones(tmp_path):
    x, y = photos(10, 1, 28)
    S = load_compressed(folder(tmp_path / "j", x, y, NAMES["sre2l"], ".jpg"), "mnist")
    assert S.shape == (1, 28, 28) and (S.images() - x).abs().max() < .05


def test_folders_that_do_not_fit(tmp_path, xy):
    x, y = xy

    def refused(name, told, error=BadArgument):
        with pytest.raises(error, match=told): load_compressed(tmp_path / name, "cifar10")
    folder(tmp_path / "some", x[:6], y[:6], NAMES["wordnet"], ".png")
    refused("some", "has 6 class folders")
    folder(tmp_path / "far", x[:1], torch.tensor([12]), NAMES["sre2l"], ".png")
    refused("far", "labels in 12 ... 12, but its data set has 10 classes")
    assert load_compressed(tmp_path / "far", "cifar100").y.item() == 12
    folder(tmp_path / "sizes", x, y, NAMES["sre2l"], ".png")
    folder(tmp_path / "sizes", x[:1, :, :16, :16], torch.tensor([9]), lambda c, i: f"new{c:03}/zzz.x", ".png")
    refused("sizes", "must have one size")
    (tmp_path / "empty").mkdir()
    refused("empty", "neither images", BrokenFile)
    folder(tmp_path / "text", x, y, NAMES["sre2l"], ".png")
    (tmp_path / "text/new000/class000_id001.png").write_text("no picture")
    refused("text", "class000_id001.png", BrokenFile)


def test_labels_of_augmented_views_are_refused(tmp_path, xy):
    folder(tmp_path / "s", *xy, NAMES["sre2l"], ".png")
    (tmp_path / "FKD/epoch_0").mkdir(parents=True)
    batch = tmp_path / "FKD/epoch_0/batch_0.tar"
    coordinates, flips, mixed_with = torch.rand(4, 4), torch.zeros(4), torch.randperm(4)
    torch.save([coordinates, flips, mixed_with, .3, [np.int64(1), 2, 3, 4], torch.rand(4, 10).half()], batch)
    with pytest.raises(BadArgument, match="belong to no image"):
        load_compressed(tmp_path / "s", "cifar10", soft=tmp_path / "FKD")
    with pytest.raises(BrokenFile, match="one tensor"): load_compressed(tmp_path / "s", "cifar10", soft=batch)


# --- what is refused --------------------------------------------------------------------------------------------------

class Calls:
    "A pickle that calls `f(*args)` when it is opened."
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("where", ["all of it", "accuracies", "label", "in an array"])
@pytest.mark.parametrize("call", ["system", "eval", "popen", "unlink"])
def test_hostile_files_run_nothing(tmp_path, xy, where, call, legacy):
    mark, victim = tmp_path / "mark", tmp_path / "victim"
    victim.write_text("still here")
    trap = {"system": Calls(os.system, f"touch {mark}"), "eval": Calls(eval, f"open({str(mark)!r}, 'w')"),
            "popen": Calls(subprocess.Popen, ["touch", str(mark)]), "unlink": Calls(os.unlink, str(victim))}[call]
    sets = [[z(xy[0]), xy[1]]]
    o = {"all of it": trap, "accuracies": {"data": sets, "accs_all_exps": {"a": [trap]}},
         "label": {"data": [[z(xy[0]), trap]]},
         "in an array": {"data": sets, "accs_all_exps": {"a": np.array([trap, 1], dtype=object)}}}[where]
    path = tmp_path / "trap.pt"
    torch.save(o, path, _use_new_zipfile_serialization=not legacy)
    for opened in (lambda: load_compressed(path, "cifar10"), lambda: load_weights(nn.Linear(1, 1), path),
                   lambda: load_compressed(path, "cifar10", soft=path)):
        with pytest.raises(BrokenFile, match="is refused|cannot be read"): opened()
    assert not mark.exists() and victim.exists()


def test_a_pickled_network_is_refused_by_name(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "net.pt")
    with pytest.raises(BrokenFile, match=r"torch\.nn\.modules\.linear\.Linear would have to be called"):
        read_torch(tmp_path / "net.pt")


def test_nothing_stays_allowed(tmp_path):
    before = set(torch.serialization.get_safe_globals())
    torch.save(np.float64(1), tmp_path / "n.pt")
    assert read_torch(tmp_path / "n.pt") == 1 and set(torch.serialization.get_safe_globals()) == before


def test_broken_files(tmp_path, xy):
    whole = dc(tmp_path / "whole.pt", (z(xy[0]), xy[1])).read_bytes()
    half = tmp_path / "half.pt"
    for part in (b"", b"garbage", whole[:40], whole[:len(whole) // 2], whole[:-30], b"PK\x03\x04" + bytes(60)):
        half.write_bytes(part)
        with pytest.raises(BrokenFile, match="half.pt"): load_compressed(half, "cifar10")
        with pytest.raises(BrokenFile, match="half.pt"): load_weights(nn.Linear(1, 1), half)
    gone = tmp_path / "gone.pt"
    for opened in (lambda: load_compressed(gone, "cifar10"), lambda: load_weights(nn.Linear(1, 1), gone),
                   lambda: load_compressed(tmp_path / "whole.pt", "cifar10", soft=gone)):
        with pytest.raises(MissingData, match="no such file"): opened()


@pytest.mark.parametrize("o", [torch.zeros(3), {"weights": torch.zeros(3)}, [1, 2], "text", {"data": []},
                               {"data": [[1, 2]]}, [torch.zeros(2, 3), torch.zeros(2)], 3.])
def test_other_contents(tmp_path, o):
    torch.save(o, tmp_path / "o.pt")
    with pytest.raises(BrokenFile, match="in no layout that is known here"):
        load_compressed(tmp_path / "o.pt", "cifar10")


def refused(error, told, *given, **more):
    with pytest.raises(error, match=told): load_compressed(*given, **more)


def test_what_does_not_fit(tmp_path, xy):
    x, y = xy
    path = dc(tmp_path / "a.pt", (z(x), y))
    refused(BadArgument, "give data=", path)
    refused(UnknownName, "did you mean 'cifar10'", path, "cifar01")
    refused(BadArgument, "has images of 3x32x32, mnist of 1x28x28", path, "mnist")
    refused(UnknownName, "code base 'dcc'", path, "cifar10", stats="dcc")
    for labels, error, told in (
            (y + 1, BadArgument, "labels in 1 ... 10, but its data set has 10"), (y - 1, BadArgument, "labels in -1"),
            (y[:-1], BrokenFile, "20 images and labels"), (y + .5, BrokenFile, "no whole numbers"),
            (torch.rand(20, 7), BadArgument, r"shape \(20, 10\)"), (torch.tensor(1), BrokenFile, "20 images"),
            ("cat", BrokenFile, "labels"), (torch.full((20, 10), torch.nan), BrokenFile, "NaN")):
        refused(error, told, dc(tmp_path / "b.pt", (z(x), labels)), "cifar10")
    assert load_compressed(path, "cifar100").n_classes == 100              # nothing in the file contradicts
    bad = z(x)
    bad[0, 0, 0, 0] = torch.nan
    refused(BrokenFile, "NaN", dc(tmp_path / "c.pt", (bad, y)), "cifar10")
    refused(BrokenFile, "0 images", dc(tmp_path / "d.pt", (x[:0], y[:0])), "cifar10")
    ours = save(load_compressed(path, "cifar10"), tmp_path / "s.safetensors")
    refused(BadArgument, "are for published", ours, "cifar10")
    refused(BadArgument, "are for published", ours, stats="dc")


# --- pixels -----------------------------------------------------------------------------------------------------------

def test_wrong_statistics_are_told(tmp_path, xy):
    x, y = xy
    path = dc(tmp_path / "a.pt", (z(x), y))
    with pytest.warns(UserWarning, match="more than .1 outside"): S = load_compressed(path, "cifar10", stats="pixels")
    assert S.provenance["pixels"]["clipped"] > .3 and S.provenance["pixels"]["furthest"] > 1
    with pytest.warns(UserWarning, match="more than .1 outside"): load_compressed(path, "cifar10", stats=((.5,), (.9,)))
    never = dc(tmp_path / "b.pt", (x, y))
    with pytest.warns(UserWarning, match="normalised ones have about 1"): load_compressed(never, "cifar10")


def test_clipping_is_counted(tmp_path, xy):
    x, y = xy
    x = .4 + x * .2
    x[:, 0, 0, :8] = 1.25                               # 8 of 3072 values
    path = dc(tmp_path / "a.pt", (z(x), y))
    with pytest.warns(UserWarning): S = load_compressed(path, "cifar10")       # and the contrast is low
    p = S.provenance["pixels"]
    assert abs(p["clipped"] - 8 / 3072) < 1e-9 and abs(p["furthest"] - .25) < 1e-6 and S.x.max() == 1


def test_the_table_of_constants():
    for code, table in PUBLISHED_STATS.items():
        for name, stats in table.items():
            channels = 1 if "mnist" in name else 3
            assert name in DATASETS and published_stats(code, name) == stats
            assert [t.numel() for t in stats_of(code, name, channels)] == [channels] * 2
    assert published_stats("rdd_lib", "cifar10") == STATS["cifar10"] != published_stats("dc", "cifar10")
    now, early, mtt = (published_stats(code, "cifar100") for code in ("dc", "dc_early", "mtt"))
    assert now != early == mtt == published_stats("dc", "cifar10")
    for bad in ("1/2/3", "a/b", (1, 2, 3), ((.1, .2), (.1, .2)), ((.1,), (0.,)), ((float("nan"),), (1.,)), 3):
        with pytest.raises(BadArgument): stats_of(bad, "cifar10", 3)


def test_whitening_is_that_of_the_code_base(tmp_path):
    x, y = photos(60, 3, 8)
    data = ImageSet(x, y, CIFAR10, "little")
    flat = x.flatten(1).double()                        # the formula again, by singular values
    centred = flat - flat.mean(0)
    u, s, _ = torch.linalg.svd(centred.T @ centred / 59)
    theirs = (centred @ (u @ torch.diag(1 / torch.sqrt(s + .1)) @ u.T)).view_as(x).float()
    (tmp_path / "cifar10_zca_50").mkdir()
    path = tmp_path / "cifar10_zca_50/images_best.pt"
    torch.save(theirs, path)
    torch.save(y, path.with_name("labels_best.pt"))
    refused(BadArgument, "the training set of 'little' is not known", path, data)
    zca = whitening(data)
    assert torch.allclose(zca(x), theirs, atol=1e-6)
    for S in (load_compressed(path, data), load_compressed(path, data, zca=zca)):
        assert (S.x - x).abs().max() < 1e-5 and S.provenance["pixels"]["zca"] is True
    undone = path.with_name("images_zca_9.pt")                   # MTT's images that are whitened no more
    torch.save(x, undone)
    torch.save(y, path.with_name("labels_9.pt"))
    assert torch.equal(load_compressed(undone, data).x, x)
    larger, labels = photos()
    with pytest.raises(BadArgument, match="zca whitens images of 192 values"):
        load_published(dc(tmp_path / "a.pt", (z(larger), labels)), "cifar10", zca=zca)
    torch.save(z(x), path)
    assert near(load_compressed(path, data, stats=(MEAN.flatten(), STD.flatten()), zca=False), x)


# --- export -----------------------------------------------------------------------------------------------------------

def sets():
    x, y = photos(12)
    rich = dict(weights=torch.rand(12, generator=generator_of(1)) + 1e-3, indices=torch.arange(12) * 7,
                soft_labels=torch.randn(12, 10, generator=generator_of(2)).softmax(1), radius=3.25, lower_bound=3.,
                schedule={"lr": .01}, provenance={"method": {"is": "M"}, "seed": 3})
    b = (x * 255).round().to(torch.uint8)
    return {"bytes": Compressed(b, y, CIFAR10, "cifar10", **rich, certificate={"rows": torch.tensor([1, 2])}),
            "floats": Compressed(x, y, CIFAR10, "cifar10", **rich), "plain": Compressed(x, y, CIFAR10, "cifar10"),
            "own": Compressed(x, y, CIFAR10, "mine", split="test"),
            "double": Compressed(b, y, CIFAR10, "cifar10", weights=torch.rand(12, dtype=torch.float64)),
            "grey": Compressed(b[:, :1], y, CIFAR10, "mnist")}


FIELDS = ("y", "weights", "indices", "soft_labels")


def assert_same(a, b, eps):
    assert a.x.dtype == b.x.dtype and (a.x.double() - b.x.double()).abs().max() <= eps
    for f in FIELDS:
        s, t = getattr(a, f), getattr(b, f)
        assert (s is None) == (t is None) and (s is None or s.dtype == t.dtype and torch.equal(s, t)), f
    for f in ("name", "split", "classes", "radius", "lower_bound", "schedule", "provenance"):
        assert getattr(a, f) == getattr(b, f), f


@pytest.mark.parametrize("normalise", [True, False, "dc", "rdd_lib", ((.5,), (.25,))], ids=str)
@pytest.mark.parametrize("name", sets())
def test_pt_round_trip(tmp_path, name, normalise):
    if name == "own" and isinstance(normalise, str): pytest.skip("no code base knows it")
    S = sets()[name]
    path = export(S, "pt", tmp_path / "a" / "s.pt", normalise=normalise)
    assert_same(load_compressed(path), S, 0 if S.x.dtype == torch.uint8 or normalise is False else 1.2e-7)
    if S.certificate: assert torch.equal(load_compressed(path).certificate["rows"], S.certificate["rows"])
    assert load_compressed(path, S.name).name == S.name
    with pytest.raises(BadArgument, match="data must be"): load_compressed(path, "svhn")
    assert export(S, "pt", tmp_path / "again.pt", normalise).read_bytes() == path.read_bytes()
    x, y = torch.load(path, weights_only=True)["data"][0]            # as another code base reads it
    if S.name != "mine":
        stats = {True: "dc", False: "pixels"}.get(normalise, normalise)
        mean, std = stats_of(stats, S.name, S.shape[0])
        assert (x - (S.images().double() - mean) / std).abs().max() < 1e-6
    assert x.dtype == torch.float32 and torch.equal(y, S.y)


def test_pt_export_reads_as_dc_without_our_key(tmp_path):
    S = sets()["floats"]
    o = torch.load(export(S, "pt", tmp_path / "s.pt"), weights_only=True)
    o.pop("rdd_lib")
    torch.save(o, tmp_path / "stripped.pt")
    assert (load_compressed(tmp_path / "stripped.pt", "cifar10").x - S.x).abs().max() <= 1.2e-7


@pytest.mark.parametrize("name", sets())
def test_folder_round_trip(tmp_path, name):
    S = sets()[name]
    path = export(S, "folder", tmp_path / "a" / "s")
    assert_same(load_compressed(path), S, 0 if S.x.dtype == torch.uint8 else .5 / 255 + 1e-7)
    assert len(list(path.rglob("*.png"))) == len(S) and (path / "new003/class003_id000.png").is_file()
    assert sorted(p.name for p in path.parent.iterdir()) == ["s"]
    with pytest.raises(BadArgument, match="data must be"): load_compressed(path, "svhn")
    (path / "compressed.json").unlink()
    (path / "labels.csv").unlink()
    if S.name != "mnist":                                            # then it is a folder of SRe2L's
        T = load_compressed(path, S)
        assert sorted(T.y.tolist()) == sorted(S.y.tolist()) and T.x.dtype == torch.uint8


def test_exports_are_whole_or_absent(tmp_path, monkeypatch):
    S = sets()["floats"]
    (tmp_path / "file").write_text("x")
    for kind in ("pt", "folder"):
        with pytest.raises(Unwritable): export(S, kind, tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(Unwritable, match="not replaced"): export(S, "folder", tmp_path / "full")
    assert (tmp_path / "full/mine.txt").read_text() == "mine"
    count = []

    def stops(self, *a, _save=Image.Image.save, **k):
        count.append(1)
        if len(count) == 5: raise KeyboardInterrupt
        return _save(self, *a, **k)
    monkeypatch.setattr(Image.Image, "save", stops)
    with pytest.raises(KeyboardInterrupt): export(S, "folder", tmp_path / "s")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "full"]
    with pytest.raises(UnknownName): export(S, "npz", tmp_path / "s")
    with pytest.raises(BadArgument, match="normalise is for tensors"):
        export(S, "folder", tmp_path / "s", normalise="dc")


def test_damaged_exports(tmp_path):
    S = sets()["floats"]
    o = torch.load(export(S, "pt", tmp_path / "s.pt"), weights_only=True)
    for damage in ({"header": "{}"}, {"header": "no json"}, {"weights": torch.ones(3)}, {"surprise": torch.ones(3)}):
        torch.save(o | {"rdd_lib": o["rdd_lib"] | damage}, tmp_path / "d.pt")
        with pytest.raises(BrokenFile, match="not a whole exported set"): load_compressed(tmp_path / "d.pt")
    root = export(S, "folder", tmp_path / "f")
    table = (root / "labels.csv").read_text()
    for damaged in (table.replace("new000/", "../new000/"), table.replace("label", "l"), table[:len(table) // 2],
                    table.replace("new000/class000_id000.png", "/etc/hostname")):
        (root / "labels.csv").write_text(damaged)
        with pytest.raises(BrokenFile): load_compressed(root)
    (root / "labels.csv").write_text(table)
    next(root.rglob("*.png")).unlink()
    with pytest.raises(BrokenFile): load_compressed(root)


# --- weights: the field's networks stated again -----------------------------------------------------------------------

class TheirConvNet(nn.Module):
    "DC's and MTT's ConvNet: conv, norm unless 'none', ReLU, average pooling, all in `features`."
    def __init__(self, channels, side, norm, width=8, depth=3, classes=10):
        super().__init__()
        norms = {"batch": nn.BatchNorm2d, "instance": instance, "group": lambda c: nn.GroupNorm(4, c)}
        layers, side = [], 32 if side == 28 else side
        for d in range(depth):
            padding = 3 if channels == 1 and d == 0 else 1
            layers.append(nn.Conv2d(width if d else channels, width, 3, padding=padding))
            if norm != "none": layers.append(norms[norm](width))
            layers += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features, self.classifier = nn.Sequential(*layers), nn.Linear(width * (side >> depth) ** 2, classes)

    def forward(self, x): return self.classifier(self.features(x).flatten(1))


class TheirIDC(nn.Module):
    "IDC's: the same layers in a dict of lists."
    def __init__(self, width=8):
        super().__init__()
        convs = nn.ModuleList(nn.Conv2d(width if d else 3, width, 3, padding=1) for d in range(3))
        norms = nn.ModuleList(nn.GroupNorm(width, width) for _ in range(3))
        self.layers = nn.ModuleDict({"conv": convs, "norm": norms})
        self.classifier = nn.Linear(width * 16, 10)

    def forward(self, x):
        for conv, norm in zip(self.layers["conv"], self.layers["norm"]):
            x = nn.functional.avg_pool2d(norm(conv(x)).relu(), 2)
        return self.classifier(x.flatten(1))


class TheirBlock(nn.Module):
    def __init__(self, a, b, stride, norm):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(a, b, 3, stride, 1, bias=False), norm(b)
        self.conv2, self.bn2 = nn.Conv2d(b, b, 3, 1, 1, bias=False), norm(b)
        self.shortcut = nn.Sequential()
        if stride != 1 or a != b: self.shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride, bias=False), norm(b))

    def forward(self, x):
        inner = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(inner)) + self.shortcut(x)).relu()


class TheirResNet(nn.Module):
    "DC's ResNet-18 (after kuangliu): `shortcut`, a 3x3 stem, a last layer called `classifier` or `linear` (his)."
    def __init__(self, norm, last="classifier", channels=3):
        super().__init__()
        self.last = last
        self.conv1, self.bn1 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False), norm(64)
        for n, (a, b) in enumerate(((64, 64), (64, 128), (128, 256), (256, 512)), 1):
            first = TheirBlock(a, b, 1 if n == 1 else 2, norm)
            setattr(self, f"layer{n}", nn.Sequential(first, TheirBlock(b, b, 1, norm)))
        setattr(self, last, nn.Linear(512, 10))

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        for n in range(1, 5): x = getattr(self, f"layer{n}")(x)
        return getattr(self, self.last)(nn.functional.avg_pool2d(x, 4).flatten(1))


class TheirMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc_1, self.fc_2, self.fc_3 = nn.Linear(784, 128), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x): return self.fc_3(self.fc_2(self.fc_1(x.flatten(1)).relu()).relu())


class TheirLeNet(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(channels, 6, 5, padding=2 if channels == 1 else 0), nn.ReLU(),
                                      nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2))
        self.fc_1, self.fc_2, self.fc_3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x): return self.fc_3(self.fc_2(self.fc_1(self.features(x).flatten(1)).relu()).relu())


def lived_in(make):
    "A network of theirs with random running statistics and norms, as after training."
    with seeded(1):
        net = make()
        for m in net.modules():
            if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
                m.weight.data.uniform_(.5, 1.5)
                m.bias.data.normal_(0, .1)
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, .2)
                m.running_var.uniform_(.5, 2)
    return net.eval()


def data(channels, side):
    x, y = photos(10, channels, side)
    return ImageSet(x, y, CIFAR10, "mnist" if channels == 1 else "cifar10")


def instance(c): return nn.GroupNorm(c, c)


def torchvision_resnet():
    from torchvision.models import resnet18
    return resnet18(num_classes=10)


# name: (theirs, ours, settings of ours, channels, side)
NETS = {f"convnet {norm} {c}x{s}": (partial(TheirConvNet, c, s, norm), "convnet", dict(width=8, norm=norm), c, s)
        for norm in ("instance", "batch", "group", "none") for c, s in ((1, 28), (3, 32))}
deep = dict(width=8, depth=4)
NETS |= {"convnet depth 4": (partial(TheirConvNet, 3, 64, "instance", depth=4), "convnet", deep, 3, 64),
         "idc": (TheirIDC, "convnet", dict(width=8), 3, 32), "mlp": (TheirMLP, "mlp", {}, 1, 28),
         "lenet 1": (partial(TheirLeNet, 1), "lenet", {}, 1, 28),
         "lenet 3": (partial(TheirLeNet, 3), "lenet", {}, 3, 32),
         "resnet batch": (partial(TheirResNet, nn.BatchNorm2d), "resnet18", dict(stem="cifar"), 3, 32),
         "resnet kuangliu": (partial(TheirResNet, nn.BatchNorm2d, "linear"), "resnet18", dict(stem="cifar"), 3, 32),
         "resnet torchvision": (torchvision_resnet, "resnet18", {}, 3, 32)}


def before(prefix, state): return {f"{prefix}{k}": v for k, v in state.items()}


WAYS = {"bare": lambda s: s, "module": lambda s: before("module.", s), "model": lambda s: {"model": s},
        "state_dict": lambda s: {"state_dict": before("module.", s), "epoch": 3, "acc": np.float64(.5)},
        "net": lambda s: {"net": before("module.", s), "acc": 90.},
        "twice": lambda s: {"model_state_dict": before("module._orig_mod.", s)}}


@pytest.mark.parametrize("name", NETS)
def test_logits_of_the_fields_networks(tmp_path, name):
    make, ours, settings, channels, side = NETS[name]
    net, d = lived_in(make), data(channels, side)
    code = "mnist" if channels == 1 else "cifar10"
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in published_stats("dc", code))
    x = d.images()
    wanted = net((x - mean) / std).detach()
    assert wanted.std() > 1e-3
    ways = WAYS if "instance 3" in name or name == "resnet batch" else {k: WAYS[k] for k in ("bare", "state_dict")}
    for way, wrap in ways.items():
        torch.save(wrap(net.state_dict()), tmp_path / "w.pth")
        model = build(ours, d, 5, **settings)
        assert load_weights(model, tmp_path / "w.pth", published_stats("dc", code)) is model
        assert torch.allclose(model(x).detach(), wanted, atol=1e-5, rtol=1e-5), (name, way)
        bare = load_weights(build(ours, d, 6, **settings).model, tmp_path / "w.pth")
        assert torch.equal(bare((x - model.mean) / model.std), model(x))
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, tmp_path / "w.safetensors")
    model = load_weights(build(ours, d, 7, **settings), tmp_path / "w.safetensors", published_stats("dc", code))
    assert torch.allclose(model(x).detach(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif("norm" not in ResNet18.__init__.__annotations__, reason="ResNet18 has no instance norm yet")
def test_dc_resnet_with_instance_norm(tmp_path):
    net, d = lived_in(lambda: TheirResNet(instance)), data(3, 32)
    torch.save(net.state_dict(), tmp_path / "w.pth")
    ours = build("resnet18", d, stem="cifar", norm="instance")
    model = load_weights(ours, tmp_path / "w.pth", published_stats("dc", "cifar10"))
    assert torch.allclose(model(d.images()), net(z(d.images())), atol=1e-5)


def test_half_precision_and_ours(tmp_path):
    d = data(3, 32)
    model = build("convnet", d, 3, width=8)
    torch.save({k: v.half() for k, v in model.model.state_dict().items()}, tmp_path / "half.pt")
    def read(name, **stats): return load_weights(build("convnet", d, 4, width=8), tmp_path / name, **stats)
    assert (read("half.pt")(d.images()) - model(d.images())).abs().max() < 1e-2
    model.mean.fill_(.25)
    torch.save(model.state_dict(), tmp_path / "ours.pt")               # with its own mean and std, which come along
    other = read("ours.pt")
    assert torch.equal(other(d.images()), model(d.images())) and torch.equal(other.mean, model.mean)
    other = read("ours.pt", stats=((.5,), (.5,)))
    assert other.mean.flatten().tolist() == [.5] * 3
    parallel = nn.DataParallel(model).state_dict()              # as ours come out of wrappers, around and within
    compiled = {f"module._orig_mod.{k}": v for k, v in model.state_dict().items()}
    within = {k.replace("model.", "model.module.", 1): v for k, v in model.state_dict().items()}
    assert "module.mean" in parallel and "model.module.classifier.weight" in within
    for wrapped in (parallel, compiled, within, {"model": parallel}):
        torch.save(wrapped, tmp_path / "wrapped.pt")
        other = read("wrapped.pt")
        assert torch.equal(other(d.images()), model(d.images())) and torch.equal(other.mean, model.mean)


def test_files_that_could_be_read_for_ever(tmp_path):
    d, itself = data(3, 32), {}
    itself["model"] = itself
    for o, told in (({"mean": torch.zeros(3, 1, 1), "std": torch.ones(3, 1, 1)}, "is missing"),
                    ({"module.mean": torch.zeros(3, 1, 1)}, "is missing"), (itself, "holds no state dict"),
                    ({1: torch.ones(2)}, "holds no state dict")):
        torch.save(o, tmp_path / "o.pt")
        with pytest.raises((BadArgument, BrokenFile), match=told):
            load_weights(build("convnet", d, width=8), tmp_path / "o.pt")


def test_without_stats_the_models_own_stay(tmp_path):
    d = data(3, 32)
    torch.save(lived_in(lambda: TheirConvNet(3, 32, "instance")).state_dict(), tmp_path / "w.pt")
    model = load_weights(build("convnet", d, width=8), tmp_path / "w.pt")
    assert torch.allclose(model.std.flatten(), torch.tensor(STATS["cifar10"][1]))


def states():
    s = {k: v.clone() for k, v in lived_in(lambda: TheirConvNet(3, 32, "instance")).state_dict().items()}
    return {"features.4.weight is missing": {k: v for k, v in s.items() if k != "features.4.weight"},
            "extra.weight has no place": s | {"extra.weight": torch.ones(3)},
            r"classifier.weight is \(7, 128\), here \(10, 128\)": s | {"classifier.weight": torch.ones(7, 128)},
            "NaN": s | {"features.0.bias": torch.full((8,), torch.nan)}, "and .* more": before("x", s),
            "has no place": lived_in(lambda: TheirConvNet(3, 32, "batch")).state_dict(),
            "features.8.weight is missing": lived_in(lambda: TheirConvNet(3, 32, "none")).state_dict()}


@pytest.mark.parametrize("told", states())
def test_nothing_is_loaded_unless_all_fits(tmp_path, told):
    torch.save(states()[told], tmp_path / "w.pt")
    model = build("convnet", data(3, 32), width=8)
    untouched = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises((BadArgument, BrokenFile), match=told):
        load_weights(model, tmp_path / "w.pt", published_stats("dc", "cifar10"))
    assert all(torch.equal(v, untouched[k]) for k, v in model.state_dict().items())


def test_refusals_of_load_weights(tmp_path):
    d = data(3, 32)
    torch.save(lived_in(lambda: TheirResNet(instance)).state_dict(), tmp_path / "in.pt")
    with pytest.raises(BadArgument, match="its norm is not batch norm"):
        load_weights(build("resnet18", d, stem="cifar"), tmp_path / "in.pt")
    torch.save(lived_in(lambda: TheirResNet(nn.BatchNorm2d)).state_dict(), tmp_path / "cifar.pt")
    with pytest.raises(BadArgument, match=r"conv1.weight is \(64, 3, 3, 3\), here \(64, 3, 7, 7\)"):
        load_weights(build("resnet18", d), tmp_path / "cifar.pt")
    for o in ([[torch.ones(2)]], {"epoch": 3}, {"state_dict": {"a": 1}}, {}, torch.ones(3)):
        torch.save(o, tmp_path / "o.pt")
        with pytest.raises(BrokenFile, match="holds no state dict"):
            load_weights(build("convnet", d, width=8), tmp_path / "o.pt")
    torch.save(lived_in(lambda: TheirConvNet(3, 32, "instance")).state_dict(), tmp_path / "w.pt")
    model = build("convnet", d, width=8)
    for bad, told in (("dc", "knows several data sets: give data="), (((.1, .1), (.2, .2)), "each of 3 channels"),
                      (((.1,), (0.,)), "stds > 0")):
        with pytest.raises(BadArgument, match=told): load_weights(model, tmp_path / "w.pt", bad)
    with pytest.raises(BadArgument, match="a model that normalises"):
        load_weights(model.model, tmp_path / "w.pt", ((.1,), (.2,)))
    assert isinstance(model, Normalized)
    (tmp_path / "b.safetensors").write_bytes(b"12345678{")
    with pytest.raises(BrokenFile, match="b.safetensors"): load_weights(model, tmp_path / "b.safetensors")
