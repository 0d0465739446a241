"""A folder of one's own photographs, from the shell to a published row; and what may be odd about such folders."""
import json
import shutil
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from rdd_lib.core import BadArgument, BrokenFile, MissingData, UnknownName
from rdd_lib.data import data_set, load
from rdd_lib.own import examine
from rdd_lib.published import load_compressed


@pytest.fixture
def photos(tmp_path):
    "Thirty pictures of noise, of two classes that differ in colour and of different sizes."
    rng = np.random.default_rng(0)
    for kind, tint in (("cat", (200, 90, 20)), ("dog", (30, 80, 190))):
        for n in range(15):
            size = rng.integers(24, 40, 2)
            pixels = np.clip(np.array(tint) + rng.normal(0, 40, (*size, 3)), 0, 255).astype(np.uint8)
            path = tmp_path / "my_photos" / kind / f"{n}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "my_photos"


def test_from_photographs_to_a_checked_row(photos, rdd, tmp_path):
    done = rdd("data", "./my_photos", "--size", 16, "--picture", "p.png")
    assert "24 training and 6 test images (20% of each class, held out), colour" in done.stdout, done.stderr
    assert "no broken file, no image twice" in done.stdout and (tmp_path / "p.png").exists()
    done = rdd("compress", "mcs", "./my_photos", "--ipc", 2, "--size", 16, "-o", "s.safetensors")
    assert done.returncode == 0 and "certificate verified" in done.stdout, done.stderr
    made = load_compressed(tmp_path / "s.safetensors")
    assert (made.name, made.classes, made.shape) == ("my_photos", ("cat", "dog"), (3, 16, 16))
    assert rdd("show", "s.safetensors", "--verify", "--data", "./my_photos").returncode == 0
    words = "--net", "mlp", "--attack", "quick", "--n-test", 0, "--set", "steps=30", "--row", "s.json"
    done = rdd("score", "s.safetensors", "--data", "./my_photos", *words)
    assert done.returncode == 0 and "6 test images" in done.stdout, done.stderr
    assert "my_photos" not in json.loads((tmp_path / "s.json").read_text())["set"]["file"]
    assert rdd("rescore", "s.json", "--data", tmp_path / "my_photos").returncode == 0


def test_a_set_of_ones_own_asks_for_its_data(photos, rdd, tmp_path):
    rdd("compress", "random", "my_photos", "--ipc", 1, "--size", 16, "-o", "s.safetensors")
    done = rdd("score", "s.safetensors")
    assert done.returncode == 2 and "--data PATH" in done.stderr
    done = rdd("score", "s.safetensors", "--data", "./my_photos", "--split", ".4", "--net", "mlp")
    assert done.returncode == 2 and "was it held out with another --split?" in done.stderr, done.stderr
    (photos / "cat" / "0.jpg").unlink()
    done = rdd("score", "s.safetensors", "--data", "./my_photos", "--net", "mlp")
    assert done.returncode == 2 and "was made from other images" in done.stderr


def test_a_known_name_goes_before_a_folder_of_that_name(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, tmp_path / "mnist5k")
    assert len(load("mnist5k")) == 4000
    assert load("./mnist5k", size=8).name == "my_mnist5k"


def test_held_out_images_are_always_the_same_and_never_trained_on(photos):
    for share in (.2, .5):
        train, test = (load(photos, split, 16, held_out=share) for split in ("train", "test"))
        again = load(photos, "test", 16, held_out=share)
        assert torch.equal(test.x, again.x) and len(train) + len(test) == 30
        assert [len(rows) for rows in test.per_class] == [round(15 * share)] * 2
        both = {image.numpy().tobytes() for image in train.x} & {image.numpy().tobytes() for image in test.x}
        assert not both


def test_two_splits_number_the_classes_alike(photos, tmp_path):
    for split in ("train", "val"): shutil.copytree(photos, tmp_path / "two" / split)
    shutil.rmtree(tmp_path / "two" / "val" / "cat")
    train, test = (load(tmp_path / "two", split, 16) for split in ("train", "test"))
    assert train.classes == test.classes == ("cat", "dog") and {*test.y.tolist()} == {1}
    found = examine(data_set(tmp_path / "two"))
    assert len(found.leaked) == 15 and not found.broken
    (tmp_path / "two" / "val" / "fox").mkdir()
    shutil.copy(photos / "cat" / "0.jpg", tmp_path / "two" / "val" / "fox")
    with pytest.raises(BrokenFile, match="classes that the training split has not: fox"): load(tmp_path / "two", size=8)


