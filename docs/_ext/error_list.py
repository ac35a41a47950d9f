"""Every error that the library raises, read from its source: the table of docs/errors.md.

For each ``raise`` of an error of this library the message is put together as far as the source tells it: constants and
the functions that build messages are followed, and what is only known when it happens is left as a placeholder.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Entry", "page", "read_errors"]

# A sentence that begins so tells what to do; what stands before it tells what was wrong.
_REMEDY = re.compile(
    "(add|check|choose|convert|delete|did|fetch|free|freeze|get|give|install|it|leave|let|load|make|mend|move|name|pad|put|"
    r"remove|replace|reshape|run|save|see|set|try|turn|undo|update|use|without|wrap|write)\b",
    re.IGNORECASE,
)
_HINTS = ("‹hint›", "‹nearest›", "‹remedy›")  # put together when it happens


@dataclass(frozen=True)
class Entry:
    """One ``raise``: its public kind, its message with placeholders as ``‹name›``, and where it stands."""

    kind: str
    message: str
    path: Path
    line: int

    def parts(self) -> tuple[str, str]:
        """Split the message into what was wrong and what to do about it; the latter may be empty."""
        sentences = re.split(
            r"(?<=[.?!]) ?(?=[A-Z‹-])|(?<=;) (?=(?:name|try|put|reshape|leave) )|(?<=›) (?=Name )", self.message
        )
        first = next((n for n, text in enumerate(sentences) if n and _is_remedy(text)), len(sentences))
        return " ".join(sentences[:first]), " ".join(sentences[first:])


@dataclass
class _Source:
    """The package as syntax trees, with what messages are made of."""

    trees: dict[Path, ast.Module]
    kinds: dict[str, str] = field(default_factory=dict)  # every class of error, and the public class it is shown as
    notes: dict[str, list[str]] = field(default_factory=dict)  # the paragraphs of the public classes' docstrings
    functions: dict[tuple[Path, str], ast.FunctionDef] = field(default_factory=dict)
    methods: dict[tuple[str, str], tuple[Path, ast.FunctionDef]] = field(default_factory=dict)
    texts: dict[tuple[Path, str], ast.expr] = field(default_factory=dict)  # module-level constants

    def find(self, path: Path, name: str) -> tuple[Path, ast.FunctionDef] | None:
        """Return the function of that name: the module's own, else the one of the package."""
        if (path, name) in self.functions:
            return path, self.functions[path, name]
        return next(((there, node) for (there, known), node in self.functions.items() if known == name), None)


@dataclass(frozen=True)
class _Scope:
    """Where an expression stands: its module, and the expressions that stand for the function's parameters."""

    path: Path
    arguments: Mapping[str, tuple[ast.expr, "_Scope"]]


def read_errors(package: Path) -> tuple[list[Entry], dict[str, list[str]]]:
    """Return an entry for each raise of a library's error, and the paragraphs of each kind's docstring."""
    source = _read(package)
    entries = []
    for path, tree in source.trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and node.exc is not None:
                found = _error(node.exc, _Scope(path, {}), source)
                if found is not None:
                    entries.append(Entry(*found, path.relative_to(package), node.lineno))
    return entries, source.notes


def page(package: Path) -> str:
    """Return the tables as Markdown, one a kind; messages that differ in nothing are one row."""
    entries, notes = read_errors(package)
    return "\n".join(line for kind in notes for line in _section(kind, notes[kind], entries))


def _section(kind: str, notes: list[str], entries: list[Entry]) -> Iterator[str]:
    mine = sorted((entry for entry in entries if entry.kind == kind), key=lambda entry: _plain(entry.message))
    places: dict[tuple[str, str], list[str]] = {}
    for entry in mine:
        modules = places.setdefault(entry.parts(), [])
        module = ".".join(entry.path.with_suffix("").parts).removesuffix(".__init__")
        if module not in modules:
            modules.append(module)
    if not mine:
        return
    yield f"## {kind}\n\n{notes[0]} {{py:class}}`Reference <retrainscope.exceptions.{kind}>`.\n"
    yield "```{rst-class} errors\n```\n\n| what was wrong | what to do | raised in |\n| --- | --- | --- |"
    for (cause, remedy), modules in places.items():
        known = remedy if remedy and remedy not in _HINTS else f"{remedy} {notes[1]}".strip()
        yield f"| {_marked(cause)} | {_marked(known)} | {', '.join(f'`{name}`' for name in modules)} |"
    yield ""


