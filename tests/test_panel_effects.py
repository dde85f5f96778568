"""Controls that have no effect beside the others are known, with the reason."""

from __future__ import annotations

import pytest
import torch
from blocks import golden_unet, inputs, run
from test_panel_preview import HERE, Host

from agentsd import patched
from agentsd.app.preview import preview
from agentsd.methods import method_named, selectable


@pytest.mark.parametrize("method", [one.name for one in selectable()])
def test_what_is_called_unused_changes_no_layer(method):
    """The output of every method stays the same whatever its unused settings are, and no other is called unused."""
    unet, fixed = golden_unet(), {"method": method, "ratio": 0.4 if method == "merge" else 0.0}
    others = {"k_scale2": 0.9, "k_shortcut": 0.5, "agent_source": "similarity", "agent_ratio": 0.8, "max_agents": 33}
    base = {"k_scale2": 0.3, "k_shortcut": 0.1, "agent_source": "grid", "agent_ratio": 0.95, "max_agents": 2048}
    others, base = {**others, "landmarks": "heavy"}, {**base, "landmarks": "sample"}

    def made(**changes):
        with patched(unet, **{**base, **fixed, **changes}):
            return run(unet, inputs(1, 64, 64))

    plain = made()
    same = {name for name, value in others.items() if torch.equal(made(**{name: value}), plain)}
    assert set(method_named(method).unused) == same


@pytest.mark.parametrize(
    ("values", "idle"),
    [
        ({"method": "corrected", "ratio": 0.4}, {"k_scale2", "k_shortcut", "agent_source", "ratio"}),
        ({"method": "corrected", "ratio": 0.4, "merge_mlp": True}, {"k_scale2", "k_shortcut", "agent_source"}),
        ({"method": "agent", "ratio": 0.4, "passes": "first"}, {"hires_until", "landmarks"}),
        ({"method": "agent", "passes": "hires"}, {"until", "landmarks", "merge_mlp", "merge_crossattn"}),
        ({"method": "corrected", "rules": "downsample=1 method=agent"}, set()),
    ],
)
def test_controls_without_effect_are_named_with_the_reason(values, idle):
    reasons = preview(values, [HERE], Host())["idle"]
    assert set(reasons) - {"merge_mlp", "merge_crossattn"} == idle - {"merge_mlp", "merge_crossattn"}
    assert all(reason.startswith("No effect") and reason.endswith(".") for reason in reasons.values())
