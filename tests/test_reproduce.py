"""What is too long or too wide for the notebooks of rdd_lib.reproduce: kills, corrupt files, processes, whole
notebooks, and the published numbers."""
import json, os, signal, subprocess, sys, time, warnings
from concurrent.futures import ThreadPoolExecutor
from math import inf, isnan, nan
from pathlib import Path
import pytest, torch
from hypothesis import HealthCheck, given, settings, strategies as st
from rdd_lib.core import BadArgument, BrokenFile, MissingData, UnknownName, Unwritable, generator_of
from rdd_lib.reproduce.grid import CellError, product, run_grid, table
from rdd_lib.reproduce.executors import cores
from rdd_lib.reproduce.tables import beside, means, papers_folder, published, save_table, wide
from rdd_lib.reproduce.figures import save_figure, scatter
from rdd_lib.reproduce.runner import ReproductionFailed, _LAUNCH, items, reproduce
from rdd_lib.reproduce.store import CellKey, CellStore

CALLS = []

def noisy(method, seed, n=40):
    CALLS.append((method, seed))
    drawn = torch.rand(n, n, generator=generator_of(seed, method))
    return {"std": drawn.logsumexp(0).mean().item(), "odd": [inf, -inf]}

def stops_at(i, at, how):
    CALLS.append(i)
    if i == at and os.environ.get("STOP"): raise {"ctrl-c": KeyboardInterrupt, "error": ValueError}[how]
    return i * i

def naps(i):
    time.sleep(.15)
    return i

@pytest.fixture
def store(tmp_path): return CellStore(tmp_path/"cells")

@pytest.fixture(autouse=True)
def fresh(): CALLS.clear()

# --- the store --------------------------------------------------------------------------------------------------------

plain = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                     lambda s: st.lists(s) | st.dictionaries(st.text(), s), max_leaves=10)

@given(result=plain)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_plain_data_comes_back_as_it_went_in(tmp_path, result):
    if "~float" in repr(result): return
    store, key = CellStore(tmp_path), CellKey("f", {"x": 1})
    assert repr(store.put(key, result)) == repr(result) == repr(store.get(key))

@pytest.mark.parametrize("damage", [lambda t: t[:len(t) // 2], lambda t: "", lambda t: t.replace("16", "17"),
                                    lambda t: "[1]", lambda t: "\x00" * 50])
def test_corrupt_cell_is_set_aside_and_computed_again(store, monkeypatch, damage):
    def run(): return run_grid(product(i=[4], at=9, how="error"), stops_at, store, progress=False)
    before = run()
    path = store.path(CellKey.of(stops_at, i=4, at=9, how="error"))
    path.write_text(damage(path.read_text()))
    with pytest.warns(RuntimeWarning, match=path.name): again = run()
    assert again == before and CALLS == [4, 4]
    assert (store.folder/f"{path.name}.broken").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run() == before
    assert CALLS == [4, 4]

def test_nothing_is_computed_when_the_store_cannot_be_written(tmp_path):
    (tmp_path/"file").write_text("")
    with pytest.raises(Unwritable, match="file"):
        run_grid(product(method="a", seed=0), noisy, CellStore(tmp_path/"file"), progress=False)
    assert not CALLS

# --- grids ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how, error", [("ctrl-c", KeyboardInterrupt), ("error", CellError)])
def test_a_killed_run_loses_only_the_cell_in_flight(store, monkeypatch, how, error):
    grid = product(i=range(5), at=3, how=how)
    monkeypatch.setenv("STOP", "1")
    with pytest.raises(error) as e: run_grid(grid, stops_at, store, progress=False)
    if how == "error": assert "i=3" in str(e.value) and "ValueError" in str(e.value)
    assert len(store) == 3
    monkeypatch.delenv("STOP")
    assert [r["result"] for r in run_grid(grid, stops_at, store, progress=False)] == [0, 1, 4, 9, 16]
    assert CALLS == [0, 1, 2, 3, 3, 4]

def test_executors_agree(tmp_path):
    grid = product(method=["a", "b"], seed=range(3))
    one_by_one = run_grid(grid, noisy, CellStore(tmp_path/"1"), threads=1, progress=False)
    with ThreadPoolExecutor(2) as pool:
        assert run_grid(grid, noisy, CellStore(tmp_path/"2"), pool, progress=False) == one_by_one
    many = CellStore(tmp_path/"3")
    assert run_grid(grid, noisy, many, "processes", workers=min(2, cores()), threads=1, progress=False) == one_by_one
    assert {r["threads"] for r in many} == {1}
    assert run_grid(grid, noisy, many, progress=False) == one_by_one               # what one has stored the other finds
    assert one_by_one[0]["odd"] == [inf, -inf]

def test_failures_are_recorded_not_stored(store, monkeypatch):
    monkeypatch.setenv("STOP", "1")
    rows = run_grid(product(i=range(3), at=1, how="error"), stops_at, store, on_error="record", progress=False)
    assert [r.get("error", "")[:10] for r in rows] == ["", "ValueError", ""] and len(store) == 2
    assert list(table(rows)["i"]) == [0, 1, 2]

@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_run_that_is_interrupted_from_outside_goes_on(tmp_path):
    code = f"""if __name__ == "__main__":
    import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
    from test_reproduce import naps, product, run_grid, CellStore
    run_grid(product(i=range(200)), naps, CellStore({str(tmp_path/"cells")!r}), progress=False)"""
    def heed(): signal.signal(signal.SIGINT, signal.default_int_handler)           # in the new process
    for sig in (signal.SIGINT, signal.SIGKILL):
        store = CellStore(tmp_path/"cells")
        had = len(store)
        run = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, preexec_fn=heed)
        for _ in range(300):
            if len(store) >= had + 2: break
            time.sleep(.1)
        run.send_signal(sig)
        told = run.communicate(timeout=30)[1]
        if sig == signal.SIGINT: assert b"KeyboardInterrupt" in told
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert had + 2 <= len(store) < 200                                     # and none of them broken

