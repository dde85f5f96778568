"""The graphs of docs/comfyui on the page of a real ComfyUI."""

from __future__ import annotations

import json

import pytest
from servers import REPOSITORY, chromium

FOLDER = REPOSITORY / "docs/comfyui"
GRAPHS = [file.name.replace("-api", "") for file in sorted(FOLDER.glob("*-api.json"))]
RED = "n => n.has_errors || !(n.type in LiteGraph.registered_node_types)"


@pytest.fixture(scope="module")
def page(comfyui):
    folder = comfyui.base / "models/checkpoints"  # newer pages mark a loader whose checkpoint is not there
    folder.mkdir(exist_ok=True)
    (folder / "v1-5-pruned-emaonly-fp16.safetensors").touch()
    with chromium() as browser:
        page = browser.new_page()
        page.goto(comfyui.url, wait_until="domcontentloaded", timeout=120_000)
        page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=120_000)
        page.wait_for_timeout(3000)
        yield page


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_opens_without_a_red_box_and_sends_what_its_graph_for_the_api_says(page, name):
    graph = json.loads((FOLDER / name).read_text(encoding="utf-8"))
    expected = json.loads((FOLDER / name.replace(".json", "-api.json")).read_text(encoding="utf-8"))
    page.evaluate("graph => app.loadGraphData(graph)", graph)
    page.wait_for_timeout(500)
    assert page.evaluate(f"app.graph._nodes.filter({RED}).map(n => n.type)") == []
    sent = page.evaluate("app.graphToPrompt().then(made => made.output)")
    assert {number: node["class_type"] for number, node in sent.items()} == {
        number: node["class_type"] for number, node in expected.items()
    }
    for number, node in expected.items():
        if node["class_type"].startswith("AgentAttention"):
            given = sent[number]["inputs"]
            assert {input: given[input] for input in node["inputs"]} == node["inputs"]
