"""nbs/index.ipynb as the README.md of the top folder, on standard output."""
import re
import sys
from pathlib import Path
import nbformat
from nbconvert import MarkdownExporter

index = nbformat.read(Path(__file__).parents[1] / "nbs" / "index.ipynb", 4)
index.metadata["language_info"] = {"name": "python"}
index.cells = [cell for cell in index.cells if not cell.source.startswith("#| hide")]     # what only tests need
for cell in index.cells:
    cell.source = cell.source.removeprefix("#| slow\n")                                   # for nbdev_test
    if cell.source.startswith("#| echo: false"): cell.metadata["transient"] = {"remove_source": True}                        # tables are shown, not how they are printed
text, _ = MarkdownExporter().from_notebook_node(index)
text = re.sub(r"\]\((?!\.\./|https?:|#)", "](nbs/", text).replace("](../", "](")          # links in the index start from nbs/
lines = [line.rstrip() for line in text.splitlines()]
sys.stdout.write("\n".join(lines).strip() + "\n")
