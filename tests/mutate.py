"""Break the core in many places, one at a time, and count how many of the breaks the tests notice.

    python tests/mutate.py                  thirty breaks of this checkout
    python tests/mutate.py --root OTHER     the same rules on another checkout, to compare
    python tests/mutate.py --files 8        only the test files that name the broken module most often

Not part of the test suite: it takes an hour, or with --files some minutes. The places are drawn by a hash of the broken
expression, so that what two checkouts share is drawn in both. Each break is made in a copy; the checkout itself is only
read.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

# What computes images or decides about them; the panel, hosts' user interfaces and the command line are left out
SKIPPED = ("app", "panel", "webui", "comfy", "cli", "embedded", "__pycache__")
# Tests of what is left out, and those that take long
UNRELATED = ("test_webui", "test_panel", "test_cli", "test_bench", "test_playground", "test_javascript", "test_comfy")
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
    ast.MatMult: ast.Sub,
}


@dataclass(frozen=True)
class Break:
    """One broken place: the file, its line, what stood there, and the whole file with the break."""

    path: Path
    line: int
    was: str
    now: str
    text: str


def breaks_of(path: Path, root: Path) -> Iterator[Break]:
    """Yield a break for each operator, comparison, condition and number of a file."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        new = _broken(node)
        if new is None or node.lineno != node.end_lineno:
            continue
        line = lines[node.lineno - 1].encode()
        was = line[node.col_offset : node.end_col_offset].decode()
        now = line[: node.col_offset] + f"({new})".encode() + line[node.end_col_offset :]
        text = "".join([*lines[: node.lineno - 1], now.decode(), *lines[node.lineno :]])
        yield Break(path.relative_to(root), node.lineno, was, new, text)


def _broken(node: ast.AST) -> str | None:
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
        other = ast.Compare(node.left, [COMPARISONS[type(node.ops[0])](), *node.ops[1:]], node.comparators)
        return ast.unparse(other)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return ast.unparse(ast.BinOp(node.left, OPERATORS[type(node.op)](), node.right))
    if isinstance(node, ast.BoolOp):
        return ast.unparse(ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return ast.unparse(node.operand)
    return None


def drawn(root: Path, count: int) -> list[Break]:
    """Draw `count` breaks, at most one a function of a statement, by a hash of the broken expression."""
    files = (f for f in sorted((root / "agentsd").rglob("*.py")) if not set(f.relative_to(root).parts) & set(SKIPPED))
    every = [broken for file in files for broken in breaks_of(file, root) if "__future__" not in broken.was]
    return sorted(every, key=lambda b: hashlib.sha256(b.was.encode()).digest())[:count]


def tests_for(copy: Path, broken: Break, most: int | None) -> list[str]:
    """List the test files, at most so many, those first that name the broken module, then its room, most often."""
    files = [f for f in sorted((copy / "tests").glob("test_*.py")) if not f.name.startswith(UNRELATED)]
    room = broken.path.parent.name
    stem = broken.path.stem if broken.path.stem != "__init__" else room

    def rank(file: Path) -> tuple[bool, int, bool, int]:
        text = file.read_text(encoding="utf-8")
        return stem not in file.name, -text.count(stem), room not in file.name, -text.count(room)

    files.sort(key=rank)
    return [str(f.relative_to(copy)) for f in files[:most]]


def noticed(copy: Path, broken: Break, most: int | None = None) -> bool:
    """Run the tests of a copy with the break until one of them fails."""
    target = copy / broken.path
    before = target.read_text(encoding="utf-8")
    target.write_text(broken.text, encoding="utf-8")
    try:
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests_for(copy, broken, most)]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(command, cwd=copy, capture_output=True, env=environment, timeout=1200, check=False)
        return run.returncode != 0
    except subprocess.TimeoutExpired:
        return True  # it never ends: nobody would miss that
    finally:
        target.write_text(before, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to break")
    parser.add_argument("--count", type=int, default=30, help="number of breaks")
    parser.add_argument("--files", type=int, help="number of test files to run for each break (all)")
    parser.add_argument("--list", action="store_true", help="only list the places")
    arguments = parser.parse_args()
    chosen = drawn(arguments.root.resolve(), arguments.count)
    if arguments.list:
        print(*(f"{b.path}:{b.line}: {b.was} -> {b.now}" for b in chosen), sep="\n")
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        shutil.copytree(arguments.root, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "docs"))
        for broken in tqdm(chosen, unit="break"):
            found[f"{broken.path}:{broken.line}: {broken.was} -> {broken.now}"] = noticed(copy, broken, arguments.files)
    print(json.dumps(found, indent=1, ensure_ascii=False))
    print(f"{sum(found.values())} of {len(found)} breaks were noticed")


if __name__ == "__main__":
    main()
