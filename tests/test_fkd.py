"""Folders of FKD's labels, written as SRe2L's program does it: torchvision's crops of image files, its sampler, NumPy's
draws. What is read from one has to be what the teacher saw."""
from dataclasses import replace
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, RandomSampler
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms.functional import hflip, pil_to_tensor, resized_crop
from rdd_lib.compressed import save
from rdd_lib.core import BadArgument, BrokenFile, MissingData
from rdd_lib.data import ImageSet, sample
from rdd_lib.fkd import read_fkd
from rdd_lib.models import Net
from rdd_lib.published import load_compressed, load_published
from rdd_lib.training.trainer import Trainer

SIDE, CLASSES, EACH, EPOCHS, BATCH = 32, 10, 3, 3, 8


def coarse(seed):
    "A photograph's stand-in: blurred noise."
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((SIDE, SIDE), Image.Resampling.BICUBIC)


def view_of(image):
    "One view as a tensor, its crop as fractions, whether it is mirrored."
    i, j, h, w = RandomResizedCrop.get_params(image, (.08, 1.), (3 / 4, 4 / 3))
    seen = resized_crop(image, i, j, h, w, (SIDE, SIDE), InterpolationMode.BILINEAR)
    flip = bool(torch.rand(1) < .5)
    place = torch.FloatTensor((i / SIDE, j / SIDE, h / SIDE, w / SIDE))
    return pil_to_tensor(hflip(seen) if flip else seen) / 255, place, flip