# --- published numbers ------------------------------------------------------------------------------------------------

def test_table_1_is_complete():
    df = published("mcs")
    t = df[df["item"] == "table1"]
    assert len(t) == 12 * 4 * 2 and not t.duplicated(["method", "dataset", "score"]).any()
    assert set(t.method) == {"Craig", "Forget", "Glister", "GradM", "GraNd", "Herding", "SubMod", "Rand", "MCS", "DM",
                             "GM", "TM"}
    assert set(t.dataset) == {"mnist", "cifar10", "cifar100", "svhn"} and set(t.score) == {"std", "rob"}
    assert t["mean"].notna().all() and t["sd"].notna().all()
    assert (t["n"] == 3).all() and t["mean"].between(0, 100).all()
    assert len(df[df["item"] == "table3"]) == 2 * 3 * 3

@pytest.mark.parametrize("method, dataset, score, mean, sd", [
    ("MCS", "mnist", "rob", 92.83, .07), ("Rand", "mnist", "std", 95.15, .14),
    ("TM", "cifar100", "std", 24.45, .14), ("GM", "svhn", "rob", .35, .13),
    ("Craig", "svhn", "rob", 19.59, 0), ("GraNd", "svhn", "std", 16.33, .4),
    ("SubMod", "cifar10", "rob", 9.14, .26), ("DM", "mnist", "rob", 91.20, .27)])
def test_numbers_of_table_1(method, dataset, score, mean, sd):
    df = published("mcs").query("item == 'table1' and method == @method and dataset == @dataset and score == @score")
    assert df[["mean", "sd"]].to_numpy().tolist() == [[mean, sd]]

def test_what_the_text_says_is_what_the_table_says():
    df = published("mcs")
    said, shown = df[df["item"].isin(["text", "fig2"])], df[df["item"] == "table1"]
    both = said.merge(shown, on=["method", "dataset", "score"], how="left")
    assert len(both) == 15 and (both.mean_x == both.mean_y).all()

def test_a_broken_table_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RDD_NBS", str(tmp_path))
    with pytest.raises(MissingData, match=tmp_path.name): published("x")
    (tmp_path/"papers"/"x").mkdir(parents=True)
    with pytest.raises(MissingData, match="published.csv"): published("x")
    no_number = "item,kind,method,dataset,score,mean,sd,n,setting,source\na,b,c,d,e,many,1,3,s,t\n"
    for text in ("item,method\na,b\n", no_number, ""):
        (tmp_path/"papers"/"x"/"published.csv").write_text(text)
        with pytest.raises(BrokenFile, match="published.csv"): published("x")

