"RDED: what is kept against everything that was looked at, in a plain restatement; budgets, interruptions, presets."
from dataclasses import replace
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import RandomResizedCrop
from rdd_lib.compressed import save
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, describe, generator_of
from rdd_lib.data import DATASETS, load, sample
from rdd_lib.distill.rded import parts_of, RDED, Squares
from rdd_lib.distill.relabel import Relabel
from rdd_lib.files import Checkpoint
from rdd_lib.models import Net, statistics
from rdd_lib.published import load_compressed
from rdd_lib.training.squeeze import Squeeze
from rdd_lib.views import Views

NET = Net("strided", dict(width=4))
METHOD = RDED(net=NET, teacher=Squeeze(epochs=1, lr=.05, batch=20, views=Views("")), pool=12, crops=3, relabel=None)


@pytest.fixture(scope="module")
def digits(): return sample(load("mnist5k"), 200)


@pytest.fixture(scope="module")
def run(tmp_path_factory): return dict(device="cpu", folder=tmp_path_factory.mktemp("teachers"))


def plainly(method, data, c, n, seed, folder):
    "The n best parts of class c: every loss in a list, sorted."
    teacher, side = method.teacher(method.net, data, folder, "cpu"), data.shape[-1] // method.factor
    mean, std = (t.view(-1, 1, 1) for t in statistics(data))
    g, cut = generator_of(seed, "parts", c), Squares(method.scale, side)
    rows = data.per_class[c][torch.randperm(len(data.per_class[c]), generator=g)[:max(method.pool, n)]]
    looks, found = [cut.draw(len(rows), data.shape[-1], g) for _ in range(method.crops)], []
    for i, row in enumerate(rows):
        image, tried = data.x[row:row + 1].float() / 255, []
        for drawn in looks:
            top, left, long = (int(drawn[name][i]) for name in ("top", "left", "length"))
            part = F.interpolate(image[..., top:top + long, left:left + long], [side, side], mode="bilinear",
                                 antialias=True)
            seen, at = torch.zeros(1, *data.shape), (data.shape[-1] - side) // 2
            seen[..., at:at + side, at:at + side] = (part - mean) / std           # zeros around what is normalised
            with torch.no_grad(): loss = -teacher.model(seen).double().log_softmax(1)[0, c]
            tried.append((float(loss), (part * 255).round()))
        found.append(min(tried, key=lambda one: one[0]))
    found.sort(key=lambda one: one[0])
    return [loss for loss, _ in found], torch.cat([part for _, part in found[:n]])


@pytest.mark.parametrize("settings", [dict(), dict(factor=2), dict(factor=2, scale=(.5, 1.)), dict(factor=4, pool=1),
                                      dict(scale=(1., 1.), crops=1)], ids=repr)
