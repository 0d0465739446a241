"""A generator in the place of images: its set as a file, students of fresh and frozen images, a run that is stopped."""
import json
from dataclasses import replace
import pytest
import torch
import pretend_gpu
from rdd_lib.compressed import Compressed, Generated, read_compressed, save
from rdd_lib.compressor import find_method
from rdd_lib.core import BadArgument, BrokenFile, generator_of, subseed
from rdd_lib.data import ImageSet, load, sample
from rdd_lib.distill.conditional_gan import CRITICS, Game
from rdd_lib.distill.generative import GenerativeDistillation
from rdd_lib.exports import export
from rdd_lib.files import read_tensors, write_tensors
from rdd_lib.generators import BLOCK, GENERATORS, build_generator, draw, noise_for, recipe_of, restored_generator
from rdd_lib.models import Net
from rdd_lib.published import load_compressed
from rdd_lib.training.trainer import Trainer

NET = Net("convnet", dict(width=4, depth=1))
SMALL = GenerativeDistillation(width=4, noise=16, convs=1, depth=5, epochs=2, lr=1e-3, batch=20, match_epochs=2,
                               match_lr=1e-3, match_batch=15, real_steps=2, nets=(NET, Net("strided", dict(width=4))),
                               student=dict(epochs=3, lr=.05, batch=20))
RUN = dict(ipc=2, seed=3, device="cpu")


@pytest.fixture(scope="module")
def few(): return sample(load("mnist5k"), 60)

@pytest.fixture(scope="module")
def made(few): return SMALL.compress(few, **RUN)

def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
def answers(model, x):
    with torch.no_grad(): return model(x)


# ---- the generator ------------------------------------------------------------------------------------------------

SHAPES = [("conv", (1, 28, 28)), ("conv", (3, 32, 32)), ("conv", (3, 64, 64)), ("conv", (2, 8, 8)), ("mlp", (2, 1, 1)),
          ("mlp", (3, 4, 5))]

@pytest.mark.parametrize("name, shape", SHAPES)
def test_a_generator_is_what_its_recipe_says(name, shape):
    recipe = recipe_of(name, 3, 7, 4, shape, convs=2)
    net, state = build_generator(recipe, 5), torch.get_rng_state()
    assert torch.equal(torch.get_rng_state(), state) and json.loads(json.dumps(recipe)) == recipe
    x, y = draw(net, recipe, [3, 0, 1, 2], 9)
    assert x.shape == (6, *shape) and y.tolist() == [0, 0, 0, 2, 3, 3] and x.dtype == torch.uint8
    again = restored_generator(json.loads(json.dumps(recipe)), net.state_dict())
    assert torch.equal(draw(again, recipe, [3, 0, 1, 2], 9)[0], x)


def spoken(recipe):
    "A generator whose images differ: its batch norms know what comes, and its last layer is loud."
    net = build_generator(recipe, 0).train()
    y = torch.arange(200) % recipe["classes"]
    with torch.no_grad():
        for n in range(20): net(noise_for(y, recipe, generator_of(n)))
        net.layers[-2].weight *= 4
    return net.eval()

