"""nbdev's docments for autodoc: the comment in `x: int,  # what it is` becomes the documentation of x.

Of functions and methods it is that of their parameters and of what they return, of dataclasses that of their fields."""
import dataclasses
import inspect
import re
from fastcore.docments import docments


def as_rst(text):
    "Markdown's `code` is reStructuredText's ``code``; a star is a star."
    def code(found): return f"``{found[1]}``" + (rf"\ {found[2]}" if found[2] else "")          # `Part`s
    text = re.sub(r"(?<![`\\:])`((?:(?!\n\n)[^`])+)`(?![`_])(\w)?", code, text)
    parts = re.split(r"(``.*?``)", text, flags=re.S)
    parts[::2] = [re.sub(r"(?<!\\)([*|])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def comments(obj):
    "Parameter -> its comment."
    if hasattr(obj, "_fields"):                                    # of named tuples docments does not know
        return dict(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(obj), re.M))
    try: told = docments(obj)
    except (OSError, TypeError, ValueError, SyntaxError): return {}        # no source: what is made at run time
    return {name: " ".join(text.split()) for name, text in told.items() if text}


def fields(what, obj):
    "What is documented of an object."
    if what == "class" and not (dataclasses.is_dataclass(obj) or hasattr(obj, "_fields")):
        obj = vars(obj).get("__init__")
    if obj is None or isinstance(obj, property): return {}
    told = comments(obj)
    try: own = {*inspect.signature(obj).parameters, "return"}
    except (TypeError, ValueError): return {}
    return {name: text for name, text in told.items() if name in own}


def document(app, what, name, obj, options, lines):
    lines[:] = as_rst("\n".join(lines)).split("\n")
    if what not in ("function", "method", "class"): return
    bases = [b for b in getattr(obj, "__bases__", ()) if b.__module__.startswith("rdd_lib.")]
    if bases: lines += ["", "Is a " + ", ".join(f":py:class:`~{b.__module__}.{b.__qualname__}`" for b in bases) + "."]
    told = fields(what, obj)
    returned = told.pop("return", None)
    rows = [f":param {param}: {as_rst(text)}" for param, text in told.items()]
    if returned: rows.append(f":returns: {as_rst(returned)}")
    if rows: lines += ["", *rows, ""]


def shorten(app, what, name, obj, options, signature, returned):
    "Commands of the shell are no functions to call: their parameters are told by `rdd COMMAND --help`."
    return ("()", None) if signature and "typer." in signature else None


def show(app, what, name, obj, skip, options):
    "A public function or class is shown, even if its name has to say it all; a named tuple's fields are parameters."
    if type(obj).__name__ == "_tuplegetter": return True
    if what == "module" and callable(obj) and not name.startswith("_"): return False


def setup(app):
    app.connect("autodoc-skip-member", show)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-process-docstring", document)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
