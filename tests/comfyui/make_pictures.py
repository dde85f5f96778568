"""Load the API graphs of docs/comfyui in a running ComfyUI's page, and write their graphs for the page.

    python tests/comfyui/make_pictures.py http://127.0.0.1:8188 docs/comfyui

ComfyUI needs our nodes. Graphs named by --pictures are run in two steps, with whatever checkpoint has the name that
they give, and a picture is taken of them and their report.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from servers import chromium

# (left, top) of the nodes, by their ids
PLACES = {"1": (0, 40), "2": (0, 220), "3": (0, 400), "4": (0, 580), "5": (420, 40), "6": (800, 40)}
PLACES |= {"7": (1160, 40), "8": (1160, 150), "9": (800, 420), "10": (1160, 420)}
STEPS = "app.graph._nodes.find(n => n.type === 'KSampler').widgets.find(w => w.name === 'steps')"
SIZES = {"2": (380, 140), "3": (380, 140), "7": (240, 60), "8": (400, 180), "9": (300, 60), "10": (400, 200)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pictures", action="append", default=[], metavar="GRAPH")
    args = parser.parse_args()
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1700, "height": 860})
        page.goto(args.url, wait_until="domcontentloaded", timeout=120_000)
        page.wait_for_function("() => window.app?.graph && window.app?.extensionManager", timeout=120_000)
        page.wait_for_timeout(3000)
        page.evaluate("app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
        for source in sorted(args.folder.glob("*-api.json")):
            name = source.stem.removesuffix("-api")
            nodes = json.loads(source.read_text(encoding="utf-8"))
            page.evaluate(
                """async ([name, nodes, places, sizes]) => {
                    await app.loadApiJson(nodes, name);
                    for (const node of app.graph._nodes) {
                        if (places[node.id]) node.pos = places[node.id];
                        if (sizes[node.id]) node.setSize(sizes[node.id]);
                    }
                    app.graph._nodes.flatMap(n => n.widgets ?? []).filter(w => w.name === 'control_after_generate')
                        .forEach(w => { w.value = 'fixed'; });
                    app.canvas.ds.scale = 1.0;
                    app.canvas.ds.offset = [70, 60];
                    app.graph.setDirtyCanvas(true, true);
                }""",
                [name, nodes, PLACES, SIZES],
            )
            graph = page.evaluate("app.graph.serialize()")
            text = json.dumps(graph, indent=1, ensure_ascii=False) + "\n"
            (args.folder / f"{name}.json").write_text(text, encoding="utf-8")
            if name not in args.pictures:
                continue
            page.evaluate(f"{STEPS}.value = 2; app.queuePrompt(0)")
            page.wait_for_function(
                "() => app.graph._nodes.find(n => n.type === 'PreviewAny').widgets.some(w => w.value)",
                timeout=300_000,
            )
            page.wait_for_timeout(2000)
            page.screenshot(path=args.folder / f"{name}.png")


if __name__ == "__main__":
    main()
