"""Records the signatures of everything that this package uses of vLLM, in one file per supported version.

    python -m tools.vllm_signatures            # for the installed vLLM
    python -m tools.vllm_signatures FOLDER     # for a folder named vllm, or a wheel, which need not be installable here

Sources are parsed, not imported. tests/integration/test_signatures.py compares the files with the table of patches,
with each other and with the installed vLLM, so that every change in vLLM is noticed.
"""

import ast
import json
import os
import sys
import zipfile
from functools import cached_property
from pathlib import Path

from vllm_dlm.integration.overrides import ASKED, ASKED_OF_THE_RUNNER, BUILT_ON
from vllm_dlm.integration.patches import PATCHES, WRITES
from vllm_dlm.integration.signatures import of_definition, source_of

ROOT = Path(__file__).resolve().parent.parent
FILES = ROOT / "tests/integration/vllm_signatures"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Module:
    """Top-level names of one source file."""

    def __init__(self, package: "Package", name: str, text: str):
        self.package, self.name = package, name
        self.is_package = source_of(package.root, name).name == "__init__.py"
        self.tree = ast.parse(text)

    @cached_property
    def names(self) -> dict[str, ast.AST]:
        found: dict[str, ast.AST] = {}
        for node in _top_level(self.tree.body):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                found[node.name] = node
            elif isinstance(node, ast.ImportFrom):
                found |= {alias.asname or alias.name: node for alias in node.names}
            else:
                found |= {target.id: node for target in _targets(node) if isinstance(target, ast.Name)}
        return found

    def find(self, name: str) -> "Found | None":
        """Finds the definition of a name, following imports."""
        node = self.names.get(name)
        if node is None:
            stars = [node for node in self.tree.body if isinstance(node, ast.ImportFrom) and node.names[0].name == "*"]
            return next((found for star in stars if (found := self._find_in(star, name))), None)
        if isinstance(node, ast.ImportFrom):
            (original,) = [alias.name for alias in node.names if name == (alias.asname or alias.name)]
            return self._find_in(node, original)
        return self, node

    def _find_in(self, node: ast.ImportFrom, name: str) -> "Found | None":
        """Finds a name in the module that an import statement imports from."""
        module = node.module or ""
        if node.level:
            parts = self.name.split(".")
            base = parts[: len(parts) - node.level + self.is_package]
            module = ".".join([*base, *([module] if module else [])])
        return self.package.find(f"{module}:{name}")


Found = tuple[Module, ast.AST]


class Package:
    def __init__(self, root):
        self.root = root
        self.modules: dict[str, Module | None] = {}

    def module(self, name: str) -> Module | None:
        if name.split(".")[0] != self.root.name:
            return None
        if name not in self.modules:
            path = source_of(self.root, name)
            found = path.exists()
            self.modules[name] = Module(self, name, path.read_text(encoding="utf-8")) if found else None
        return self.modules[name]

    def find(self, path: str) -> Found | None:
        """Finds the definition of "module:name"."""
        module, _, name = path.partition(":")
        source = self.module(module)
        return None if source is None else source.find(name)

    def classes(self, path: str) -> list[ast.ClassDef]:
        """The class and its base classes within this package."""
        return self._classes(self.find(path))

    def _classes(self, found: Found | None) -> list[ast.ClassDef]:
        if found is None:
            return []
        module, node = found
        if not isinstance(node, ast.ClassDef):
            return []
        bases = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
        above = [self._classes(module.find(base.id)) for base in bases if isinstance(base, ast.Name)]
        return [node, *(cls for classes in above for cls in classes)]

    def members(self, path: str) -> dict[str, str]:
        """Methods with their signatures, and attributes, of a class and its base classes."""
        found: dict[str, str] = {}
        for cls in self.classes(path):
            found = members(cls) | found
        return found

    def described(self, path: str) -> str:
        found = self.find(path)
        if found is None:
            return "a module" if self.module(path.replace(":", ".")) else "not there"
        node = found[1]
        if isinstance(node, FUNCTIONS):
            return of_definition(node)
        if not isinstance(node, ast.ClassDef):
            return "a name"
        own = self.members(path)
        return f"class {own['__init__']}" if "__init__" in own else f"class of {', '.join(fields(node)) or 'nothing'}"


