"""What is a page of the site, where it stands, and where a link of the repository leads on it."""
import ast
import configparser
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
SETTINGS = configparser.ConfigParser()
SETTINGS.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = SETTINGS["DEFAULT"]
ON_GITHUB = f"{SETTINGS['git_url']}/{{}}/{SETTINGS['branch']}/{{}}"         # blob, tree or edit; a path

# The wings in the order of their numbers: what they are called in the sidebar, and what is in them.
WINGS = {"ground": "Settings, files, intervals, data, networks, views, compressed sets, methods.",
         "covering": "Distances, set cover, k-center; certificates; what a cover guarantees.",
         "attacks": "Threats, PGD, Square, FAB, Carlini-Wagner, AutoAttack; evaluation until broken.",
         "certificates": "What can be proven of a network: bounds and smoothing.",
         "training": "Objectives (adversarial, TRADES, MART, curvature), the trainer, squeezes.",
         "evaluation": "Outcomes with intervals, comparison, doubts about a number, a proven floor.",
         "coresets": "Random, coverings, herding, scores, submodular, GradMatch.",
         "distill": "DM, ROME, C2R and NCFM, DC and DSA, TM and TESLA, DD, GUARD, MAT, SRe2L and CDA, FRePo, DiM.",
         "reproduce": "Cells, grids, tables and figures: how the papers' pages are run.",
         "sharing": "Scored rows, publishing, a leaderboard.",
         "command line": "rdd list, compress, show, score, attack, data, reproduce."}
# Of each paper: its name, what it is, and the page whose picture stands for it.
PAPERS = {"mcs": ("MCS", "Minimal coresets: Chen & Selvan, arXiv 2402.05675.", "fig2"),
          "guard_early": ("GUARD, first version", "The curvature penalty on DC: Xue et al., arXiv 2403.10045v1.",
                          "strength"),
          "guard": ("GUARD, final version", "The curvature penalty in a squeeze: Xue et al., arXiv 2403.10045.",
                    "attribution"),
          "mat": ("MAT", "Adversarial trajectories: Lai et al., arXiv 2503.12069.", "main"),
          "beyond": ("Beyond the papers", "All methods under one protocol, and what robust labels add.", "leaderboard")}
# The picture on top of a page, where it is not the first of those with its name.
ON_TOP = {"papers/guard_early/fig2": "fig2_cifar10_GUARD"}
# Notebooks without a number that have a place of their own, and the pages that are no notebook.
ALONE = {"nbs/index.ipynb": "learn/start", "nbs/results.ipynb": "results", "nbs/benchmarks.ipynb": "benchmarks",
         "nbs/99_face.ipynb": "learn/99_face"}
OTHERS = {"README.md": "learn/start", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog",
          "docs/own.md": "learn/own", "docs/clusters.md": "learn/clusters", "benchmarks/README.md": "benchmarks",
          "nbs/README.md": "learn/index", "nbs": "learn/index",
          "nbs/papers": "papers/index"} | {f"nbs/papers/{paper}": f"papers/{paper}/index" for paper in PAPERS}
# Notebooks that run on Colab once the library is installed: no data to fetch, a minute or two, something to see.
ON_COLAB = ("nbs/index.ipynb", "nbs/covering/17_k_center.ipynb", "nbs/attacks/23_pgd.ipynb",
            "nbs/training/47_trainer.ipynb", "nbs/evaluation/53_diagnostics.ipynb", "nbs/distill/71_distribution.ipynb")


@dataclass(frozen=True)
class Page:
    "A notebook on the site."
    source: str         # the notebook in nbs/, as a path in the repository
    doc: str            # its name on the site
    shown: str          # what is shown: the notebook itself, or the page that was made by running it
    profile: str = ""   # in which it was run

    @property
    def cells(self): return json.loads((ROOT / self.shown).read_text(encoding="utf-8"))["cells"]

    @property
    def opening(self):
        "Title and promise."
        told = ("".join(c["source"]) for c in self.cells if c["cell_type"] == "markdown")
        return re.match(r"# ([^\n]+)\n+> ([^\n]+)", next(told)).groups()

    @property
    def module(self):
        "What the notebook exports to, or None."
        found = re.match(r"#\| default_exp (\S+)", "".join(self.cells[0]["source"]))
        return found and found[1]

    @property
    def pictures(self):
        "The figures that were saved beside an executed page: its own, then those that go on with its name."
        if not self.profile: return []
        name, folder = Path(self.shown).stem, (ROOT / self.shown).parent
        names = {path.stem for path in folder.glob("*.ipynb")}
        more = [p for p in sorted(folder.glob(f"{name}_*.png")) if p.stem not in names]
        first = re.match(r"fig\d+(?=_to_)", name)                  # fig3_to_10 has fig3, fig4, ...
        own = [folder / f"{n}.png" for n in (ON_TOP.get(self.doc), name, first and first[0]) if n]
        return [p.relative_to(ROOT).as_posix() for p in own + more if p.exists()]