def mixed(x, kind, rng):
    "(the batch, partners, lambda, box), the last three None where nothing is mixed."
    if not kind: return x, None, None, None
    partner, lam = torch.randperm(len(x)), rng.beta(1., 1.)
    if kind == "mixup": return lam * x + (1 - lam) * x[partner], partner, lam, None
    cut, middle = int(SIDE * np.sqrt(1 - lam)), rng.integers(SIDE, size=2)
    top, left = (np.clip(m - cut // 2, 0, SIDE) for m in middle)
    bottom, right = (np.clip(m + cut // 2, 0, SIDE) for m in middle)
    y = x.clone()
    y[:, :, top:bottom, left:right] = x[partner, :, top:bottom, left:right]
    return y, partner, lam, [top, left, bottom, right]


def relabel(root, images, teacher, kind):
    "Their program, in short."
    rng = np.random.default_rng(0)
    sampler = RandomSampler(images, generator=torch.Generator().manual_seed(42))
    for epoch in range(EPOCHS):
        (root / f"epoch_{epoch}").mkdir(parents=True)
        for b, rows in enumerate(BatchSampler(sampler, BATCH, drop_last=False)):
            views, places, flips = zip(*(view_of(images[row]) for row in rows))
            x, partner, lam, box = mixed(torch.stack(views), kind, rng)
            parts = [torch.stack(places), torch.tensor(flips), partner, lam, box, teacher(x).half()]
            torch.save(parts, root / f"epoch_{epoch}/batch_{b}.tar")


@pytest.fixture
def published(tmp_path):
    "`published(kind)` gives images as they are read from a folder, a folder of labels, and the teacher."
    def make(kind="cutmix"):
        torch.manual_seed(0)
        images = [coarse(n) for n in range(CLASSES * EACH)]
        for n, image in enumerate(images):
            c, k = divmod(n, EACH)
            (tmp_path / f"syn/new{c:03}").mkdir(parents=True, exist_ok=True)
            image.save(tmp_path / f"syn/new{c:03}/class{c:03}_id{k:03}.png")
        data = load_published(tmp_path / "syn", "cifar10")
        net = Net("convnet", dict(width=8, norm="batch"))
        teacher = Trainer(epochs=30, lr=.05, batch=10)(net, data, 0, "cpu")
        with torch.no_grad(): relabel(tmp_path / "FKD", images, teacher, kind)
        return data, tmp_path / "FKD", teacher
    with torch.random.fork_rng(): yield make


@pytest.mark.parametrize("kind", ["", "mixup", "cutmix"])
def test_what_is_read_is_what_the_teacher_saw(published, kind, recwarn):
    data, folder, teacher = published(kind)
    S = read_fkd(folder, data)
    assert S.views.views.mix == kind and len(S.views.logits) == EPOCHS and not recwarn.list
    apart = []
    for shown in S.views.showings(S):
        with torch.no_grad(): now = teacher(S.views.views.show(S.images()[shown.rows], shown.drawn))
        apart.append((now - S.views.of(shown, S.x)).abs().max().item())
    assert len(apart) == 4 * EPOCHS and max(apart) < .02 * S.views.logits.float().std()


def test_one_file_has_it_all(published, tmp_path):
    data, folder, _ = published()
    S = read_fkd(folder, data, schedule=dict(lr=.01, optimizer="adamw"))
    again = load_compressed(save(S, tmp_path / "s.safetensors"))
    assert save(again, tmp_path / "t.safetensors").read_bytes() == (tmp_path / "s.safetensors").read_bytes()
    a, b = (Trainer()(Net("mlp"), x, 0, "cpu").state_dict() for x in (S, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert "drawn elsewhere" in again.summary() and S.views.nbytes < 40 * len(S) * EPOCHS
    assert type(S.subset([1, 2])) is type(sample(S, 10)) is ImageSet
    other = again.views.drawn | {"rows": again.views.drawn["rows"] * 0}
    broken = replace(again, views=None)
    with pytest.raises(BadArgument, match="answer to other views"): replace(again.views, drawn=other)
    with pytest.raises(BadArgument, match="every image once an epoch"):
        replace(broken, views=replace(again.views, drawn=other, seal=""))


def test_a_part_of_it(published):
    data, folder, _ = published()
    two = read_fkd(folder, data, epochs=2)
    assert torch.equal(two.views.logits, read_fkd(folder, data).views.logits[:2])
    assert two.provenance["labels"] == {"layout": "fkd", "folder": "FKD"} and two.provenance["file"]


def test_logits_in_full_precision_are_rounded(published):
    data, folder, _ = published("")
    before = read_fkd(folder, data).views.logits
    for path in folder.rglob("*.tar"):
        parts = torch.load(path, weights_only=True)
        torch.save([*parts[:5], parts[5].float()], path)
    assert torch.equal(read_fkd(folder, data).views.logits, before)


def test_classes_in_another_order_are_noticed(published):
    data, folder, _ = published("")
    with pytest.warns(UserWarning, match="are the classes in theirs"):
        read_fkd(folder, replace(data, y=(data.y + 1) % CLASSES))
    with pytest.warns(UserWarning, match="were the images shown in this order"): read_fkd(folder, data, order=7)


def drop(folder, b): (folder / f"epoch_2/batch_{b}.tar").unlink()
def cut(folder, b): (path := folder / f"epoch_1/batch_{b}.tar").write_bytes(path.read_bytes()[:-400])
def swap(folder, b): (folder / f"epoch_1/batch_{b}.tar").rename(folder / "epoch_1/batch_0.tar")


@pytest.mark.parametrize("spoil, error, told", [
    (drop, MissingData, "no such file: .*epoch_2/batch_3.tar"), (cut, BrokenFile, "cannot be read as a torch file"),
    (swap, BrokenFile, "has labels of 6 views, not of 8")])
def test_a_folder_that_is_not_whole(published, spoil, error, told):
    data, folder, _ = published()
    spoil(folder, 3)
    with pytest.raises(error, match=told): read_fkd(folder, data)


def test_images_that_do_not_fit(published):
    data, folder, _ = published()
    fewer, larger = data.subset(range(29)), replace(data, x=torch.nn.functional.interpolate(data.images(), 33))
    tall = ImageSet(data.x[..., 1:], data.y, data.classes)
    for images, told in ((fewer, "has labels of 30 images, the set has 29"), (larger, "images of another size"),
                         (tall, "images must be square"), (data.subset([*range(30)] * 2), "30 images, the set has 60")):
        with pytest.raises(BadArgument, match=told): read_fkd(folder, images)
    for epochs in (0, 4):
        with pytest.raises(BadArgument, match="epochs must be"): read_fkd(folder, data, epochs=epochs)


def test_a_batch_of_one_image_is_refused(published):
    data, folder, _ = published("")
    for path in folder.glob("epoch_*/batch_3.tar"):
        parts = torch.load(path, weights_only=True)
        torch.save([None if t is None else t[:1] for t in parts], path)
    with pytest.raises(BadArgument, match="is one image"): read_fkd(folder, data.subset(range(25)))
