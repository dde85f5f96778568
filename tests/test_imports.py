"""What importing loads, what the package offers, and that its files depend on each other in one direction only."""

import ast
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

import agentsd

ROOT = Path(agentsd.__file__).parents[1]
FILES = sorted((ROOT / "agentsd").rglob("*.py"))


def in_a_process_of_its_own(code: str) -> None:
    """Run Python code with the repository in front of everything else."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


LIGHT = ["config", "costs", "attention.grid", "methods", "plan", "rules", "schedule"]
LIGHT += [f"settings.{name}" for name in ("infotext", "presets", "schema", "idle")]


class TestWhatIsLoaded:
    def test_settings_plans_and_costs_load_no_torch_and_work_without(self):
        heavy = {"numpy", "einops", "diffusers", "gradio", "PIL", "modules"}
        in_a_process_of_its_own(
            f"import sys; sys.modules['torch'] = None; import {', '.join(f'agentsd.{name}' for name in LIGHT)}\n"
            f"bad = {heavy} & {{name.split('.')[0] for name in sys.modules}}; assert not bad, bad\n"
            "from agentsd import AgentConfig, Rule, parse_rules, plan_layer\n"
            "from agentsd.costs import estimate, layouts\n"
            "from agentsd.methods import selectable\n"
            "from agentsd.settings import check, to_config\n"
            "from agentsd.settings.infotext import read, write\n"
            "rules = parse_rules('downsample=2 method=corrected')\n"
            "assert set(layouts()) == {'SD 1', 'SD 2', 'SDXL'}\n"
            "for method in selectable():\n"
            "    config = AgentConfig(method=method.name, max_downsample='auto', rules=rules)\n"
            "    plan = plan_layer(config, 64, 64, 1)\n"
            "    assert plan.acts and method.words(plan) and method.summary\n"
            "    method.caption(plan), method.marks(plan, 64, 64, [0])\n"
            "    assert 0 < estimate(layouts()['SD 1'], config, 64, 64).share < 1\n"
            "assert to_config(read(write(check({'enabled': True}))))\n"
        )

    def test_the_package_loads_no_compiler_and_no_host_beside_torch_and_changes_nothing_of_it(self):
        in_a_process_of_its_own(
            "import sys, torch; before, state = set(sys.modules), torch.get_rng_state(); import agentsd\n"
            "how = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()\n"
            "new = set(sys.modules) - before\n"
            "assert {name.split('.')[0] for name in new} == {'agentsd'}, new\n"
            "from agentsd import apply_patch, agent_attention, patch_unet, get_patch\n"
            "bad = {'einops', 'diffusers', 'gradio', 'modules', 'ldm', 'sgm', 'tomesd', 'torch._dynamo'}\n"
            "new = set(sys.modules) - before\n"
            "assert not bad & new, bad & new\n"
            "assert torch.equal(state, torch.get_rng_state())\n"
            "assert how == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())"
        )

    def test_patching_and_running_a_model_loads_no_compiler(self):
        pytest.importorskip("ldm", reason="needs stable-diffusion-sdkit")
        in_a_process_of_its_own(
            "import sys; sys.path.insert(0, 'tests')\n"
            "import torch, agentsd\n"
            "from blocks import inputs, one_block_unet, run\n"
            "unet, given = one_block_unet(), inputs(2, 16, 16)\n"
            "plain = run(unet, given)\n"
            "for kw in ({}, {'agent_source': 'grid'}, {'stages': agentsd.paper_stages()}, {'use_rand': False},\n"
            "           {'method': 'pool'}, {'method': 'merge'}, {'method': 'corrected', 'agent_ratio': 0.75}):\n"
            "    with agentsd.patched(unet, **kw):\n"
            "        assert not torch.equal(run(unet, given), plain)\n"
            "        assert not agentsd.get_patch(unet).notes\n"
            "assert torch.equal(run(unet, given), plain)\n"
            "assert 'torch._dynamo' not in sys.modules"
        )


class TestPublicNames:
    def test_each_from_a_process_that_has_imported_nothing_else(self):
        in_a_process_of_its_own(
            "import sys, agentsd; assert agentsd.__version__.count('.') == 2\n"
            "assert {name for name in sys.modules if name.startswith('agentsd')} == {'agentsd', 'agentsd.version'}\n"
            "assert agentsd.plan.plan_layer and agentsd.hosts.find_unet and agentsd.config.FIELDS  # submodules\n"
            "for name in agentsd.__all__:\n"
            "    for module in [m for m in sys.modules if m.startswith('agentsd.')]: del sys.modules[module]\n"
            "    vars(agentsd).pop(name, None)\n"
            "    assert getattr(agentsd, name).__class__ is not type(agentsd), name\n"
            "from agentsd import *\n"
            "assert all(globals()[name] is getattr(agentsd, name) for name in agentsd.__all__)"
        )

    def test_type_checkers_are_told_of_the_same_names(self):
        tree = ast.parse(Path(agentsd.__file__).read_text(encoding="utf-8"))
        (block,) = (node for node in tree.body if isinstance(node, ast.If))
        told = {alias.name: node.module for node in block.body for alias in node.names}
        assert sorted(told) == sorted(agentsd.__all__)
        assert set(told) <= set(dir(agentsd))
        for name, home in told.items():
            assert getattr(agentsd, name) is getattr(import_module(f"agentsd.{home}"), name)

    @pytest.mark.parametrize("name", ["nonsense", "_nonsense", "agent_atention"])
    def test_an_unknown_attribute_is_an_attribute_error(self, name):
        with pytest.raises(AttributeError, match=name):
            getattr(agentsd, name)


def _name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {_name(file): file for file in FILES}


def _nodes(tree: ast.AST):
    """All nodes that are ever run: not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from _nodes(node)