def wing_of(source):
    "Of a notebook of the library; None for stories, papers and what stands alone."
    folder, name = Path(source).parent.name, Path(source).name
    if folder == "nbs": return {"0": "ground", "9": "command line"}.get(name[0])
    return folder if folder in WINGS else None


def folder_of(wing): return wing.replace(" ", "_")


def _of_paper(source):
    "Its latest run at the largest size that is there."
    paper, name = Path(source).parts[-2:]
    for profile in ("paper", "cpu", "smoke"):
        shown = f"figures/{profile}/{paper}/{name}"
        if (ROOT / shown).exists(): return Page(source, f"papers/{paper}/{Path(name).stem}", shown, profile)
    return Page(source, f"papers/{paper}/{Path(name).stem}", source)


def _page(source):
    if source.startswith("nbs/papers/"): return _of_paper(source)
    doc = ALONE.get(source)
    if doc is None:
        doc = f"learn/{folder_of(wing_of(source) or Path(source).parent.name)}/{Path(source).stem}"
    return Page(source, doc, source)


def pages():
    "All notebooks, in the order of reading: 031 stands between 03 and 04."
    found = [p for p in (ROOT / "nbs").rglob("[!.]*.ipynb") if not p.parent.name.startswith(".")]
    found.sort(key=lambda p: (p.parent.as_posix(), p.stem.split("_")[0], p.stem))
    return [_page(p.relative_to(ROOT).as_posix()) for p in found]


def _source(module): return (ROOT / "rdd_lib" / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")


def _assigned(module):
    "Name, value and last line of what a module assigns, without importing it."
    for node in ast.parse(_source(module)).body:
        if not isinstance(node, ast.Assign): continue
        for target in node.targets:
            pairs = zip(target.elts, node.value.elts) if isinstance(target, ast.Tuple) else [(target, node.value)]
            for name, value in pairs: yield ast.unparse(name), value, node.end_lineno


def public(module):
    "The names a module shows."
    return next((ast.literal_eval(value) for name, value, _ in _assigned(module) if name == "__all__"), [])


def constants(module):
    "Public constants: name, value, and the comment behind them."
    lines, shown = _source(module).splitlines(), public(module)
    for name, value, last in _assigned(module):
        if name not in shown: continue
        comment = re.search(r"  # (?!noqa)(.*)$", lines[last - 1])
        yield name, ast.unparse(value), comment[1] if comment else ""


class Links:
    "Where links lead: to a page, to a picture that is copied, or to the repository on GitHub."
    def __init__(self, pages):
        self.docs = dict(OTHERS) | {p.source: p.doc for p in pages}
        self.suffix = {p.doc: ".ipynb" for p in pages}
        self.pictures, self.lost = set(), []
        for page in pages:
            if not page.source.startswith("nbs/papers/"): continue
            for path in ROOT.glob(f"figures/*/{page.source.removeprefix('nbs/papers/')}"):
                self.docs[path.relative_to(ROOT).as_posix()] = page.doc

    def to_doc(self, doc, of):
        "A link to a page, on the page `of`."
        return os.path.relpath(doc + self.suffix.get(doc, ".md"), Path(of).parent)

    def to_picture(self, path, of):
        self.pictures.add(path)
        return os.path.relpath(f"pictures/{path}", Path(of).parent)

    def turned(self, link, base, of):
        "A link of a file in the folder `base` of the repository, for the page `of`."
        if re.match(r"[a-z]+:", link): return link
        path, _, anchor = link.partition("#")
        anchor = re.sub(r"[^\w-]", "", anchor.lower())             # Jupyter's anchors keep case, those of pages do not
        if not path: return f"#{anchor}"
        there = os.path.normpath(Path(base) / path)
        if there in self.docs: return self.to_doc(self.docs[there], of) + (f"#{anchor}" if anchor else "")
        if not (ROOT / there).exists(): self.lost.append(f"{base}: {link}")
        if there.endswith((".png", ".jpg", ".svg")): return self.to_picture(there, of)
        return ON_GITHUB.format("tree" if (ROOT / there).is_dir() else "blob", there)

    def in_text(self, text, base, of):
        "A Markdown text with its links turned; code stays as it is."
        parts = re.split(r"(^```.*?^```|^    .*?$|`[^`\n]*`)", text, flags=re.S | re.M)
        link = re.compile(r"\]\(([^)\s]+)\)")
        # a link's text may hold code, which was split off: then the link begins the next part
        parts[::2] = [link.sub(lambda m: f"]({self.turned(m[1], base, of)})", part) for part in parts[::2]]
        return "".join(parts)