@pytest.mark.parametrize("seed", [0, 5])
def test_kept_are_the_best_of_all_that_was_looked_at(digits, run, settings, seed):
    method, ipc = replace(METHOD, **settings), 1 if settings.get("factor") == 4 else 2
    S, each, mean = method.compress(digits, ipc=ipc, seed=seed, **run), method.factor ** 2, 0.
    for c in range(10):
        losses, parts = plainly(method, digits, c, ipc * each, seed, run["folder"])
        kept = parts_of(S.x[S.y == c], method.factor).float()
        assert len(kept) == ipc * each and (kept - parts).abs().max() <= 1
        mean += sum(losses[:ipc * each]) / (10 * ipc * each)
    assert S.provenance["cross_entropy"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize("factor", [1, 2])
def test_nothing_is_chosen_where_nothing_can_be(digits, run, factor):
    "All of an image, once, from a pool that is kept whole: a random choice of real images."
    n = 3 * factor ** 2
    S = replace(METHOD, factor=factor, crops=1, scale=(1., 1.), pool=n).compress(digits, ipc=3, **run)
    parts, y = parts_of(S.x, factor), S.y.repeat_interleave(factor ** 2)
    for c in range(10):
        rows = digits.per_class[c][torch.randperm(len(digits.per_class[c]), generator=generator_of(0, "parts", c))[:n]]
        real = digits.x[rows].float()
        if factor == 2: real = F.interpolate(real, scale_factor=.5, mode="bilinear", antialias=True)
        apart = torch.cdist(parts[y == c].float().flatten(1), real.flatten(1), p=torch.inf)
        assert (apart.amin(1) <= .51).all() and len(apart.argmin(1).unique()) == n


def test_squares_are_those_of_torchvision():
    "Places and sizes are distributed as there, by their means and spreads."
    ours = Squares((.1, .7), 8).draw(4000, 20, generator_of(0))
    cut = RandomResizedCrop(8, scale=(.1, .7), ratio=(1., 1.))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = torch.tensor([cut.get_params(torch.zeros(1, 20, 20), cut.scale, cut.ratio) for _ in range(4000)])
    for mine, other in zip((ours["top"], ours["left"], ours["length"]), theirs.T):
        assert mine.double().mean() == pytest.approx(float(other.double().mean()), abs=.2)
        assert mine.double().std() == pytest.approx(float(other.double().std()), abs=.2)
        assert (mine.min(), mine.max()) == (other.min(), other.max())


def test_a_total_and_classes_of_unequal_numbers(digits, run):
    S = METHOD.compress(digits, total=13, **run)
    assert torch.bincount(S.y).tolist() == [2, 2, 2] + [1] * 7
    assert torch.equal(S.x[S.y > 2], METHOD.compress(digits, ipc=1, **run).x[3:])


def test_interrupted_labels_go_on_to_the_same_file(digits, run, tmp_path, monkeypatch):
    method, calls = replace(METHOD, relabel=Relabel(epochs=6, batch=5)), []
    whole = save(method.compress(digits, ipc=1, **run), tmp_path / "whole").read_bytes()
    def due(note):
        calls.append(note)
        if len(calls) == 4: raise KeyboardInterrupt
        return True
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, "due", due)
        with pytest.raises(KeyboardInterrupt): method.compress(digits, ipc=1, checkpoint=tmp_path / "note", **run)
    assert (tmp_path / "note.labels").exists()
    S = method.compress(digits, ipc=1, checkpoint=tmp_path / "note", **run)
    assert save(S, tmp_path / "again").read_bytes() == whole and load_compressed(tmp_path / "again").views.seal


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("ipc", [1, 10, 50, None])
def test_presets_build_and_describe(data, ipc):
    rded, sre2l = (find_method(name).build(data, ipc) for name in ("rded", "sre2l"))
    assert (rded.teacher, rded.net) == (sre2l.squeeze, sre2l.net) and describe(rded)["is"] == "RDED"
    assert rded.ingredients == sre2l.ingredients                      # one training serves both
    assert rded.factor == (2 if data in ("imagenette", "imagenet") else 1)
    assert rded.scale == ((.6, 1.) if "mnist" in data else (.08, 1.))
    other = find_method("realistic_crops").build(data, ipc, pool="7", scale="[.3, .9]", **{"teacher.epochs": "3"})
    assert (other.pool, other.scale, other.teacher.epochs) == (7, (.3, .9), 3)


@pytest.mark.parametrize("settings, message", [
    (dict(crops=0), "crops must be a whole number >= 1, got 0"), (dict(factor=1.5), "factor must be a whole number"),
    (dict(scale=(.9, .5)), r"scale must be two shares of the area in \(0, 1\]"),
    (dict(scale=.5), "scale must be two shares"), (dict(factor=5), "factor must divide the 28 pixels of a side")])
def test_what_makes_no_sense_is_refused(digits, run, settings, message):
    with pytest.raises(BadArgument, match=message): replace(METHOD, **settings).compress(digits, ipc=1, **run)
