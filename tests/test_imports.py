"""Imports point downward: no module of the package reaches a layer above its own, and no modules import in a circle.

The graph is read from the sources, those inside functions included.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmcoconut"
# From the bottom to the top: sub-packages, and modules that stand directly in the package. The model files come before
# them all, train_hf after.
BASE = (
    "explanations",
    "errors",
    "addresses",
    "records",
    "statistics",
    "provenance",
    "tables",
    "progress",
    "auto_classes",
)
BASE += ("models", "build")
COMMANDS = ("launching", "ask", "publish", "serve", "convert_coconut", "convert_vlm", "prepare_flickr30k")
ABOVE = ("data", "objectives", "arguments", "hub", "training", "evaluation", "harnesses", "rl", "audit", "demo")
LAYERS = (("kernels",), BASE, *((name,) for name in ABOVE), COMMANDS)
SCRIPT = "train_hf"


def sources() -> dict[str, Path]:
    """Every module of the package, of the root and the script, by its name inside the package; "" is the package."""
    inside = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix("__init__").removesuffix("."): path for name, path in inside.items()}
    return modules | {path.stem: path for path in [*ROOT.glob("*_mmcoconut.py"), ROOT / f"{SCRIPT}.py"]}


SOURCES = sources()


def imported_names(node: ast.AST, module: str) -> list[str]:
    """Absolute names, such as mmcoconut.data.nearest, of what a statement imports; module is where it stands."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    package = ["mmcoconut", *module.split(".")][: -node.level] if node.level else []
    start = ".".join([*package, *filter(None, [node.module])])
    return [f"{start}.{alias.name}" for alias in node.names]


def imports_of(module: str, source: str) -> set[str]:
    """The modules of SOURCES that a source imports: of `from a import b` the module a.b where there is one, else a."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        for name in imported_names(node, module):
            inside = name.removeprefix("mmcoconut.")
            if name == "mmcoconut" or (inside == name and name.partition(".")[0] != SCRIPT):
                continue
            found.add(inside if inside in SOURCES else inside.rpartition(".")[0])
    return found - {"", module}


GRAPH = {module: imports_of(module, path.read_text(encoding="utf-8")) for module, path in SOURCES.items()}


def layer_of(module: str) -> int:
    """The number of a module's layer; the root's files have the lowest, the script the highest."""
    top = module.partition(".")[0]
    if top == "" or top.endswith("_mmcoconut"):
        return -1
    if top == SCRIPT:
        return len(LAYERS)
    return next(number for number, layer in enumerate(LAYERS) if top in layer)


def test_every_module_has_a_layer():
    tops = {module.partition(".")[0] for module in SOURCES}
    known = {"", SCRIPT, *(name for layer in LAYERS for name in layer)}
    assert not {top for top in tops - known if not top.endswith("_mmcoconut")}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_imports_point_downward(module):
    assert not {name for name in GRAPH[module] if layer_of(name) > layer_of(module)}


def test_no_modules_import_in_a_circle():
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


@pytest.mark.parametrize(
    "module, source, expected",
    [
        ("training.trainer", "def f():\n    from mmcoconut.evaluation import compare", {"evaluation.compare"}),
        ("data.public", "from mmcoconut.data import SPLITS, images", {"data", "data.images"}),
        ("modeling_mmcoconut", "from .thinking_mmcoconut import think", {"thinking_mmcoconut"}),
        ("records", "import mmcoconut, json, train_hf", {"train_hf"}),
    ],
)
def test_imports_are_read_from_sources(module, source, expected):
    assert imports_of(module, source) == expected
