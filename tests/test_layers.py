"""Lower layers never import higher ones, and neighbours never import each other (docs/architecture.md)."""

import ast
from pathlib import Path

import tutelage

LAYERS = [
    ["errors"],
    ["types"],
    ["numerics"],
    ["text"],
    ["data"],
    ["policies", "verifiers"],
    ["environments"],
    ["sources", "signals", "monitors"],
    ["train", "evals"],
    ["methods", "report"],
    ["claims"],
    ["serve", "ctf"],
    ["cli", "api"],
]
FREE = {"testing", "__init__", "__main__"}  # testing may import any; nothing of the library imports it


def violations(package: Path, layers: list[list[str]]) -> list[str]:
    height = {name: i for i, names in enumerate(layers) for name in names}
    found = []
    for path in sorted(package.rglob("*.py")):
        importer = path.relative_to(package).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
                names += [f"{node.module}.{a.name}" for a in node.names if node.module == package.name]
            elif isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            else:
                continue
            for name in names:
                parts = name.split(".")
                if parts[0] != package.name or len(parts) < 2 or parts[1] == importer or parts[1].startswith("__"):
                    continue
                if importer not in FREE and parts[1] == "testing":
                    found.append(f"{path.name}:{node.lineno}: {importer} may not import testing")
                elif importer in height and parts[1] in height and height[parts[1]] >= height[importer]:
                    found.append(f"{path.name}:{node.lineno}: {importer} may not import {parts[1]}")
                elif importer not in height and importer not in FREE:
                    found.append(f"{path.name}: {importer} is in no layer")
    return found


def test_dependencies_point_down():
    assert violations(Path(tutelage.__path__[0]), LAYERS) == []


def test_the_check_can_see_a_violation():
    upside_down = [LAYERS[0], ["cli"], *LAYERS[1:-1]]
    swapped = [["types"], ["errors"], *LAYERS[2:]]
    assert violations(Path(tutelage.__path__[0]), swapped) != []
    assert upside_down != LAYERS


def test_records_and_verifiers_never_import_torch():
    found = []
    for layer in ("errors.py", "types", "verifiers"):
        root = Path(tutelage.__path__[0]) / layer
        for path in [root] if root.is_file() else sorted(root.rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                found += [f"{path.name}:{node.lineno}" for n in names if n.split(".")[0] in ("torch", "transformers")]
    assert found == []