@cache
def nodes(file: Path) -> list[ast.AST]:
    return [*_nodes(ast.parse(file.read_text(encoding="utf-8")))]


def imports(file: Path) -> set[str]:
    """The full names of all modules that a file imports, anywhere in it."""
    package = _name(file).split(".")[: None if file.name == "__init__.py" else -1]
    found: set[str] = set()
    for node in nodes(file):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            home = ".".join([*base, *([node.module] if node.module else [])])
            # a name is a module of its own, or one of its home
            found |= {full if (full := f"{home}.{alias.name}") in MODULES else home for alias in node.names}
    return found


METHODS = tuple(name for name in MODULES if name.startswith("agentsd.methods.") and name != "agentsd.methods.base")
WEBUIS = ("modules", "modules_forge", "ldm_patched", "backend", "ldm", "sgm", "launch")
PAGES = ("agentsd.panel.", "agentsd.cli.playground", "agentsd.webui.compat.", "agentsd.webui.settings_page")
# Modules, or whole packages, and the beginnings of the names of those that alone may import them
USERS = {
    WEBUIS: ("agentsd.webui",),
    ("gradio",): PAGES,
    ("comfy",): ("agentsd.comfy.model", "agentsd.comfy.tuned"),
    ("agentsd.hosts.ldm", "agentsd.hosts.diffusers"): ("agentsd.hosts",),
    METHODS: ("agentsd.methods",),
}


class TestStructure:
    def test_no_files_import_each_other_in_a_circle(self):
        graph = {name: imports(file) & set(MODULES) for name, file in MODULES.items()}
        assert "agentsd.attention.tensors" in graph["agentsd.methods.pool"]  # inside a function
        assert "agentsd.attention.merging" not in graph["agentsd.methods.base"]  # for type checkers
        try:
            assert set(TopologicalSorter(graph).static_order()) == set(MODULES)
        except CycleError as error:
            pytest.fail(f"a circle of imports: {' → '.join(reversed(error.args[1]))}")

    @pytest.mark.parametrize("theirs", USERS, ids=lambda theirs: theirs[0])
    def test_only_the_rooms_that_may_import_it(self, theirs):
        asked = {name: imports(file) for name, file in MODULES.items()}
        found = [
            name for name in asked if {part for each in asked[name] for part in (each, each.split(".")[0])} & {*theirs}
        ]
        assert found or theirs is METHODS  # which their package lists
        assert not [name for name in found if not name.startswith(USERS[theirs])]

    def test_the_nodes_are_found_by_comfyui_alone(self):
        """The folder is a package for ComfyUI; the nodes load neither the host nor torch until a graph runs."""
        in_a_process_of_its_own(
            "import importlib.util, sys\n"
            "spec = importlib.util.spec_from_file_location('/a/pack', '__init__.py')\n"
            "module = importlib.util.module_from_spec(spec); sys.modules['/a/pack'] = module\n"
            "spec.loader.exec_module(module)\n"
            "assert set(module.NODE_CLASS_MAPPINGS) == set(module.NODE_DISPLAY_NAME_MAPPINGS)\n"
            "assert module.NODE_CLASS_MAPPINGS['AgentAttention'].INPUT_TYPES()\n"
            "bad = {'torch', 'comfy', 'gradio', 'agentsd'} & {name.split('.')[0] for name in sys.modules}\n"
            "assert not bad, bad"
        )

    def test_nothing_asks_which_method_it_is(self):
        """What differs between methods is theirs to say: nobody compares their names or actions."""
        asked = []
        for name, file in MODULES.items():
            for node in nodes(file) if not name.startswith("agentsd.methods") else ():
                sides = (node.left, *node.comparators) if isinstance(node, ast.Compare) else ()
                # whether it acts at all may be asked by anybody
                if any(map(_is_method, sides)) and not any("UNTOUCHED" in ast.dump(side) for side in sides):
                    asked.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
        assert not asked

    def test_rooms_import_only_rooms_below_them(self):
        """Arrows of imports point down `FLOORS`, or stay inside a room."""
        for name, file in MODULES.items():
            here, room = floor(name)
            for other in imports(file) & set(MODULES):
                there, other_room = floor(other)
                assert there < here or other_room == room, f"{name} imports {other}"


# The rooms of the house, from the ground up; those of one line do not import each other
FLOORS = (
    ("version", "words"),
    ("",),
    ("checks", "clock", "eager"),
    ("attention",),
    ("methods", "schedule"),
    ("config",),
    ("rules", "plan"),
    ("costs",),
    ("hosts",),
    ("patching",),
    ("tuning",),
    ("apply",),
    ("embedded", "settings"),
    ("app",),
    ("panel",),
    ("webui", "comfy", "cli"),
    ("__main__",),
)


def floor(name: str) -> tuple[int, str]:
    """Return the floor and the room of a module; the package itself, which imports lazily, has no name there."""
    room = name.split(".")[1] if "." in name else ""
    return next((number, room) for number, rooms in enumerate(FLOORS) if room in rooms)


def _is_method(node: ast.expr) -> bool:
    """Whether an expression is something's action or method, as a text to compare with."""
    if isinstance(node, ast.Subscript):
        return isinstance(node.slice, ast.Constant) and node.slice.value in ("action", "method")
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    return name in ("action", "method")
