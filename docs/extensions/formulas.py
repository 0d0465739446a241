"""Formulas are drawn while the site is built, by matplotlib, as outlines in the colour of the text.

So a page needs no script from elsewhere, reads without a network, and prints. Matplotlib knows the larger part of
TeX's mathematics, `SAID` says more of it in matplotlib's words; a formula that it cannot draw is a warning that
names it, which stops `make docs`."""
import re
from html import escape
from docutils import nodes
from matplotlib.font_manager import FontProperties
from matplotlib.path import Path
from matplotlib.textpath import TextToPath
from sphinx.util import logging

_log = logging.getLogger(__name__)
SAID = [(r"\\[bB]igg?(?![a-z])", ""), (r"\\tfrac", r"\\frac"), (r"\\le(?![a-z])", r"\\leq"),
        (r"\\ne(?![a-z])", r"\\neq"), (r"\\[lr]Vert", r"\\|"), (r"\\(mathcal|mathbb|sqrt) (\w)", r"\\\1{\2}"),
        (r"frac(\d)(\d)", r"frac{\1}{\2}"), (r"\s+", " ")]
LETTERS = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}


def drawn(formula):
    "A formula as SVG, as large as the text around it and on its line."
    for pattern, said in SAID: formula = re.sub(pattern, said, formula.strip())
    pen, font = TextToPath(), FontProperties(size=TextToPath.FONT_SCALE, math_fontfamily="cm")
    vertices, codes = pen.get_text_path(font, f"${formula}$", ismath=True)
    width, height, depth, *_ = pen.mathtext_parser.parse(f"${formula}$", pen.DPI, font)
    strokes = []
    for points, code in Path(vertices, codes).iter_segments(curves=True, simplify=False):
        numbers = "" if code == Path.CLOSEPOLY else " ".join(f"{number:.1f}" for number in points)
        strokes.append(LETTERS[code] + numbers)
    em, edge = pen.FONT_SCALE, 4                                             # the edge: ink that leaves its box
    tall, below = height + 2 * edge, depth + edge
    box = f"0 {-height - edge:.0f} {width:.0f} {tall:.0f}"
    size = f"width:{width / em:.3f}em;height:{tall / em:.3f}em;vertical-align:{-below / em:.3f}em"
    path = f'<path transform="translate(0 {-depth:.1f}) scale(1 -1)" d="{"".join(strokes)}"/>'
    return (f'<svg class="formula" role="img" viewBox="{box}" style="{size}">'
            f"<title>{escape(formula)}</title>{path}</svg>")


def _write(self, node, start, end, formula):
    try: picture = drawn(formula)
    except ValueError as error:
        _log.warning("cannot draw the formula %r: %s", node.astext(), error, location=node)
        picture = f"<code>{escape(node.astext())}</code>"
    self.body.append(start + picture + end)
    raise nodes.SkipNode


def inline(self, node): _write(self, node, "", "", node.astext())


def block(self, node):
    "On a line of its own fractions are large."
    _write(self, node, '<div class="formula">', "</div>\n", re.sub(r"\\frac", r"\\dfrac", node.astext()))


def setup(app):
    app.add_html_math_renderer("drawn", inline_renderers=(inline, None), block_renderers=(block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