def _read(package: Path) -> _Source:
    source = _Source({path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))})
    for node in source.trees[package / "exceptions.py"].body:
        if isinstance(node, ast.ClassDef):
            source.kinds[node.name] = node.name
            text = (ast.get_docstring(node) or "").partition("\nExamples\n")[0]
            source.notes[node.name] = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
    for path, tree in source.trees.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                source.functions[path, node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                source.texts[path, node.targets[0].id] = node.value
            elif isinstance(node, ast.ClassDef):
                for base in node.bases:
                    if isinstance(base, ast.Name) and base.id in source.kinds:
                        source.kinds.setdefault(node.name, source.kinds[base.id])
                for method in node.body:
                    if isinstance(method, ast.FunctionDef):
                        source.methods[node.name, method.name] = path, method
    return source


def _error(made: ast.expr, scope: _Scope, source: _Source) -> tuple[str, str] | None:
    """Return kind and message of an expression that makes an error; None if it is none of the library's."""
    if isinstance(made, ast.Name) and made.id in scope.arguments:
        return _error(*scope.arguments[made.id], source)
    if not isinstance(made, ast.Call):
        return None
    called = made.func
    if isinstance(called, ast.BoolOp):  # the kind that another process raised, or the base class
        called = called.values[-1]
    if isinstance(called, ast.Name) and called.id in source.kinds:
        return source.kinds[called.id], _text(made.args[0], scope, source)
    if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name) and called.value.id in source.kinds:
        path, method = source.methods[called.value.id, called.attr]
        built = _result(method)
        assert isinstance(built, ast.Call)
        inner = _scope_of(path, method, made, scope, skip=1)
        return source.kinds[called.value.id], _text(built.args[0], inner, source)
    if isinstance(called, ast.Name) and (found := source.find(scope.path, called.id)):
        path, function = found
        return _error(_result(function), _scope_of(path, function, made, scope), source)
    return None


def _text(expression: ast.expr, scope: _Scope, source: _Source) -> str:
    """Return the text of an expression, with a placeholder for what the source does not tell."""
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Add):
        return _text(expression.left, scope, source) + _text(expression.right, scope, source)
    if isinstance(expression, ast.Constant):
        return str(expression.value)
    if isinstance(expression, ast.JoinedStr):
        return "".join(_text(part, scope, source) for part in expression.values)
    if isinstance(expression, ast.FormattedValue):
        text = _text(expression.value, scope, source)
        return repr(text) if expression.conversion == ord("r") and not text.startswith("‹") else text
    if isinstance(expression, ast.Name):
        if expression.id in scope.arguments:
            return _text(*scope.arguments[expression.id], source)
        known = source.texts.get((scope.path, expression.id))
        is_text = isinstance(known, ast.JoinedStr | ast.Constant | ast.BinOp)
        return _text(known, scope, source) if is_text else f"‹{expression.id.strip('_').lower()}›"
    if isinstance(expression, ast.Call) and isinstance(expression.func, ast.Name):
        found = source.find(scope.path, expression.func.id)
        if found and isinstance(_result(found[1]), ast.JoinedStr):
            return _text(_result(found[1]), _scope_of(*found, expression, scope), source)
    return f"‹{_name(expression)}›"


def _name(expression: ast.expr) -> str:
    """Name what stands for a value: the name that is nearest to it in its expression."""
    match expression:
        case ast.Attribute(value=ast.Call(func=ast.Name(id="type"), args=[inner]), attr="__name__"):
            return f"type of {_name(inner)}"
        case ast.Attribute(attr=attr):
            return attr.strip("_")
        case ast.Name(id=name):
            return name.strip("_").lower()
        case ast.Call(func=ast.Attribute(attr="join"), args=[inner]):
            return _name(inner)
        case ast.Call(func=ast.Name(id="map"), args=[_, inner]):
            return _name(inner)
        case ast.Call(func=ast.Name(id="len"), args=[inner]):
            return f"number of {_name(inner)}"
        case ast.Call(func=ast.Name(id="reason_of" | "_text_of")):
            return "reason"
        case ast.Call(args=[inner, *_]):
            return _name(inner)
        case ast.Call(func=inner) | ast.Subscript(value=inner) | ast.Starred(value=inner):
            return _name(inner)
        case ast.GeneratorExp(generators=[first, *_]) | ast.ListComp(generators=[first, *_]):
            return _name(first.iter)
        case _:
            return "…"


def _scope_of(path: Path, function: ast.FunctionDef, call: ast.Call, scope: _Scope, *, skip: int = 0) -> _Scope:
    """Return the scope inside a function that is called so; `skip` leaves out ``cls``."""
    names = [argument.arg for argument in function.args.args][skip:]
    given = dict(zip(names, call.args, strict=False))
    given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
    arguments = {name: (value, scope) for name, value in given.items()}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        if default is not None:
            arguments.setdefault(argument.arg, (default, scope))
    return _Scope(path, arguments)


def _result(function: ast.FunctionDef) -> ast.expr:
    """Return what a function returns at its end."""
    last = function.body[-1]
    return last.value if isinstance(last, ast.Return) and last.value is not None else ast.Constant("")


def _is_remedy(sentence: str) -> bool:
    return bool(_REMEDY.match(sentence)) or sentence in _HINTS


def _plain(text: str) -> str:
    return re.sub(r"[^a-z ]", "", text.lower())


def _marked(text: str) -> str:
    """Write text as Markdown: nothing in it is markup, but placeholders are in italics."""
    escaped = re.sub(r"([\\`*_{}\[\]<>()#+.!|$'\"~^-])", r"\\\1", text)
    return re.sub("‹(.*?)›", r"*\1*", escaped).replace("\n", " ").strip()
