"""The order of the modules that docs/design.md promises."""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "dhlnn_jax"
DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def imported(module: Path) -> set[str]:
    """Modules of the package that a module imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dhlnn_jax":
            assert node.module is not None
            inner = node.module.split(".")[1:]
            found |= set(inner) if inner else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            assert not any(alias.name.startswith("dhlnn_jax") for alias in node.names)
    return found


def test_every_module_stands_in_the_order_once_and_imports_only_from_its_left():
    (block,) = re.findall(r"```\n(errors, .*?)```", DESIGN.read_text(), flags=re.DOTALL)
    groups = [re.findall(r"\w+", group) for group in re.split("[←|]", block)]
    place = {name: i for i, group in enumerate(groups) for name in group}
    modules = {path.stem: path for path in PACKAGE.glob("*.py") if path.stem != "__init__"}
    assert sum(len(group) for group in groups) == len(place)
    assert set(place) == set(modules)
    wrong = [
        (name, other)
        for name, path in modules.items()
        for other in imported(path)
        if place[other] >= place[name]
    ]
    assert not wrong