@pytest.mark.parametrize("counts", [[1, 0], [BLOCK, BLOCK], [BLOCK + 1, 3], [5, 200]])
def test_every_image_is_that_of_its_noise_alone(counts):
    "However many are drawn; and blocks of one size make them the same to the last bit."
    recipe = recipe_of("conv", 4, 12, 2, (1, 28, 28), convs=1)
    net = spoken(recipe)
    x, y = draw(net, recipe, counts, 1)
    z = noise_for(y, recipe, generator_of(1, "noise"))
    assert x.float().std() > 5 and len({image.numpy().tobytes() for image in x}) == len(x)
    for n in {0, len(x) // 2, len(x) - 1}:
        alone = (answers(net, z[n:n + 1])[0] * 255).round()
        assert (alone - x[n].float()).abs().max() <= 1            # a sum in another order may fall on the other side
    assert torch.equal(draw(net, recipe, counts, 1)[0], x) and not torch.equal(draw(net, recipe, counts, 2)[0], x)


def test_what_is_no_number_is_not_drawn():
    recipe = recipe_of("mlp", 3, 7, 2, (1, 2, 2))
    net = build_generator(recipe)
    with torch.no_grad(): net.layers[1].running_var.fill_(-1)
    with pytest.raises(BadArgument, match="images that are no numbers"): draw(net, recipe, [1, 1], 0)


def test_a_generator_of_one_s_own(few):
    class Flat(torch.nn.Module):
        def __init__(self, shape, noise, width, convs):
            super().__init__()
            self.grey, self.shape = torch.nn.Linear(noise, 1), shape
        def forward(self, z): return self.grey(z).sigmoid()[:, :, None, None].expand(-1, *self.shape)
    GENERATORS["flat"], CRITICS["flat"] = Flat, CRITICS["conv"]
    try:
        S = replace(SMALL, generator="flat").compress(few, **RUN)
        assert len(S.x.flatten(1).unique(dim=1)[0]) == 1 and S.nbytes == 17 * 4
    finally:
        del GENERATORS["flat"], CRITICS["flat"]


# ---- the game -----------------------------------------------------------------------------------------------------

def test_a_turn_leaves_the_global_generator_alone_and_moves_both(few):
    recipe = recipe_of("conv", 2, 12, 10, few.shape, convs=1)
    game, state = Game(recipe, 8, 0), torch.get_rng_state()
    before = {name: t.clone() for name, t in game.tensors().items()}
    game.turn(few.images()[:8], few.y[:8], game.draw(few.y[:8], generator_of(0)), 1e-3)
    after = game.tensors()
    assert torch.equal(torch.get_rng_state(), state)
    moved = {name for name in before if before[name].is_floating_point() and not torch.equal(before[name], after[name])}
    assert {name.partition(".")[0] for name in moved} == {"generator", "critic"}
    assert all(f"{who}.optimiser.0.exp_avg" in after for who in ("generator", "critic"))


@pytest.mark.parametrize("stop", [3, 6, 7, 9, 13])
def test_an_interrupted_run_ends_in_the_same_bytes(few, made, stop, tmp_path):
    "In the first stage, at its end, and in the second, whose matching network is on its way."
    class Stopped(list):
        def append(self, losses):
            super().append(losses)
            if len(self) == stop: raise KeyboardInterrupt
    log, film, whole, pictures, path = [], {}, [], {}, tmp_path / "run"
    assert same(SMALL.compress(few, **RUN, log=whole, snapshots=pictures).generator, made.generator)
    with pytest.raises(KeyboardInterrupt):
        SMALL.compress(few, **RUN, checkpoint=path, every=1, log=Stopped(), snapshots={})
    resumed = SMALL.compress(few, **RUN, checkpoint=path, every=1, log=log, snapshots=film)
    assert same(resumed.generator, made.generator) and torch.equal(resumed.x, made.x) and log == whole
    assert same(film, pictures) and resumed.provenance == made.provenance
    with pytest.raises(BadArgument, match="another run of a generator's training"):
        replace(SMALL, coef=.1).compress(few, **RUN, checkpoint=path)
    save(resumed, tmp_path / "set")
    assert not path.exists()


def test_the_pairs_of_the_matching_decide(few, made):
    "More of it ends elsewhere; none of it is the same game going on."
    strong, none = (replace(SMALL, coef=coef).compress(few, **RUN) for coef in (1., 0.))
    assert not same(strong.generator, made.generator) and not same(none.generator, made.generator)
    alone = replace(SMALL, coef=0., match_lr=SMALL.lr, match_batch=SMALL.batch)
    longer = replace(SMALL, epochs=4, match_epochs=0)
    assert same(alone.compress(few, **RUN).generator, longer.compress(few, **RUN).generator)


def test_one_class_and_uneven_budgets(few):
    one = ImageSet(few.x[:9], torch.zeros(9, dtype=torch.int64), ["digit"], "mnist5k")
    S = replace(SMALL, match_epochs=0).compress(one, total=3, device="cpu")
    assert S.y.tolist() == [0, 0, 0] and S.provenance["class_share"]["share"] == 1.
    S = replace(SMALL, match_epochs=0).compress(few, total=13, device="cpu")
    assert S.y.bincount().tolist() == [2] * 3 + [1] * 7 and len(S.draw()) == 13
    single = ImageSet(few.x[:1], torch.zeros(1, dtype=torch.int64), ["digit"], "mnist5k")
    with pytest.raises(BadArgument, match="has one image"): SMALL.compress(single, ipc=1, device="cpu")
    with pytest.raises(BadArgument, match="batch must be a whole number >= 2, got 1"): replace(SMALL, batch=1)


def test_a_judge_of_its_own(few, made):
    judged = replace(SMALL, judge=Trainer(epochs=2)).compress(few, **RUN)
    told, critic = judged.provenance["class_share"], made.provenance["class_share"]
    assert same(judged.generator, made.generator) and 0 <= told["share"] <= 1 and told["samples"] == 1000
    assert (told["by"], critic["by"]) == ("a network trained on the real images", "the critic")


def test_presets():
    dim = find_method("dim")
    for name in ("mnist", "fashion_mnist", "cifar10", "svhn", "cifar100", "tiny_imagenet"):
        own = dim(name, 10)
        assert (own.width, own.epochs, own.match_epochs, own.lr, own.batch) == (196, 150, 100, 1e-4, 128)
    assert [dim(name, 1).noise for name in ("cifar10", "cifar100", "tiny_imagenet")] == [100, 190, 290]
    assert dim("mnist5k", 10).width == 32 and dim.build("mnist5k", 1, judge=None).judge is None
    assert dim.build("cifar10", 1, **{"student.lr": "0.02"}).student["lr"] == .02


# ---- the set ------------------------------------------------------------------------------------------------------

def test_older_versions_refuse_it_and_others_keep_their_bytes(made, few, tmp_path):
    _, head = read_tensors(save(made, tmp_path / "a"), "a set")
    assert head["format"] == "rdd_lib.compressed/3" and head["recipe"] == made.recipe
    plain = Compressed(made.x, made.y, made.classes, made.name)
    tensors, head = read_tensors(save(plain, tmp_path / "b"), "a set")
    assert head["format"] == "rdd_lib.compressed/1" and {*tensors} == {"x", "y"} and "recipe" not in head


def test_a_round_trip(made, tmp_path):
    back = load_compressed(save(made, tmp_path / "a.safetensors"))
    assert isinstance(back, Generated) and same(back.generator, made.generator) and back.recipe == made.recipe
    assert torch.equal(back.x, made.x) and back.provenance == made.provenance and back.schedule == made.schedule
    assert torch.equal(back.draw(seed=3).x, made.x) and torch.equal(back.draw(5, 1).x, made.draw(5, 1).x)
    assert save(back, tmp_path / "b").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert f"{made.nbytes:,} bytes, as many as {made.nbytes // 784:,} images" in back.summary()
    assert "fresh images" in back.summary() and type(back.draw(1)) is Compressed


def test_exports_keep_the_generator_or_say_so(made, tmp_path):
    back = load_compressed(export(made, "pt", tmp_path / "set.pt"))
    assert isinstance(back, Generated) and same(back.generator, made.generator)
    assert torch.equal(back.draw(1, 2).x, made.draw(1, 2).x)
    with pytest.raises(BadArgument, match="no place for a generator"): export(made, "folder", tmp_path / "set")
    images = load_compressed(export(made.draw(1, 2), "folder", tmp_path / "set"))
    assert torch.equal(images.x, made.draw(1, 2).x) and type(images) is Compressed


ODD = {"of other classes": dict(recipe=("classes", 9)), "of other images": dict(recipe=("shape", [1, 32, 32])),
       "wider": dict(recipe=("width", 8)), "of no kind": dict(recipe=("name", "os.system")),
       "without end": dict(recipe=("convs", 10**9)), "half": dict(drop="generator.layers.4.weight"),
       "NaN": dict(put=("generator.layers.0.bias", torch.full((64,), torch.nan))),
       "of another type": dict(put=("generator.layers.0.bias", torch.zeros(64, dtype=torch.float64))),
       "more": dict(put=("generator.layers.99.bias", torch.zeros(1)))}

@pytest.mark.parametrize("fault", ODD)
def test_a_foreign_generator_is_refused(made, fault, tmp_path):
    tensors, head = read_tensors(save(made, tmp_path / "a"), "a set")
    said = ODD[fault]
    if "recipe" in said: head["recipe"] = head["recipe"] | dict([said["recipe"]])
    if "put" in said: tensors |= dict([said["put"]])
    tensors.pop(said.get("drop"), None)
    write_tensors(tmp_path / "b", tensors, **head)
    with pytest.raises(BrokenFile, match="b' is not a compressed set"): read_compressed(tmp_path / "b")


# ---- students -----------------------------------------------------------------------------------------------------

def weights(model): return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])