def test_missing_methods_stay_in_the_table():
    import pandas as pd
    t = published("mcs").query("item == 'table1' and dataset == 'cifar10'")
    ours = pd.DataFrame([{"method": "Rand", "dataset": "cifar10", "std": .3, "rob": r} for r in (.05, nan, .07)])
    side = beside(ours, t, scale=100)
    assert len(side) == 24 and (side.note == "not yet").sum() == 22
    rand = side[(side.method == "Rand") & (side.score == "rob")].iloc[0]
    assert rand.note == "1 of 3 runs failed" and rand.n == 2
    assert abs(rand.ours - 6) < 1e-9 and rand.lo < rand.difference < rand.hi
    with pytest.raises(BadArgument, match="scale=100"): beside(ours, t)
    one = beside(ours[:1], t, scale=100).query("method == 'Rand' and score == 'rob'").iloc[0]
    assert isnan(one.lo) and one.n == 1

def test_figures_and_tables_are_the_same_bytes_in_another_process(tmp_path):
    code = """import sys
from rdd_lib.reproduce.tables import published, save_table, wide
from rdd_lib.reproduce.figures import save_figure, scatter
t = wide(published("mcs").query("item == 'table1' and dataset == 'mnist'"), by=["method", "kind"])
save_figure(scatter(t, group="kind"), sys.argv[1], "f"); save_table(t, sys.argv[1], "t")"""
    for run in "ab":
        env = os.environ | {"MPLBACKEND": "agg", "PYTHONHASHSEED": str(ord(run))}
        subprocess.run([sys.executable, "-c", code, str(tmp_path/run)], check=True, env=env)
    for name in ("f.png", "f.svg", "t.csv"): assert (tmp_path/"a"/name).read_bytes() == (tmp_path/"b"/name).read_bytes()
    assert not [p for p in (tmp_path/"a").iterdir() if p.name.startswith(".")]

# --- whole notebooks --------------------------------------------------------------------------------------------------

PARAMETERS = 'profile = "smoke"\nout = ""\nresume = True\nseeds = 2\nbad = False'
BODY = """from tqdm.auto import tqdm
import matplotlib.pyplot as plt, sys, warnings
from pathlib import Path
warnings.warn("careful")
for i in tqdm(range(3)): print(i)
Path(out, "fig.csv").write_text(sys.executable)
plt.plot([1, seeds]); plt.show()
print(Path(out).absolute(), Path.home(), object())"""

def cell_of(i, source):
    "Cell number i: Markdown, code, or the code that is tagged as parameters."
    cell = dict(id=f"c{i}", metadata={}, source=source)
    if source[0] in "#>": return cell | {"cell_type": "markdown"}
    if source.startswith("profile"): cell["metadata"] = {"tags": ["parameters"]}
    return cell | {"cell_type": "code", "outputs": [], "execution_count": None}

def write_notebook(path, *cells):
    kernel = dict(name="python3", display_name="python3", language="python")
    made = [cell_of(i, source) for i, source in enumerate(cells)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(cells=made, nbformat=4, nbformat_minor=5, metadata={"kernelspec": kernel})))

@pytest.fixture
def paper(tmp_path, monkeypatch):
    head, last = "# A figure\n\n> One line.", "assert not bad, 'as told'"
    write_notebook(tmp_path/"nbs/papers/tiny/fig.ipynb", head, PARAMETERS, BODY, last)
    monkeypatch.setenv("RDD_NBS", str(tmp_path/"nbs"))
    monkeypatch.chdir(tmp_path)
    return tmp_path

def test_a_notebook_leaves_numbers_and_an_impersonal_copy(paper, monkeypatch):
    wrong = paper/"elsewhere/kernels/python3"                                      # of another environment, found first
    wrong.mkdir(parents=True)
    kernel = {"argv": ["/nowhere/python", "-f", "{connection_file}"], "display_name": "x", "language": "python"}
    (wrong/"kernel.json").write_text(json.dumps(kernel))
    monkeypatch.setenv("JUPYTER_PATH", str(paper/"elsewhere"))
    assert [(i.name, i.title, i.promise) for i in items()] == [("tiny/fig", "A figure", "One line.")]
    path, = reproduce("tiny/fig", "cpu", {"seeds": "5"})
    assert path == paper/"figures/cpu/tiny/fig.ipynb"
    assert (path.parent/"fig.csv").read_text() == sys.executable                   # the interpreter we are in
    text = path.read_text()
    for word in (str(paper), str(Path.home()) + "/", sys.prefix, "papermill", "0x7", "%|", "start_time"):
        assert word not in text, word
    assert 'out = \\"figures/cpu/tiny\\"' in text and "seeds = 5" in text and "careful" in text and "image/png" in text
    assert os.environ["JUPYTER_PATH"] == str(paper/"elsewhere")
    reproduce("tiny/fig", "cpu", {"seeds": 5})
    assert path.read_text() == text

