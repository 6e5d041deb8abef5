"""Find a user's verifier function without running any of its code."""

import ast
import difflib
import sys
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path

from tutelage.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundFunction:
    """Where a function is, and how a worker gets at it."""

    file: Path
    """Resolved: symbolic links are followed before it is held against the project's folder."""
    target: str
    """What the worker imports: `module:function` or `/absolute/path.py:function`."""
    sys_path: tuple[str, ...]
    """Where the worker looks for modules."""


def locate_function(function: str, root: Path, *, allow_outside: bool = False) -> FoundFunction:
    """Resolve `module:function` or `path.py:function`.

    Modules are looked for in `root`, in `root/src`, and then as Python would. Code below `root` may be run, except what
    was installed there (site-packages); any other code only with `allow_outside`.

    Raises:
        ConfigError: no such file, module or function, or code outside `root` that was not allowed.
    """
    source, colon, name = function.rpartition(":")
    if not colon or not source or not name.isidentifier():
        raise ConfigError(f'function must be "module:function" or "path.py:function", got {function!r}')
    paths = [str(root), str(root / "src"), *(p for p in sys.path if p)]
    file = _file_of(source, root) if source.endswith(".py") else _module_file(source, paths)
    if file is None or not file.is_file():
        raise ConfigError(f"function {function!r}: there is no {source!r} under {root} or on the module path")
    file = file.resolve()
    if not allow_outside and not _is_own(file, root.resolve()):
        raise ConfigError(
            f"function {function!r} would run code from outside the project: {file} is not in {root}. If you trust "
            "that file, set allow_code_outside: true in the verifier's settings (in Python, allow_outside_code=True)"
        )
    _check_function(file, name, function)
    target = f"{file}:{name}" if source.endswith(".py") else f"{source}:{name}"
    return FoundFunction(file=file, target=target, sys_path=tuple(paths))


def _file_of(source: str, root: Path) -> Path:
    path = Path(source).expanduser()
    return path if path.is_absolute() else root / path


def _module_file(module: str, paths: list[str]) -> Path | None:
    """The module's file. Walks the packages by their folders: importing `a` to find `a.b` would run `a`."""
    where: list[str] | None = paths
    origin = None
    for i in range(module.count(".") + 1):
        spec = PathFinder.find_spec(".".join(module.split(".")[: i + 1]), where)
        if spec is None:
            return None
        origin, where = spec.origin, list(spec.submodule_search_locations or [])
    return Path(origin) if origin and origin.endswith(".py") else None


def _is_own(file: Path, root: Path) -> bool:
    return file.is_relative_to(root) and not {"site-packages", "dist-packages"} & set(file.relative_to(root).parts)


def _check_function(file: Path, name: str, function: str) -> None:
    """The name must be bound at the module's top level; read from the source, which is not run."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError) as e:
        raise ConfigError(f"function {function!r}: {file} is no Python: {e}") from e
    bound = {n for node in tree.body for n in _bound_names(node)}
    if name not in bound and "*" not in bound:
        near = difflib.get_close_matches(name, bound, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ConfigError(f"function {function!r}: {file} defines no {name!r}{hint}")


def _bound_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [a.asname or a.name.split(".")[0] for a in node.names]
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, (ast.If, ast.Try, ast.With)):
        return [n for child in node.body for n in _bound_names(child)]
    return []