def test_grey_stays_grey_and_one_colour_makes_all_coloured(tmp_path):
    for kind in "ab":
        (tmp_path / "g" / kind).mkdir(parents=True)
        for n in range(3): Image.fromarray(np.full((8, 8), 40 * n, np.uint8)).save(tmp_path / "g" / kind / f"{n}.png")
    assert load(tmp_path / "g").shape == (1, 8, 8)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "g" / "a" / "3.png")
    assert load(tmp_path / "g").shape == (3, 8, 8)


def arrays(n=12, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 8, 8, 3), np.uint8), np.arange(n) % 3


def test_arrays_in_all_their_shapes(tmp_path):
    x, y = arrays()
    kinds = {"bytes": x, "floats": x / 255, "channels_first": x.transpose(0, 3, 1, 2), "wide": x.astype(np.int64)}
    for name, images in kinds.items(): np.savez(tmp_path / f"{name}.npz", images=images, labels=y[:, None])
    found = {load(tmp_path / f"{name}.npz").fingerprint for name in kinds}
    assert len(found) == 1
    named = np.array(["ant", "bee", "cow"])[y]
    np.savez(tmp_path / "words.npz", x=x, y=named)
    assert load(tmp_path / "words.npz").classes == ("ant", "bee", "cow")


def test_a_pair_of_npy_with_its_test_split(tmp_path):
    for split, seed in (("train", 0), ("test", 1)):
        x, y = arrays(seed=seed)
        np.save(tmp_path / f"x_{split}.npy", x)
        np.save(tmp_path / f"y_{split}.npy", y)
    for path in (tmp_path / "x_train.npy", tmp_path):
        assert [len(load(path, split)) for split in ("train", "test")] == [12, 12]
        assert np.array_equal(load(path, "test").x.permute(0, 2, 3, 1).numpy(), arrays(seed=1)[0])


def test_parquet_as_the_hub_has_it(tmp_path, photos):
    import pyarrow as pa
    import pyarrow.parquet as pq
    files = sorted(photos.rglob("*.jpg"))
    label = {"_type": "ClassLabel", "names": ["Cat", "Dog"]}
    told = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    for split, part in (("train", files[::2]), ("validation", files[1::2])):
        table = pa.Table.from_pandas(pd.DataFrame(dict(image=[dict(bytes=p.read_bytes(), path=p.name) for p in part],
                                                       label=[int(p.parent.name == "dog") for p in part])))
        folder = tmp_path / "hub" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        table = table.replace_schema_metadata({"huggingface": json.dumps(told)})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    train, test = (load(tmp_path / "hub", split, 16) for split in ("train", "test"))
    assert train.classes == ("Cat", "Dog") and len(train) == len(test) == 15
    assert data_set(folder / "train-00000-of-00001.parquet").classes == ("Cat", "Dog")


def write(path, **named): np.savez(path, **named)


@pytest.mark.parametrize("make, told, error", [
    (lambda p: p.mkdir(), "no folder with images for each class", MissingData),
    (lambda p: write(f"{p}.npz", a=np.zeros(3)), "must hold x and y .* it holds a", BrokenFile),
    (lambda p: write(f"{p}.npz", x=np.zeros((2, 8, 8, 5)), y=[0, 1]), "with C 1 or 3", BadArgument),
    (lambda p: write(f"{p}.npz", x=np.full((2, 8, 8), 300), y=[0, 1]), "pixels in 0 ... 255", BadArgument),
    (lambda p: write(f"{p}.npz", x=np.zeros((2, 8, 8)), y=[0., 1.]), "a number or a name an image", BadArgument),
    (lambda p: write(f"{p}.npz", x=np.zeros((2, 8, 8)), y=[0, 1]), "has one image: held_out needs two", BadArgument),
    (lambda p: write(f"{p}.npz", x=np.zeros((4, 8, 8)), y=[0, 5, 0, 5], classes=["a"]), "1 classes are", BrokenFile),
    (lambda p: np.save(f"{p}.npy", np.zeros((2, 8, 8))), "labels must stand beside", MissingData),
    (lambda p: open(f"{p}.npz", "w").write("no"), "cannot be read", BrokenFile),
    (lambda p: open(f"{p}.zip", "w").write("no"), "unknown format '.zip'", UnknownName)])
def test_what_cannot_be_read_is_one_sentence(tmp_path, make, told, error):
    make(tmp_path / "mine")
    path, = (p for p in tmp_path.iterdir() if p.name.startswith("mine"))
    with pytest.raises(error, match=told) as refused: load(path)
    assert "\n" not in str(refused.value)
