"""Break the core in thirty places, one at a time, and count how many of the breaks the tests notice.

    python tests/mutate.py                 each place, with the tests that guard it: some minutes
    python tests/mutate.py --root OTHER    the same places of another checkout, to compare
    python tests/mutate.py --list          only where they are

Not part of the test suite. Each break is made in a copy; the checkout itself is only read. Who moves a place's code
moves it here; the tests named are those that exist in either house of the comparison.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

# What stands there, what is put in its place, and the tests that guard it
PLACES = [
    ("image - overlap * other_image", "image + overlap * other_image", "fit"),
    ("p, image = p * length, image * length", "p, image = p * length, image", "fit"),
    ("r.cholesky_solve(factor)", "r.cholesky_solve(factor) * 1.01", "fit corrected"),
    ("return -(-length // side)", "return length // side", "plan corrected"),
    ("0.5 - 0.5 * math.log2(1 - agent_ratio)", "0.5 + 0.5 * math.log2(1 - agent_ratio)", "plan"),
    (".tokens > max_agents", ".tokens > 2 * max_agents", "plan"),
    ("(height // sy) * (width // sx)", "(height // sy) + (width // sx)", "plan golden"),
    ("rank + (n_dst - r)", "rank + (n_dst + r)", "merging golden"),
    ("(ends - self.starts).float()", "(ends + self.starts).float()", "merging golden"),
    ("height // sy * sy : sy", "height : sy", "merging patch_layers"),
    ("join_heads(out) + shortcut", "join_heads(out) - shortcut", "module"),
    ("dwc_kernel % 2 == 0", "dwc_kernel % 2 != 0", "module"),
    ("scale * q.shape[-1] ** 0.5", "scale / q.shape[-1] ** 0.5", "tensors kernels"),
    ("(rows * sy, columns * sx) == (height, width)", "(rows * sy, columns * sx) != (height, width)", "tensors"),
    ("4 * M * (plan.agents or M) * C", "2 * M * (plan.agents or M) * C", "costs"),
    ("24 * feed * C * C", "12 * feed * C * C", "costs"),
    ("config.min_tokens > N", "config.min_tokens >= N", "plan"),
    ("downsample > deepest", "downsample >= deepest", "plan"),
    ("max_agents is not None and wanted", "max_agents is not None or wanted", "plan"),
    ("cells(height, settings.sy) * cells(width, settings.sx)", "cells(height, settings.sy)", "plan costs"),
    ("self.since <= progress", "self.since < progress", "config timestep rules"),
    ("progress < self.until or self.until == 1.0", "progress < self.until", "config timestep rules"),
    ("(MAX_TIMESTEP - t) / MAX_TIMESTEP", "t / MAX_TIMESTEP", "moment rules_on_models"),
    ("if until < 1 else", "if until <= 1 else", "rules"),
    ("not isinstance(pattern, str) or not", "isinstance(pattern, str) and not", "rules config"),
    ("value is not x and value is not context", "value is not context", "foreign_calls hosts"),
    ("bisect_right(self._parts, progress) - 1", "bisect_right(self._parts, progress)", "patch_layers rules_on_models"),
    ("earlier + squares", "earlier - squares", "closeness"),
    ("[a / b if b else 0.0", "[a * b if b else 0.0", "tuning"),
    ("norm(out - self.full[number])", "norm(out + self.full[number])", "tuning"),
]


def find(root: Path, text: str) -> Path:
    """The one file of the package that has a text once."""
    files = [file for file in sorted((root / "agentsd").rglob("*.py")) if text in file.read_text(encoding="utf-8")]
    if len(files) != 1 or files[0].read_text(encoding="utf-8").count(text) != 1:
        raise SystemExit(f"{text!r} must stand in one place of {root}, found in {[str(file) for file in files]}")
    return files[0]


def noticed(copy: Path, text: str, broken: str, names: str) -> str:
    """The test of a copy that fails with the break; "" if none does."""
    target = find(copy, text)
    before = target.read_text(encoding="utf-8")
    target.write_text(before.replace(text, broken), encoding="utf-8")
    try:
        tests = [f"tests/test_{name}.py" for name in names.split() if (copy / f"tests/test_{name}.py").exists()]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
        run = subprocess.run(
            command, cwd=copy, capture_output=True, text=True, env=environment, timeout=600, check=False
        )
        failed = [line for line in run.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return failed[-1] if failed else f"exit {run.returncode}" if run.returncode else ""
    except subprocess.TimeoutExpired:
        return "it never ends"
    finally:
        target.write_text(before, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the checkout to break")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of places")
    parser.add_argument("--list", action="store_true", help="only list the places")
    arguments = parser.parse_args()
    root = arguments.root.resolve()
    chosen = [i - 1 for i in arguments.only or range(1, len(PLACES) + 1)]
    where = {i: find(root, PLACES[i][0]).relative_to(root) for i in chosen}
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "checkout"
        if not arguments.list:
            shutil.copytree(root, copy, ignore=shutil.ignore_patterns(".git", ".venv", "out", "docs"))
        for i in chosen:
            by = "" if arguments.list else noticed(copy, *PLACES[i])
            count += bool(by)
            print(f"{i + 1}. {where[i]}: {PLACES[i][0]} -> {PLACES[i][1]}: {by or '-'}", flush=True)
    print(f"{count} of {len(chosen)} breaks were noticed")


if __name__ == "__main__":
    main()
