"""The import contracts name every file of the library that says it never imports torch."""

import ast
import fnmatch
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SAYS = "never imports torch"


def test_contract_names_every_file_that_says_so() -> None:
    saying = set()
    for path in (ROOT / "ctune").rglob("*.py"):
        said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        if SAYS in " ".join(said.split()).lower():
            parts = path.relative_to(ROOT).with_suffix("").parts
            saying.add(".".join(part for part in parts if part != "__init__"))
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = settings["tool"]["importlinter"]["contracts"]
    named = next(c for c in contracts if "marked *" in c["name"])["source_modules"]
    missing = [n for n in saying if not any(fnmatch.fnmatch(n, pattern) for pattern in named)]
    assert not missing, f"add to [tool.importlinter] in pyproject.toml: {sorted(missing)}"
    unsaid = [p for p in named if not fnmatch.filter(saying, p)]
    assert not unsaid, f"these do not say that they never import torch: {unsaid}"