def test_fresh_and_frozen_are_two_protocols(made):
    frozen = replace(made, schedule=made.schedule | {"deploy": "frozen"})
    fresh_, frozen_, ignored = (weights(Trainer(**how)(NET, S, 0, "cpu"))
                                for S, how in ((made, {}), (frozen, {}), (made, dict(follow=False, **SMALL.student))))
    assert not torch.equal(fresh_, frozen_) and torch.equal(frozen_, ignored)


@pytest.mark.parametrize("how", [{}, dict(augment="crop_rotate")])
def test_every_epoch_has_images_of_its_own(made, how):
    "Watched from outside: the objective sees those of `draw`, in the order of the batches."
    seen, few = [], replace(made, schedule=dict(epochs=3, batch=20, deploy="fresh"))
    def objective(model, x, y, w=None, generator=None):
        seen.append((x.detach().clone(), y.clone()))
        return torch.nn.functional.cross_entropy(model(x), y)
    Trainer(objective, **how)(NET, few, 7, "cpu")
    order = generator_of(7, "order")
    for epoch, (x, y) in enumerate(seen):
        S, rows = few.draw(seed=subseed(7, "draw", epoch)), torch.randperm(20, generator=order)
        assert torch.equal(y, S.y[rows])
        if not how: assert torch.equal(x, S.images()[rows])
    assert len(seen) == 3 and not torch.equal(seen[0][0], seen[1][0])


# ---- a GPU --------------------------------------------------------------------------------------------------------

def test_on_a_gpu(few, gpu):
    there = SMALL.compress(few, **RUN | {"device": gpu})
    assert not any(t.is_cuda for t in [there.x, *there.generator.values()])
    if not pretend_gpu.pretended(): return
    here = SMALL.compress(few, **RUN)           # graphs that are differentiated twice are summed in another order
    assert (there.x.float() - here.x.float()).abs().mean() < 2
    assert torch.equal(here.draw(3, 1, gpu).x, here.draw(3, 1).x)
    assert torch.equal(weights(Trainer()(NET, here, 0, gpu)), weights(Trainer()(NET, here, 0, "cpu")))
