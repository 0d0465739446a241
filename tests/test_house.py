"""The house: one notebook, one module, one number; imports go to smaller numbers; rooms are small; a light face."""
import ast
import json
import re
import subprocess
import sys
from pathlib import Path
import nbformat
import pytest
import rdd_lib

ROOT = Path(__file__).parents[1]
LIBRARY = [p for p in sorted((ROOT / "rdd_lib").rglob("*.py")) if p.name != "_modidx.py"]
WINGS = {"covering": 1, "attacks": 2, "certificates": 3, "training": 4, "evaluation": 5, "coresets": 6, "distill": 7,
         "reproduce": 8, "sharing": 9}
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").rglob("[!.]*.ipynb")) if not p.parent.name.startswith(".")]


def cells(path): return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell): return "".join(cell["source"])


def module_of(path):
    "What a notebook exports to, or None."
    found = re.match(r"#\| default_exp (\S+)", source(cells(path)[0]))
    return found and found[1]


def number(path):
    "Of a notebook; 231 stands between 23 and 24, where a wing is full."
    digits = re.match(r"\d+", path.name)[0]
    return float(f"{digits[:2]}.{digits[2:] or 0}")


NUMBERS = {module: number(path) for path in NOTEBOOKS if (module := module_of(path))}


def named(path):
    "rdd_lib/attacks/pgd.py as attacks.pgd."
    return ".".join(path.relative_to(ROOT / "rdd_lib").with_suffix("").parts)


def imported(path):
    "Every module of the library that one imports, within functions too."
    package = ["rdd_lib", *named(path).split(".")[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            whole = ".".join([*base, node.module or ""]).strip(".")
            names = [whole, *(f"{whole}.{alias.name}" for alias in node.names)]
        else: continue
        yield from {name.removeprefix("rdd_lib.") for name in names if name.startswith("rdd_lib.")} & {*NUMBERS}


@pytest.mark.parametrize("path", [p for p in LIBRARY if named(p) in NUMBERS], ids=named)
def test_imports_go_to_smaller_numbers(path):
    "So there are no circles, no wing imports from one above it, and the number is an order in which one can read."
    own = NUMBERS[named(path)]
    above = [f"{name} ({NUMBERS[name]})" for name in imported(path) if NUMBERS[name] >= own]
    assert not above, f"{named(path)} is {own}"


def test_notebook_module_and_number_agree():
    for path in NOTEBOOKS:
        module, folder = module_of(path), path.parent.name
        if module in (None, "__init__", "__main__"): continue
        assert path.stem.partition("_")[2] == module.rpartition(".")[2], f"{path.name} exports {module}"
        assert module.rpartition(".")[0] == ("" if folder == "nbs" else folder), f"{path} exports {module}"
        decade = WINGS.get(folder)
        assert path.name[0] in (str(decade) if decade else "09"), f"{path.name}: {folder}/ has {decade}0 to {decade}9"
    twice = [module for module, n in NUMBERS.items() if [*NUMBERS.values()].count(n) > 1]
    assert not twice, f"one number for several: {twice}; a wing that is full goes on with three digits, 231 after 23"


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_rooms_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 350, f"{named(path)} has {text.count(chr(10))} lines"
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in ast.walk(ast.parse(text))
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno >= 40]
    assert not long


@pytest.mark.parametrize("path", LIBRARY, ids=named)
def test_lines_have_at_most_120_columns(path):
    "But for `__all__`, which is generated; ruff, which measures the rest of the repository, cannot tell it apart."
    text = path.read_text(encoding="utf-8")
    generated = {n for node in ast.parse(text).body if ast.unparse(node).startswith("__all__ = ")
                 for n in range(node.lineno, node.end_lineno + 1)}
    assert not [line for n, line in enumerate(text.splitlines(), 1) if len(line) > 120 and n not in generated]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.relative_to(ROOT / "nbs").as_posix())
def test_notebooks_can_be_read_and_made_into_pages(path):
    "At most 80 cells, 200 kB; a title and a promise; a cell that imports only imports, for the site runs those alone."
    assert len(cells(path)) <= 80 and path.stat().st_size < 200_000
    nbformat.validate(json.loads(path.read_text(encoding="utf-8")))
    assert any(re.match(r"# [^\n]+\n+> ", source(c)) for c in cells(path)[:2]), "no title with a promise"
    for cell in cells(path):
        if cell["cell_type"] != "code" or source(cell).startswith(("#| export", "%")): continue
        tree = ast.parse(re.sub(r"(?m)^[%!].*$", "", source(cell)))
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not imports or len(imports) == len(tree.body), f"imports and other code in one cell:\n{source(cell)}"


def test_notebooks_keep_no_widgets():
    "Sliders and bars are dead without the kernel that made them: run with TQDM_DISABLE=1."
    kept = [path.name for path in NOTEBOOKS if "application/vnd.jupyter.widget" in path.read_text(encoding="utf-8")]
    assert not kept


def test_the_links_between_pages_lead_somewhere():
    link = re.compile(r"\]\((?!https?:)([^)\s#]+\.(?:ipynb|md|py|csv|png))")
    others = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "nbs/README.md")
    pages = [*NOTEBOOKS, *ROOT.glob("figures/*/*/*.ipynb"), *(ROOT / name for name in others)]
    lost = [f"{page.relative_to(ROOT)}: {place}" for page in pages
            for place in link.findall(page.read_text(encoding="utf-8")) if not (page.parent / place).exists()]
    assert not lost


def test_the_face_has_some_forty_names_and_loads_nothing_until_asked():
    asked = "import sys, rdd_lib; print(sorted(m for m in sys.modules if m.startswith(('torch', 'numpy', 'rdd_lib.'))))"
    assert subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True).stdout.strip() == "[]"
    assert 30 <= len(rdd_lib.__all__) < 50 and {*rdd_lib.__all__} <= {*dir(rdd_lib)}
    rooms = {p.relative_to(ROOT / "rdd_lib").parts[0].removesuffix(".py") for p in LIBRARY}
    assert not rooms & {*rdd_lib.__all__}, "a name of the face is hidden by a module that is called so"
    for name in rdd_lib.__all__:
        assert name == "__version__" or getattr(rdd_lib, name).__module__.startswith("rdd_lib."), name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"): rdd_lib.nothing
