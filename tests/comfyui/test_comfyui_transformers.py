"""The node on small transformers of random weights, in a real ComfyUI."""

from __future__ import annotations

import re

import numpy as np
import pytest
from servers import HostError
from test_comfyui import CHANGED, difference

SIZE = (384, 448)
CORRECTED = {"method": "corrected", "cells": "2×2, closest"}
LOUDER = ("Louder", {"keys": 0})


@pytest.fixture(scope="module", params=["Flux", "SD 3"])
def given(request):
    return {"layout": request.param, "size": SIZE, "cfg": 2.0}


def node(**inputs):
    return "AgentAttention", {**CORRECTED, "exact_ratio": 0.2, **inputs}


def test_the_node_acts_and_leaves_the_model_alone_and_is_chained_with_who_overrides_attention(comfyui, plain, given):
    full = plain(**given)
    (on, said), (closer, _) = (comfyui.ran(node(exact_ratio=ratio), **given) for ratio in (0.2, 0.45))
    assert np.array_equal(comfyui.ran(node(rules="full"), **given)[0], full)
    assert np.array_equal(comfyui.ran(**given)[0], full)
    assert 1e-5 < difference(closer, full) < difference(on, full) < 0.1, said
    assert re.fullmatch(r"Agent Attention, 24×28 tokens of the image: \d+ corrected\.", said)
    loud, _ = comfyui.ran(LOUDER, **given)
    both, said = comfyui.ran(LOUDER, node(), **given)
    assert difference(loud, full) > CHANGED
    assert difference(both, loud) > 1e-5
    assert difference(both, on) > CHANGED, "what is attended to in full is the neighbour's"
    assert "louder" in said


REFUSED = {("merge", "Flux"): "text stands beside the image", ("merge", "SD 3"): "text stands beside the image"}
REFUSED |= {("pool", "Flux"): "rotary positions"}  # keys without them may be pooled


@pytest.mark.parametrize("method", ["merge", "pool"])
def test_what_would_be_wrong_is_refused_by_name(comfyui, given, method):
    if words := REFUSED.get((method, given["layout"])):
        with pytest.raises(HostError, match=words):
            comfyui.ran(node(method=method), **given)
    else:
        comfyui.ran(node(method=method), **given)
