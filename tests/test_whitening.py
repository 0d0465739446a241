"""Whitening inside the model: the map of the whole training set, attacks on pixels, published files read and judged."""
from dataclasses import replace
import pytest
import torch
from rdd_lib import Experts, Linf, Net, PGD, Random, Trainer, evaluate, load, sample
from rdd_lib.compressed import Compressed, read_compressed, save
from rdd_lib.core import BadArgument, generator_of
from rdd_lib.data import ImageSet
from rdd_lib.exports import load_weights
from rdd_lib.models import onto, takes_one
from rdd_lib.published import load_compressed
from rdd_lib.training.unrolled import flatten, functional
from rdd_lib.whitening import Whitened, whitening, whitening_of

WHITE = Net("convnet", dict(width=4), whiten=.1)


@pytest.fixture(scope="module")
def digits(): return load("mnist5k")


def test_ten_images_get_the_map_of_the_whole_training_set(digits):
    few, all_of_them = sample(digits, 10), WHITE(digits)
    assert torch.equal(WHITE(few).model.matrix, all_of_them.model.matrix)
    assert WHITE(few).model.matrix.data_ptr() == all_of_them.model.matrix.data_ptr()
    made = Random().compress(digits, ipc=1)
    assert torch.equal(WHITE(made)(few.images()), all_of_them(few.images()))


def test_a_set_of_ones_own_is_found_by_its_fingerprint(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "cells"))
    mine = replace(sample(digits, 60), name="of my own")
    made = Random().compress(mine, ipc=1)
    for data in (mine, made, replace(mine, split="test")):
        with pytest.raises(BadArgument, match="training set of 'of my own' is not known.*call whitening"): WHITE(data)
    own = whitening(mine)
    again = read_compressed(save(made, tmp_path / "s.safetensors"))
    for data in (mine, made, again): assert torch.equal(WHITE(data).model.matrix, own.matrix)
    with pytest.raises(BadArgument, match="not known"): WHITE(mine.subset([0, 1]))
    with pytest.raises(BadArgument, match="with eps=0.2 is not"): replace(WHITE, whiten=.2)(mine)


def test_a_broken_file_is_set_aside_and_made_again(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("RDD_STORE", str(tmp_path / "cells"))
    mine = replace(sample(digits, 60), name="mine")
    own = whitening(mine)
    path, = (tmp_path / "whitenings").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(RuntimeWarning, match="is broken"): again = whitening(mine)
    assert torch.equal(own.matrix, again.matrix) and torch.equal(own.mean, again.mean)


def test_the_gradient_of_an_attack_is_that_of_the_whole(digits):
    model, x = WHITE(digits).double(), sample(digits, 4).images().double().requires_grad_()
    model(x)[:, 3].sum().backward()
    w = whitening_of(digits)
    v = ((x.detach().flatten(1) - w.mean) @ w.matrix.double()).view(x.shape).requires_grad_()
    model.model.model(v)[:, 3].sum().backward()
    by_hand = (v.grad.flatten(1) @ w.matrix.double()).view(x.shape)
    assert (x.grad - by_hand).abs().max() < 1e-6 * by_hand.abs().max()


def test_attacks_keep_to_pixels_and_the_weights_are_the_network_s_own(digits):
    model, few = WHITE(digits), sample(load("mnist5k", "test"), 20)
    at = PGD(Linf(.1), 3)(model, few.images(), few.y, generator_of(0))
    assert (at - few.images()).abs().max() <= .1 + 1e-6 and 0 <= at.min() and at.max() <= 1
    plain = replace(WHITE, whiten=0.)(digits)
    assert torch.equal(flatten(model), flatten(plain)) and [*model.state_dict()] != []
    run = functional(model.model.eval())
    u = torch.randn(2, 1, 28, 28)
    assert torch.allclose(run(flatten(model.model), u), model.model(u), atol=1e-6)
    assert takes_one(model, few.images()[:1]) and onto(model, torch.device("cpu")) is model
    half = torch.autocast("cpu", torch.bfloat16)
    with half: assert model(few.images()).isfinite().all()


def test_weights_go_in_and_out(digits, tmp_path):
    from safetensors.torch import save_file
    model = WHITE(digits, 3)
    assert not [name for name in model.state_dict() if "matrix" in name]
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    for net in (WHITE, replace(WHITE, whiten=0.)):
        assert torch.equal(flatten(load_weights(net(digits, 4), tmp_path / "w.safetensors")), flatten(model))


def test_two_evaluations_of_two_maps_are_told_apart(digits, tmp_path):
    from rdd_lib.attacks.until_broken import fingerprint
    a, b = (replace(WHITE, whiten=eps)(digits, 0) for eps in (.1, .2))
    assert fingerprint(a) != fingerprint(b) and fingerprint(a) == fingerprint(WHITE(digits, 0))


def test_experts_know_what_they_saw(digits, tmp_path):
    experts, few = Experts(n=1, epochs=1, batch=32), sample(digits, 64)
    experts(WHITE, few, folder=tmp_path, device="cpu")
    with pytest.raises(BadArgument, match="holds another expert.*whiten"):
        experts(replace(WHITE, whiten=0.), few, folder=tmp_path, device="cpu")


def test_a_published_whitened_set_is_read_and_judged(digits, tmp_path):
    few, w = sample(digits, 100), whitening(digits)
    (tmp_path / "mnist5k_zca_10").mkdir()
    torch.save(w(few.images()), tmp_path / "mnist5k_zca_10/images_best.pt")
    torch.save(few.y, tmp_path / "mnist5k_zca_10/labels_best.pt")
    S = load_compressed(tmp_path / "mnist5k_zca_10", "mnist5k")
    assert (S.x - few.images()).abs().max() < 1e-5 and S.provenance["pixels"]["zca"]
    student = Trainer(steps=60, lr=.05)(WHITE, S, 0, "cpu")
    assert evaluate(student, sample(load("mnist5k", "test"), 200), None, device="cpu").std > .5


def test_a_whitened_set_of_another_size_is_refused(digits):
    small = ImageSet(digits.x[:, :, ::2, ::2].contiguous(), digits.y, digits.classes, "mnist5k")
    with pytest.raises(BadArgument, match="images of 784 values, these have 196"): WHITE(small)


def test_the_class_is_in_no_file_but_the_setting_is(digits):
    from rdd_lib.core import describe
    assert describe(Net()) == {"is": "Net", "name": "convnet", "settings": {}}
    assert describe(WHITE)["whiten"] == .1
    assert isinstance(WHITE(digits).model, Whitened) and isinstance(Random().compress(digits, ipc=1), Compressed)
