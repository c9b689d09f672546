"""The import contracts name every file of the library that says it never imports torch."""

import ast
import fnmatch
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SAYS = "never imports torch"


def modules() -> dict[str, bool]:
    """Return every module of the library and whether it says that it never imports torch."""
    found = {}
    for path in (ROOT / "ctune").rglob("*.py"):
        code = path.read_text(encoding="utf-8")
        said = ast.get_docstring(ast.parse(code)) or ""
        parts = path.relative_to(ROOT).with_suffix("").parts
        if code.strip():
            name = ".".join(part for part in parts if part != "__init__")
            found[name] = SAYS in " ".join(said.split()).lower()
    return found


def contract(words: str) -> dict[str, Any]:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    return next(c for c in contracts if words in c["name"])


def named(patterns: list[str], module: str) -> bool:
    return any(fnmatch.fnmatch(module, p) or module.startswith(f"{p}.") for p in patterns)


def test_the_torch_contract_names_every_file_that_says_so() -> None:
    saying = [module for module, says in modules().items() if says]
    patterns = contract("files of the library marked *")["source_modules"]
    missing = [m for m in saying if not any(fnmatch.fnmatch(m, p) for p in patterns)]
    assert not missing, f"add to [tool.importlinter] in pyproject.toml: {sorted(missing)}"
    unsaid = [p for p in patterns if not fnmatch.filter(saying, p)]
    assert not unsaid, f"these do not say that they never import torch: {unsaid}"


def test_what_the_service_may_not_import_names_every_other_file() -> None:
    patterns = contract("only files of the library marked *")["forbidden_modules"]
    others = [module for module, says in modules().items() if not says]
    missing = [module for module in others if not named(patterns, module)]
    assert not missing, f"add to [tool.importlinter] in pyproject.toml: {sorted(missing)}"
