"Experts, trajectory matching and MAT: what is too wide for their notebooks."
from dataclasses import replace
import pytest
import torch
from conftest import Stopped
from safetensors.torch import save_file
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, BrokenFile, MissingData, describe
from rdd_lib.files import kept
from rdd_lib.data import DATASETS, load, sample
from rdd_lib.distill.experts import Experts
from rdd_lib.distill.trajectory import TrajectoryMatching, rounds
from rdd_lib.models import Net
from rdd_lib.attacks.pgd import PGD
from rdd_lib.training.curvature import Curvature
from rdd_lib.training.fast import Free, fast
from rdd_lib.training.mart import Mart
from rdd_lib.training.objectives import Adversarial, Standard
from rdd_lib.attacks.threats import L2, Linf
from rdd_lib.training.trades import Trades

NET = Net("convnet", dict(width=4, depth=2))
EXPERTS = Experts(n=2, lr=.05, batch=50)
TM = TrajectoryMatching(iterations=3, lr=100., lr_alpha=1e-3, alpha=.05, student_steps=4, expert_epochs=1, max_start=2,
                        net=NET, experts=EXPERTS)
EPOCHS = range(3)


@pytest.fixture(scope="module")
def digits(): return sample(load("mnist5k"), 200)


@pytest.fixture(scope="module")
def buffers(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    EXPERTS(NET, digits, 2, folder, "cpu")
    return folder


@pytest.mark.parametrize("settings", [dict(), dict(augment=""), dict(batch_syn=7), dict(lr_label=1.),
                                      dict(batch_syn=10, lr_label=1., momentum=0.), dict(init="noise")], ids=repr)
def test_recomputed_gradient_is_the_graphs(digits, buffers, settings):
    methods = [replace(TM, gradient=gradient, **settings) for gradient in ("recompute", "graph")]
    a, b = (tm.compress(digits, ipc=2, device="cpu", buffers=buffers) for tm in methods)
    torch.testing.assert_close(a.x, b.x, atol=2e-4, rtol=0)
    assert a.schedule["lr"] == pytest.approx(b.schedule["lr"], rel=1e-4)
    if a.soft_labels is not None: torch.testing.assert_close(a.soft_labels, b.soft_labels, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_resumed_run_ends_in_the_same_bytes(digits, buffers, tmp_path, stop):
    tm = replace(TM, iterations=6, batch_syn=7, lr_label=1.)
    run, path = dict(ipc=2, device="cpu", buffers=buffers), tmp_path / "run.safetensors"
    whole, log = tm.compress(digits, **run), []
    with pytest.raises(KeyboardInterrupt): tm.compress(digits, **run, checkpoint=path, every=1, log=Stopped(stop))
    again = tm.compress(digits, **run, checkpoint=path, every=1, log=log)
    assert again.x.equal(whole.x) and again.soft_labels.equal(whole.soft_labels) and again.schedule == whole.schedule
    assert len(log) == 6
    assert again.checkpoint == path and path.exists()


def test_wrong_buffers_lose_no_checkpoint(digits, buffers, tmp_path):
    path, other = tmp_path / "run.safetensors", tmp_path / "others"
    run = dict(ipc=1, device="cpu", checkpoint=path, every=1)
    with pytest.raises(KeyboardInterrupt): TM.compress(digits, **run, buffers=buffers, log=Stopped(2))
    before = path.read_bytes()
    replace(EXPERTS, ema=.5)(NET, digits, 2, other, "cpu")
    with pytest.raises(BadArgument, match="ema is 0.5 there and 0.0 here"): TM.compress(digits, **run, buffers=other)
    assert path.read_bytes() == before


def test_interrupted_experts_leave_whole_files_only(digits, tmp_path):
    calls = []
    class Breaking(Standard):
        def __call__(self, *args):
            calls.append(0)
            if len(calls) == 6: raise KeyboardInterrupt         # four steps an epoch: within the second expert
            return super().__call__(*args)
    with pytest.raises(KeyboardInterrupt): replace(EXPERTS, objective=Breaking())(NET, digits, 1, tmp_path, "cpu")
    assert [p.name for p in tmp_path.iterdir()] == ["expert_0000.safetensors"]
    calls[:] = [0] * 10
    replace(EXPERTS, objective=Breaking())(NET, digits, 1, tmp_path, "cpu")
    assert len(calls) == 14                                     # only the second was trained


OBJECTIVES = [Adversarial(PGD(Linf(.1), 2)), Adversarial(PGD(L2(1.), 2)), Trades(Linf(.1), steps=2),
              Mart(PGD(Linf(.1), 2)), Curvature(), Free(Linf(.1), replays=2), fast(Linf(.1))]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("ema", [0., .9])
def test_any_objective_trains_experts_under_augmentation(digits, tmp_path, objective, ema):
    experts = replace(EXPERTS, objective=objective, ema=ema, n=1)
    first, second = (experts(NET, digits, 2, tmp_path / name, "cpu") for name in "ab")
    assert first.files[0].read_bytes() == second.files[0].read_bytes()
    rows = first.read(0, EPOCHS)
    assert rows.isfinite().all() and (rows[1:] != rows[:-1]).any(1).all()


@pytest.mark.parametrize("net", [NET, Net("mlp", dict(width=16))], ids=lambda n: n.name)
def test_radius_and_decay_of_zero_are_tm(digits, tmp_path, net):
    harmless = replace(EXPERTS, objective=Adversarial(PGD(Linf(0.), 2)))
    def made(experts, folder):
        return replace(TM, net=net, experts=experts).compress(digits, ipc=1, device="cpu", buffers=tmp_path / folder)
    a, b = made(EXPERTS, "plain"), made(harmless, "harmless")
    assert a.x.equal(b.x) and a.schedule == b.schedule


@pytest.mark.parametrize("ema", [.5, .9, .99])
def test_smoothing_shortens_the_way(digits, tmp_path, ema):
    robust = replace(EXPERTS, objective=Adversarial(PGD(Linf(.1), 2)), n=1)
    of = lambda experts: experts(NET, digits, 3, tmp_path / str(experts.ema), "cpu").read(0, range(4))
    raw, smooth = of(robust), of(replace(robust, ema=ema))
    way = lambda rows: (rows[1:] - rows[:-1]).norm(dim=1).sum()
    assert raw[0].equal(smooth[0]) and way(smooth) < way(raw)


@pytest.mark.parametrize("spoil", [lambda p: p.write_bytes(p.read_bytes()[:-9]), lambda p: p.write_bytes(b""),
                                   lambda p: p.write_text("no"), lambda p: save_file({"theta": torch.zeros(3, 4)}, p),
                                   lambda p: save_file({"theta": torch.zeros(3, 4)}, p, {"rdd_lib": "{}"})])
def test_a_broken_expert_is_named(digits, buffers, tmp_path, spoil):
    for p in buffers.iterdir(): (tmp_path / p.name).write_bytes(p.read_bytes())
    spoil(tmp_path / "expert_0001.safetensors")
    with pytest.raises(BrokenFile, match="expert_0001.safetensors' is not a whole expert"):
        TM.compress(digits, ipc=1, device="cpu", buffers=tmp_path)


def test_default_folder_is_kept_and_shared(digits):
    TM.compress(digits, ipc=1, device="cpu")
    folder, = kept("experts").iterdir()
    stamps = {p: p.stat().st_mtime_ns for p in folder.iterdir()}
    replace(TM, iterations=1).compress(digits, ipc=2, seed=1, device="cpu")
    assert len(stamps) == 2 and {p: p.stat().st_mtime_ns for p in folder.iterdir()} == stamps
    more = replace(TM, iterations=1, experts=replace(EXPERTS, n=3, epochs=9))   # one more in the same folder
    more.compress(digits, ipc=1, device="cpu")
    assert len([*folder.iterdir()]) == 3 and {p: p.stat().st_mtime_ns for p in stamps} == stamps


def test_an_expert_that_vanishes_is_missed(digits, tmp_path):
    made = EXPERTS(NET, digits, 1, tmp_path, "cpu")
    made.files[1].unlink()
    with pytest.raises(MissingData, match="expert_0001"): made.read(1, [0])


@pytest.mark.parametrize("data", DATASETS)
@pytest.mark.parametrize("ipc", [1, 10, 50, None])
def test_presets_build_and_describe(data, ipc):
    tm, mat = (find_method(name).build(data, ipc) for name in ("tm", "mat"))
    assert replace(mat, experts=Experts()) == tm and mat.experts.ema == .999 and describe(mat)
    assert mat.experts.objective.attack.threat == (Linf(.1) if "mnist" in data else Linf(8 / 255))
    five = find_method("matching_adversarial_trajectories").build(data, ipc, **{"experts.objective.attack.steps": "5"})
    assert five.experts.objective.attack.steps == 5


@pytest.mark.parametrize("images,batch,steps", [(10, 3, 9), (10, 10, 3), (7, 100, 2), (5, 1, 11)])
def test_rounds_use_every_image_equally_often(images, batch, steps):
    parts = rounds(images, batch, steps, torch.Generator().manual_seed(0))
    used = torch.bincount(torch.cat(parts), minlength=images)
    assert len(parts) == steps and used.max() - used.min() <= 1
