"""Compact signatures, equal for a function and its source: parameter names, `=` for optional ones, `async`.

(self, request, *, priority=)        async (self, request)
"""

import ast
import inspect

POSITIONAL, KEYWORD = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.KEYWORD_ONLY
LIST, DICT = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
PLAIN = inspect.Parameter.POSITIONAL_OR_KEYWORD


def of_function(function) -> str:
    """Signature of a function object, without wrappers."""
    function = inspect.unwrap(function)
    given = inspect.signature(function).parameters.values()
    parameters = [(p.kind, p.name, p.default is not p.empty) for p in given]
    return _words(parameters, inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function))


def of_definition(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Signature of a definition in a source file."""
    a = node.args
    plain: list[tuple] = [(POSITIONAL, arg) for arg in a.posonlyargs] + [(PLAIN, arg) for arg in a.args]
    first_default = len(plain) - len(a.defaults)
    parameters: list[tuple] = [(kind, arg.arg, i >= first_default) for i, (kind, arg) in enumerate(plain)]
    if a.vararg:
        parameters.append((LIST, a.vararg.arg, False))
    parameters += [
        (KEYWORD, arg.arg, default is not None) for arg, default in zip(a.kwonlyargs, a.kw_defaults, strict=True)
    ]
    if a.kwarg:
        parameters.append((DICT, a.kwarg.arg, False))
    return _words(parameters, isinstance(node, ast.AsyncFunctionDef))


def _words(parameters: list[tuple], awaited: bool) -> str:
    words = []
    kinds = [kind for kind, *_ in parameters]
    for i, (kind, name, optional) in enumerate(parameters):
        if kind is KEYWORD and not {LIST, KEYWORD} & set(kinds[:i]):
            words.append("*")
        words.append({LIST: "*", DICT: "**"}.get(kind, "") + name + "=" * optional)
        if kind is POSITIONAL and kinds[i + 1 : i + 2] != [POSITIONAL]:
            words.append("/")
    return f"{'async ' * awaited}({', '.join(words)})"


def source_of(root, module: str):
    """Path of a module of the package in `root`, a folder or a path in a wheel. Imports nothing."""
    *packages, last = module.split(".")[1:] or ["__init__"]
    folder = root.joinpath(*packages)
    package = folder / last / "__init__.py"
    return package if package.exists() else folder / f"{last}.py"


def in_source(root, owner: str, name: str) -> str | None:
    """The signature of a method of "module:Class" or a function of "module" in its source file; None: not found."""
    module, _, cls = owner.partition(":")
    path = source_of(root, module)
    if not path.exists():
        return None
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if cls:
        body = next((node.body for node in body if isinstance(node, ast.ClassDef) and node.name == cls), [])
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name == name:
            return of_definition(node)
    return None
