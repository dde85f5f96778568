"""What registries ask: a wheel that installs and runs, a small node pack, one version, links that lead somewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pages
import pytest

import agentsd
from agentsd.settings.presets import PRESETS

ROOT = Path(agentsd.__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]


def run(*command: str, **more: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **{"cwd": ROOT, **more})
    assert done.returncode == 0, done.stderr
    return done.stdout


def tracked(*options: str) -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    return set(run("git", "-c", "core.quotepath=off", "ls-files", *options).splitlines())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of a clean copy of the repository, made without a network."""
    pytest.importorskip("setuptools", minversion="70.1", reason="older ones need the wheel package")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        if name.startswith(("agentsd/", "pyproject.toml", "README.md", "LICENSE")) and (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out))
    run(sys.executable, "-m", "pip", "wheel", str(source), *options)
    (made,) = out.glob("*.whl")
    return made


class TestWheel:
    def test_it_has_what_the_package_needs(self, wheel):
        with zipfile.ZipFile(wheel) as file:
            names = set(file.namelist())
            metadata = file.read(f"agentsd-{agentsd.__version__}.dist-info/METADATA").decode()
        source = {name for name in tracked("agentsd") if not name.endswith(".md")}
        assert source <= names
        assert "agentsd/py.typed" in names
        assert {name.split("/")[0] for name in names} == {"agentsd", f"agentsd-{agentsd.__version__}.dist-info"}
        assert f"Version: {agentsd.__version__}" in metadata
        assert {"diffusers", "playground"} == set(re.findall(r"Provides-Extra: (\w+)", metadata))

    def test_it_runs_where_only_what_it_requires_is_installed(self, wheel, tmp_path):
        bare, scripts = tmp_path / "bare", "Scripts" if os.name == "nt" else "bin"
        venv.create(bare)
        (site,) = bare.rglob("site-packages")
        for found in required("torch", "einops"):
            for name in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
                (site / name).symlink_to(found.locate_file(name))
        python, command = (str(bare / scripts / name) for name in ("python", "agentsd"))
        options = ("--no-deps", "--no-index", "--no-compile", "--quiet", "--disable-pip-version-check")
        run(sys.executable, "-m", "pip", "--python", python, "install", *options, str(wheel))
        given = {"cwd": tmp_path, "env": {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}}
        assert run(python, "-c", "import agentsd; print(agentsd.__file__)", **given).startswith(str(site))
        assert run(command, "--version", **given) == f"agentsd {agentsd.__version__}\n"
        assert "playground" in run(command, "--help", **given)
        without = subprocess.run((command, "info"), capture_output=True, text=True, **given)
        told = "agentsd: error: info needs PIL: pip install 'agentsd[diffusers]' brings it"
        assert (without.returncode, without.stderr.splitlines()[-1]) == (1, told)


def required(*names: str) -> list[Distribution]:
    """Installed packages, and those that they require."""
    found: dict[str, Distribution] = {}
    wanted = list(names)
    for line in wanted:
        name = re.match(r"[\w.-]+", line)[0].lower()
        if name not in found:
            found[name] = distribution(name)
            wanted += [each for each in found[name].requires or () if ";" not in each]
    return list(found.values())


@pytest.fixture(scope="module")
def pack() -> set[str]:
    """What ComfyUI's registry takes: tracked files without those that .comfyignore names."""
    return tracked() - tracked("--cached", "--ignored", "--exclude-from=.comfyignore")


class TestNodePack:
    def test_it_is_small_and_whole(self, pack):
        assert sum((ROOT / name).stat().st_size for name in pack if (ROOT / name).exists()) < 1_000_000
        code = {name for name in tracked("agentsd") if name.endswith((".py", ".json")) and "weights" not in name}
        assert code | {"__init__.py", "pyproject.toml", "README.md", "LICENSE"} <= pack
        assert not [name for name in pack if name.startswith(("docs/", "tests/", "benchmarks/"))]

    def test_its_version_is_found_as_the_registry_looks_for_it(self):
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        path = re.search(r'\[tool\.comfy\.version\]\npath = "(.+)"', text)[1]
        found = re.findall(r"""^VERSION = ["']([^"'\\\n]*)["']""", (ROOT / path).read_text(), re.MULTILINE)
        assert found == [agentsd.__version__]

    def test_nothing_is_evaluated_or_installed_at_run_time(self):
        run(sys.executable, "-m", "ruff", "check", "agentsd", "__init__.py", "--select", "S102,S307,E702", "--quiet")


def test_the_version_stands_in_one_place():
    others = ("CHANGELOG.md", "README.md", "docs/", "tests/", "CONTRIBUTING.md", "agentsd/version.py")
    version = agentsd.__version__
    found = [name for name in tracked("*.py", "*.toml", "*.ini", "*.js") if not name.startswith(others)]
    assert not [name for name in found if f'"{version}"' in (ROOT / name).read_text(encoding="utf-8")]
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert first[1] == version


def test_pages_say_of_settings_and_commands_what_the_code_says():
    """`python tests/pages.py` writes them."""
    for page in pages.PAGES:
        assert (ROOT / page).read_text(encoding="utf-8") == pages.made(page)
    text = (ROOT / "docs/user.md").read_text(encoding="utf-8")
    assert not [name for name in PRESETS if f"| {name} |" not in text]


def headings(page: Path) -> set[str]:
    """The anchors of a page."""
    found = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in found}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http", "mailto")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in headings(file), target


def test_the_documentation_and_a_checkout_are_small():
    """The README has a hundred lines, and docs/ fits into an hour's reading."""
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 100
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in (ROOT / "docs").rglob("*.md")) <= 16_000
    large = ("agentsd/embedded/weights/", "tests/golden/")
    files = [ROOT / name for name in tracked() if not name.startswith(large)]
    assert sum(file.stat().st_size for file in files if file.exists()) < 4_000_000
