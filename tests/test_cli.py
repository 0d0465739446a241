"""The `rdd` command as a shell sees it: output, exit codes, and nothing half-written. Three tests start processes, the
rest is in this one."""
import json
import os
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from rdd_lib.cli_app import EPILOG
from rdd_lib.published import load_compressed
from rdd_lib.reproduce.runner import items, parameters_of, typed_settings

RDD = Path(sys.executable).parent / "rdd"
NAMES = ("mnist5k", "minimal_coreset (mcs)", "distribution_matching (dm)", "(dc)", "(dsa)", "(tm)", "(dd)", "(guard)",
         "(mat)", "guard_early/table2", "mat/main", "resnet18", "apgd-ce", "mcs/fig2", "mcs/table1")


def sets(*settings):
    "Settings as words of a command."
    return [word for setting in settings for word in ("--set", setting)]


def test_list_knows_everything_in_a_process_of_its_own(tmp_path):
    done = subprocess.run([RDD, "list"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in NAMES: assert name in done.stdout


def test_the_examples_of_reproduce_name_settings_that_exist():
    paths, asked = {i.name: i.path for i in items()}, 0
    for line in EPILOG["reproduce"]:
        if "--set" not in line: continue
        _, _, item, _, setting = line.split()
        asked += len(typed_settings(item, parameters_of(paths[item]), dict([setting.split("=")])))
    assert asked == 1


def test_help_answers_with_examples(rdd):
    assert "reproduce" in rdd("--help").stdout
    for command in ("list", "data", "compress", "show", "score", "attack", "reproduce"):
        done = rdd(command, "--help")
        assert done.returncode == 0 and f"rdd {command}" in done.stdout and "Examples" in done.stdout, done.stdout


def test_help_and_tab_answer_without_torch(tmp_path):
    code = ("import sys; from rdd_lib import cli\n"
            "try: cli.main()\n"
            "finally: print('torch' in sys.modules, file=sys.stderr)")
    tab = {"_RDD_COMPLETE": "complete_bash", "COMP_WORDS": "rdd compress mc", "COMP_CWORD": "2"}
    for words, env, told in ((["--help"], {}, "reproduce"), ([], tab, "mcs")):
        done = subprocess.run([sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True,
                              timeout=60, env=os.environ | env)
        assert told in done.stdout and done.stderr.split()[-1] == "False", done.stderr


def test_version(rdd): assert {"torch", "Python"} <= set(rdd("--version").stdout.split())


def test_compress_show_score(rdd, tmp_path):
    done = rdd("compress", "mcs", "mnist5k", "--ipc", 1, "-o", "a/mcs.safetensors")
    assert done.returncode == 0 and "radius" in done.stdout, done.stderr
    made = load_compressed(tmp_path / "a/mcs.safetensors")
    assert len(made) == 10 and made.weights.sum() == 4000 and made.lower_bound <= made.radius
    done = rdd("show", "a/mcs.safetensors", "--verify")
    assert done.returncode == 0 and "certificate verified" in done.stdout, done.stderr
    done = rdd("show", "a/mcs.safetensors", "--picture", "a/mcs.png")
    assert done.returncode == 0 and (tmp_path / "a/mcs.png").stat().st_size > 1000, done.stderr
    done = rdd("score", "a/mcs.safetensors", "--net", "mlp", "--n-test", 50, "--attack", "quick",
               "--train", "generalized", *sets("steps=5"))
    assert done.returncode == 0 and "robust" in done.stdout, done.stderr


def test_the_plan_is_the_papers_with_changes(rdd, tmp_path):
    changes = sets("experts.ema=.99", "experts.objective.attack.steps=5")
    done = rdd("compress", "mat", "cifar10", "--ipc", 1, "--plan", *changes)
    assert done.returncode == 0 and not os.listdir(tmp_path), done.stderr
    plan = json.loads(done.stdout)
    attack = plan["experts"]["objective"]["attack"]
    assert (plan["student_steps"], plan["lr"], plan["experts"]["ema"], attack["steps"]) == (50, 100., .99, 5)
    assert attack["threat"]["eps"] == 8 / 255
    guard = json.loads(rdd("compress", "guard", "cifar10", "--ipc", 10, "--plan").stdout)
    assert guard["is"] == "GradientMatching" and guard["real_objective"]["is"] == "Curvature"
    assert guard["iterations"] == 1000


def test_a_loss_that_is_no_number_stops_with_one_sentence(rdd, tmp_path):
    small = sets("experts.n=1", "expert_epochs=1", "max_start=1", "student_steps=3", "net.name=mlp", "alpha=1e30")
    done = rdd("compress", "tm", "mnist5k", "--ipc", 1, *small, "-o", "x")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("rdd: the loss is ") and "in iteration 0" in done.stderr, done.stderr
    assert not (tmp_path / "x").exists() and done.stderr.count("\n") == 1


def test_a_film_of_the_images(rdd, tmp_path):
    small = sets("iterations=3", "batch_real=20", "net.settings.width=4")
    done = rdd("compress", "dd", "mnist5k", "--ipc", 1, *small, "--film", "a/film.png", "-o", "x")
    assert done.returncode == 0 and (tmp_path / "a/film.png").stat().st_size > 1000, done.stderr
    assert "lrs" in load_compressed(tmp_path / "x").schedule


SQUEEZED = ("mnist5k", "--ipc", 2, "--classes", 3,
            *sets("relabel.epochs=4", "squeeze.epochs=1", "squeeze.after.epochs=1"))


def test_a_set_with_labels_of_views(rdd, tmp_path):
    done = rdd("compress", "guard_sre2l", *SQUEEZED, *sets("iterations=5", "batch=2"), "--film", "film.png", "-o", "g")
    assert done.returncode == 0 and (tmp_path / "film.png").stat().st_size > 1000, done.stderr
    assert {*os.listdir(tmp_path)} - {"store"} == {"film.png", "g"}
    assert "labels of 24 views in 144 bytes, images in 4,704" in rdd("show", "g").stdout
    for words in (["--train", "standard"], [], ["--net", "mlp"]):
        done = rdd("score", "g", "--attack", "quick", "--n-test", 30, *words)
        assert done.returncode == 0 and "30 test images" in done.stdout, done.stderr
        assert "follow the set's own labels of views: 4 epochs in batches of 25, and by_epoch" in done.stdout
    done = rdd("score", "g", "--attack", "quick", "--n-test", 30, *sets("follow=False", "steps=2"))
    assert done.returncode == 0 and "follow" not in done.stdout, done.stderr


@pytest.mark.parametrize("method, own, left", [
    ("sre2l", ("iterations=5",), {"cut.checkpoint", "cut.checkpoint.labels"}),
    ("relabelled", (), {"cut.checkpoint.labels"})])
def test_an_interrupted_relabelling_goes_on_to_the_same_bytes(rdd, tmp_path, monkeypatch, method, own, left):
    from rdd_lib.files import Checkpoint
    words = "compress", method, *SQUEEZED, *sets(*own)
    write = Checkpoint.write

    def stop(note, tensors, **head):
        write(note, tensors, **head)
        if note.what == "a relabelling" and head["done"] == 2: raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(Checkpoint, "due", lambda note: note.path is not None)
        m.setattr(Checkpoint, "write", stop)
        assert rdd(*words, "-o", "cut").returncode == 130
    assert {*os.listdir(tmp_path)} - {"store"} == left
    for name in ("cut", "whole"): assert rdd(*words, "-o", name).returncode == 0
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {*os.listdir(tmp_path)} - {"store"} == {"cut", "whole"}


def test_k_means_what_the_budget_means(rdd, tmp_path):
    done = rdd("compress", "mcs", "mnist5k", "--budget", "joint", "-k", 12,
               "--gap", .3, "--time-limit", 600)                                # takes less than a second
    assert done.returncode == 0 and "gap" in done.stdout and "certificate verified" in done.stdout, done.stderr
    made = load_compressed(tmp_path / "mcs-mnist5k-joint12.safetensors")
    assert len(made) == 12 and made.certificate and 1 - made.lower_bound / made.radius <= .3


def test_the_same_command_writes_the_same_bytes(rdd, tmp_path):
    words = ("compress", "dm", "mnist5k", "--ipc", 1, *sets("iterations=2", "batch_real=4"), "--seed", 7)
    for name in ("a", "b"): assert rdd(*words, "-o", name).returncode == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("line, told", [
    ("compress mcs minst5k --ipc 1 -o x", "did you mean 'mnist5k'"),
    ("compress mcss mnist5k --ipc 1 -o x", "did you mean 'mcs'"),
    ("compress random mnist5k --ipc 0 -o x", "got 0"), ("compress random mnist5k --ipc 999 -o x", "has 400"),
    ("compress random mnist5k -o x", "say how many images: --ipc 10"),
    ("compress random mnist5k --ipc 1 -o .", "it is a folder"),
    ("compress random mnist5k --ipc 1 --seed -3 -o x", "-3"),
    ("compress random mnist5k --ipc 1 --size 9 -o x", "size is for image folders; mnist5k has its own"),
    ("compress random mnist5k --ipc 1 --classes 11 -o x", "how many of them, got 11"),
    ("compress cda imagenette --ipc 1 --set squeeze.after.epochs=3 -o x", "'after' is None, so there is no"),
    ("compress dm mnist5k --ipc 1 --set lr=fast -o x", "'lr' must be of type float"),
    ("compress dc mnist5k --ipc 0 -o x", "ipc must be a whole number >= 1, got 0"),
    ("compress dc mnist5k --ipc 1 --set batch_real=401 -o x", "batch_real=401 asks for more images than class 0"),
    ("compress random mnist5k --ipc 1 --film x.png -o x", "--film is for methods"),
    ("compress guard mnist5k --ipc 1 --set real_objective.lamda=2 -o x", "did you mean 'lam'"),
    ("compress mat mnist6k --ipc 1 --plan", "did you mean 'mnist5k'"),
    ("compress tm mnist5k --ipc 1 --set max_start=60 -o x", "experts that have epochs=50"),
    ("attack broken.safetensors --net mlp --data mnist5k", "broken.safetensors"),
    ("attack x --net mlp --data mnist5k --set lr=1", "--set takes net.<name> and attack.<name> here, got lr"),
    ("compress random ./none --ipc 1", "no such file or folder: './none'"),
    ("compress mcs mnist5k --ipc 1 --set norm=3 -o x", "3"), ("compress mcs mnist5k -k 1 --ipc 1", "give one of"),
    ("compress mcs mnist5k --budget all -k 1", "'all'"), ("compress random mnist5k --budget joint -k 9", "budget"),
    ("show nowhere.safetensors", "no such file"), ("show broken.safetensors", "broken.safetensors"),
    ("score broken.safetensors", "not a compressed set"), ("reproduce mcs/fig9", "mcs/fig"),
    ("reproduce mcs/fig1 --profile fast", "smoke"), ("reproduce mcs/fig2 --json", "--json is for --plan"),
    ("reproduce mcs/fig2 --executor serial --cluster slurm", "a cluster is for executor='dask', got"),
    ("reproduce mcs/fig2 --part 4/3", "from 1/10 to 10/10, got '4/3'"), ("list things", "unknown list 'things'")])
def test_a_mistake_is_one_sentence_and_exit_code_2(rdd, tmp_path, line, told):
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    done = rdd(*line.split())
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert told in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("rdd: ") and done.stderr.count("\n") == 1
    assert {*os.listdir(tmp_path)} - {"store"} == {"broken.safetensors"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_though_asked(rdd, tmp_path):
    done = rdd("compress", "dm", "mnist5k", "--ipc", 1, "--device", "cuda", "-o", "x")
    assert done.returncode == 2 and "sees no GPU" in done.stderr and not os.listdir(tmp_path)


INTERRUPTED = """
import os, signal, sys
from rdd_lib.distill import synthetic
from rdd_lib.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)       # a shell starts background jobs with Ctrl-C ignored
start, look = synthetic._Keeper.__init__, synthetic.Story.look
def eager(self, *args):
    start(self, *args)
    self.note.every = 0.                                       # saves the first iteration, not only after two seconds
def stopping(self, s, it, last):
    look(self, s, it, last)
    if it == 5: os.kill(os.getpid(), signal.SIGINT)
synthetic._Keeper.__init__, synthetic.Story.look = eager, stopping
main()"""


def test_an_interrupted_distiller_goes_on_to_the_same_bytes(rdd, tmp_path):
    "A process that gets Ctrl-C; its run goes on here, and ends in the bytes of a run that was never interrupted."
    small = sets("iterations=20", "batch_real=2", "net.name=mlp", "augment=crop")
    words = ["compress", "dm", "mnist5k", "--ipc", "1", *small]
    cut = subprocess.run([sys.executable, "-c", INTERRUPTED, *words, "-o", "cut"], cwd=tmp_path, capture_output=True,
                         text=True, timeout=300)
    assert cut.returncode == 130 and "the same command goes on" in cut.stderr, (cut.returncode, cut.stderr)
    assert {*os.listdir(tmp_path)} == {"cut.checkpoint"}
    for name in ("cut", "whole"): assert rdd(*words, "-o", name).returncode == 0
    assert (tmp_path / "cut").read_bytes() == (tmp_path / "whole").read_bytes()
    assert {*os.listdir(tmp_path)} == {"cut", "whole"}