def test_a_failing_notebook_leaves_the_good_one_alone(paper):
    path, = reproduce("tiny")
    good = path.read_bytes()
    told = r"tiny/fig failed at In \[4\] \(`assert not bad.*AssertionError: as told.*fig.failed.ipynb"
    with pytest.raises(ReproductionFailed, match=told): reproduce("tiny/fig", settings={"bad": "true"})
    assert path.read_bytes() == good and "as told" in (path.parent/"fig.failed.ipynb").read_text()
    write_notebook(paper/"nbs/papers/tiny/dead.ipynb", "# Dies", PARAMETERS, "import os; os._exit(1)")
    told = "1 of 2 notebooks failed:\n- tiny/dead failed at In .*os._exit.*Kernel died"
    with pytest.raises(ReproductionFailed, match=told): reproduce("all")
    assert not (path.parent/"fig.failed.ipynb").exists()
    assert not (path.parent/"dead.ipynb").exists() and (path.parent/"dead.failed.ipynb").exists()

def test_ctrl_c_in_a_notebook_is_ctrl_c(paper):
    write_notebook(paper/"nbs/papers/tiny/fig.ipynb", PARAMETERS, "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt): reproduce("tiny/fig")
    assert not list((paper/"figures").rglob("*.ipynb"))

def test_a_kernel_that_is_ended_while_it_waits_tells_nothing():
    "Its own logging settings come after ours, and would switch on again a logger that was switched off."
    code = _LAUNCH.split("from ipykernel.kernelapp")[0] + """
from ipykernel.kernelapp import IPKernelApp
IPKernelApp.instance().initialize(["--log-level=CRITICAL"])
print(logging.getLogger("asyncio").isEnabledFor(logging.ERROR), file=sys.__stdout__)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1:] == ["False"], done.stderr


def test_wrong_names_are_refused_before_anything_runs(paper):
    wrong = ((["tiny/gif"], {}, "tiny/fig"),
             (["tiny"], {"profile": "smok"}, "smoke"),
             (["all"], {"settings": {"seed": 1}}, "seeds"))
    for args, kw, message in wrong:
        with pytest.raises(UnknownName, match=f"did you mean .*{message}"): reproduce(*args, **kw)
    with pytest.raises(BadArgument, match="seeds"): reproduce("tiny", settings={"seeds": "two"})
    write_notebook(paper/"nbs/papers/tiny/fig.ipynb", 'profile = "smoke"\nout = ""')
    with pytest.raises(BadArgument, match="resume"): reproduce("tiny", resume=False)
    assert not (paper/"figures").exists()

def test_the_repository_is_found_without_help(tmp_path, monkeypatch):
    monkeypatch.delenv("RDD_NBS", raising=False)
    monkeypatch.chdir(tmp_path)
    assert (papers_folder()/"mcs"/"published.csv").exists()
    monkeypatch.setenv("RDD_NBS", str(tmp_path/"none"))
    with pytest.raises(MissingData, match="RDD_NBS"): items()

def overlap(a, b):
    "Whether two boxes (left, bottom, right, top) share a point."
    return min(a[2], b[2]) > max(a[0], b[0]) and min(a[3], b[3]) > max(a[1], b[1])

def test_names_at_points_do_not_overlap():
    from matplotlib.text import Text
    df = published("mcs")
    for dataset in ("mnist", "cifar10", "cifar100", "svhn"):
        fig = scatter(wide(df[(df["item"] == "table1") & (df.dataset == dataset)], by=["method", "kind"]), group="kind")
        fig.draw_without_rendering()
        b = [Text.get_window_extent(t).extents for t in fig.axes[0].texts]
        assert len(b) == 12
        assert not [1 for i in range(12) for j in range(i) if overlap(b[i], b[j])]

def test_saving_where_nothing_can_be_saved(tmp_path):
    t = wide(published("mcs").query("item == 'table1' and dataset == 'mnist'"))
    (tmp_path/"file").write_text("")
    with pytest.raises(Unwritable): save_table(t, tmp_path/"file", "t")
    with pytest.raises(Unwritable): save_figure(scatter(t), tmp_path/"file", "t")
    with pytest.raises(BadArgument, match="no column"): means(t, scores=["nothing"])
