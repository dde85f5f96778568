"""Agent Attention in the WebUI: callbacks only; agentsd.webui does the work."""

from pathlib import Path

from modules import script_callbacks, scripts, shared

import agentsd

# Check that agentsd is this extension's: the host has its folder on sys.path only while importing this file
if Path(agentsd.__file__).resolve().parents[1] != Path(__file__).resolve().parents[1]:
    raise ImportError(
        f"Agent Attention can't start: another extension's package of the same name, {agentsd.__file__}, was imported "
        f"first. Disable that extension in the Extensions tab, then restart the WebUI."
    )

from agentsd.app.last_run import STATUS
from agentsd.panel import controls
from agentsd.panel.routes import Routes
from agentsd.settings import infotext
from agentsd.settings.schema import NAMES
from agentsd.webui import batch, compat, session, settings_page, xyz

_panels: list[controls.Panel] = []


class AgentAttentionScript(scripts.Script):
    def title(self):
        return "Agent Attention"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def ui(self, is_img2img):
        tab, tunings = "img2img" if is_img2img else "txt2img", session.panel_tunings()
        panel = controls.build(tab, compat.InputAccordion, session.token_map, tunings)
        _panels.append(panel)
        self.infotext_fields = [(panel.controls[name], compat.HOST.pasted(infotext.reader(name))) for name in NAMES]
        self.paste_field_names = [infotext.reader(name) for name in NAMES]
        return panel.inputs

    def before_process(self, p, *args):
        session.before_process(p)

    def process(self, p, *args):
        session.process(p, args)

    def process_before_every_sampling(self, p, *args, **kwargs):
        session.before_sampling(p, kwargs.get("x"))

    def process_batch(self, p, *args, **kwargs):
        session.before_batch(p)
        batch.begin(p)

    def postprocess_batch(self, p, *args, **kwargs):
        batch.end(p)
        session.after_batch(p)

    def postprocess(self, p, processed, *args):
        session.postprocess(p, processed)


def on_app_started(demo, app):
    for panel in _panels:
        panel.tidy()
    Routes(compat.HOST).add(app)
    if name := compat.HOST.namesake():
        STATUS.say(f"{compat.SHARED_PACKAGE.format(name)}: disable it in the Extensions tab")


def add_settings():
    settings_page.register(shared.opts, shared.OptionInfo, getattr(shared, "OptionHTML", None), compat.HOST.category())


script_callbacks.on_cfg_denoiser(lambda params: session.before_model_call())
script_callbacks.on_before_ui(lambda: xyz.register(compat.HOST.xyz_grids()))
script_callbacks.on_ui_settings(add_settings)
script_callbacks.on_app_started(on_app_started)
if not compat.HOST.announces_passes:
    script_callbacks.on_after_process(batch.end_all)
