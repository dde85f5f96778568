"""The script's guard against another extension's package of the same name, without a host."""

import runpy
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "agent_attention.py"


def test_another_packages_name_is_told_and_nothing_is_loaded(monkeypatch, tmp_path):
    theirs = ModuleType("agentsd")
    theirs.__file__ = str(tmp_path / "other-extension" / "agentsd" / "__init__.py")
    host = ModuleType("modules")
    for name in ("script_callbacks", "scripts", "shared"):
        setattr(host, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "agentsd", theirs)
    monkeypatch.setitem(sys.modules, "modules", host)
    with pytest.raises(ImportError, match="Disable that extension") as raised:
        runpy.run_path(str(SCRIPT), run_name="agent_attention.py")
    assert theirs.__file__ in str(raised.value)