def _top_level(body):
    """Top-level statements of a module, including those within `if` and `try`."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody", "handlers"):
            if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
                yield from _top_level(getattr(node, part, []))


def _targets(node) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [part for target in node.targets for part in getattr(target, "elts", [target])]
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def members(cls: ast.ClassDef) -> dict[str, str]:
    found = {}
    for node in ast.walk(cls):
        for target in _targets(node):
            if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self":
                found[target.attr] = "an attribute"
    for node in cls.body:
        found |= {target.id: "an attribute" for target in _targets(node) if isinstance(target, ast.Name)}
        if isinstance(node, FUNCTIONS):
            decorators = {getattr(decorator, "id", "") for decorator in node.decorator_list}
            found[node.name] = "an attribute" if decorators & {"property", "cached_property"} else of_definition(node)
    return found


def fields(cls: ast.ClassDef) -> list[str]:
    """Fields of a dataclass or an enumeration; "=" marks those with a default."""
    found = []
    for node in cls.body:
        optional = isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None
        found += [target.id + "=" * optional for target in _targets(node) if isinstance(target, ast.Name)]
    return found


def asked_of_self(cls: ast.ClassDef) -> set[str]:
    """Names that a class reads from `self` or `super()`."""
    found = set()
    for node in ast.walk(cls):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            of = node.value.func if isinstance(node.value, ast.Call) else node.value
            if isinstance(of, ast.Name) and of.id in ("self", "super"):
                found.add(node.attr)
    return found


def imported_names(package: Package) -> set[str]:
    """Everything that is imported from vLLM, anywhere in a file, as "module:name"."""
    found = set()
    sources = (Path(folder, name) for folder, _, names in os.walk(package.root, followlinks=True) for name in names)
    for path in sorted(path for path in sources if path.suffix == ".py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found |= {f"{node.module}:{alias.name}" for alias in node.names}
    return found


def facts(root) -> dict[str, str]:
    """place -> signature or kind of what the vLLM in `root` has there"""
    ours, theirs = Package(ROOT / "vllm_dlm"), Package(root)
    found = {path: theirs.described(path) for path in imported_names(ours)}
    for patch in PATCHES:
        of_module = ":" not in patch.owner
        there = theirs.described(f"{patch.owner}:{patch.name}") if of_module else theirs.members(patch.owner)
        found[f"{patch.owner}.{patch.name}"] = there if isinstance(there, str) else there.get(patch.name, "not there")
    for own, base in BUILT_ON:
        inherited = theirs.members(base)
        named = ours.members(own).keys() | {name for cls in ours.classes(own) for name in asked_of_self(cls)}
        found |= {f"{base}.{name}": inherited[name] for name in named & inherited.keys()}
    for write in WRITES:
        for name in write.names:
            in_module = theirs.described(f"{write.owner}:{name}") if ":" not in write.owner else ""
            found[f"{write.owner}.{name}"] = in_module or theirs.members(write.owner).get(name, "not there")
    for owner, names in ASKED.items():
        found |= {f"{owner}.{name}": theirs.members(owner).get(name, "not there") for name in names}
    attribute, workers = ASKED_OF_THE_RUNNER
    for worker in workers:
        asked = {name for cls in theirs.classes(worker) for name in _asked_of(cls, attribute)}
        found[f"{worker} asks its {attribute} for"] = ", ".join(sorted(asked))
    return dict(sorted(found.items()))


def _asked_of(cls: ast.ClassDef, attribute: str) -> set[str]:
    return {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == attribute
    }


def version_of(root) -> str:
    for node in ast.parse((root / "_version.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and "__version__" in [getattr(target, "id", "") for target in node.targets]:
            return ast.literal_eval(node.value)
    raise ValueError(f"{root}: no __version__ in _version.py")


def installed() -> Path:
    import vllm

    return Path(vllm.__file__).parent


def main() -> None:
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else installed()
    root = zipfile.Path(given) / "vllm" if given.suffix == ".whl" else given
    path = FILES / f"{version_of(root)}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts(root), indent=1) + "\n")
    print(f"{path.relative_to(ROOT)}: {len(json.loads(path.read_text()))} facts")


if __name__ == "__main__":
    main()
