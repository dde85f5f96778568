"""A WebUI extension for tests: fails, interrupts or nests on demand, and tells what the U-Net's modules look like."""

import hashlib
from types import MethodType

import torch
from fastapi import Body
from modules import processing, script_callbacks, scripts, sd_models, shared

ARMED = {}
SEEN = {"calls": 0, "hires": False, "attn1_patch": False}
PREFIX = "/agent-attention-probe"


def unet():
    """The U-Net in use; an empty module where Forge has not loaded its first model."""
    model = shared.sd_model
    if hasattr(model, "forge_objects"):
        return model.forge_objects.unet.model.diffusion_model
    if hasattr(model, "unet"):  # SD.Next
        return model.unet
    return model.model.diffusion_model if hasattr(model, "model") else torch.nn.Module()


def blocks():
    return [m for m in unet().modules() if any(c.__name__ == "BasicTransformerBlock" for c in type(m).__mro__)]


def describe(module):
    """What a patch could have left on a module: its class, forwards of its own, its hooks."""
    hooks = [len(v) for k, v in sorted(vars(module).items()) if "hook" in k and isinstance(v, dict)]
    return type(module).__qualname__, sorted(k for k in vars(module) if "forward" in k), hooks


class Probe(scripts.Script):
    def title(self):
        return "Agent Attention probe"

    def show(self, is_img2img):
        return scripts.AlwaysVisible

    def process_before_every_sampling(self, p, *args, **kwargs):
        SEEN.update(calls=0, hires=bool(getattr(p, "is_hr_pass", False)))
        if SEEN["attn1_patch"]:  # Forge's own way; it changes nothing here, and has the block pass context and value
            patcher = p.sd_model.forge_objects.unet.clone()
            patcher.set_model_attn1_patch(lambda n, context, value, extra_options: (n, context, value))
            p.sd_model.forge_objects.unet = patcher

    def postprocess_image(self, p, pp, *args):
        if ARMED.get("action") == "nest":
            ARMED.clear()
            nested = processing.StableDiffusionProcessingImg2Img(
                sd_model=p.sd_model, init_images=[pp.image], prompt=p.prompt, steps=p.steps, width=p.width,
                height=p.height, seed=1, sampler_name=p.sampler_name, denoising_strength=0.5,
                do_not_save_samples=True, do_not_save_grid=True,
            )  # fmt: skip
            nested.scripts, nested.script_args = p.scripts, p.script_args
            processing.process_images(nested)


def fail(module, args):
    raise RuntimeError("probe: forced failure inside the U-Net")


def watch():
    """SD.Next has no callback for steps: until the probe has acted, a hook counts the U-Net's calls."""
    from modules import processing_callbacks

    def count(module, args):
        hires = bool(processing_callbacks.p.is_hr_pass)
        if hires is not SEEN["hires"]:
            SEEN.update(calls=0, hires=hires)
        act()
        if not ARMED:
            handle.remove()

    SEEN.update(calls=0, hires=False)
    handle = unet().register_forward_pre_hook(count)


def act():
    SEEN["calls"] += 1
    now = SEEN["calls"], SEEN["hires"]
    if ARMED.get("action") == "nest" or (ARMED.get("step"), ARMED.get("hires", False)) != now:
        return
    action = ARMED["action"]
    ARMED.clear()
    if action != "raise":
        getattr(shared.state, {"stop": "stop_generating"}.get(action, action))()
    elif hasattr(shared.sd_model, "unet"):
        fail(None, None)
    else:
        handle = unet().register_forward_pre_hook(lambda module, args: (handle.remove(), fail(module, args)))


def extend_context(block, x, context=None, **kwargs):
    """A block's forward as a reference control has it: self-attention over the tokens and a bank of more tokens."""
    n = block.norm1(x)
    x = block.attn1(n, context=torch.cat([n, n.flip(1)], dim=1)) + x
    x = block.attn2(block.norm2(x), context=context) + x
    return block.ff(block.norm3(x)) + x


def on_app_started(demo, app):
    @app.post(PREFIX + "/arm")
    def arm(body: dict = Body({})):  # noqa: B008
        ARMED.clear()
        ARMED.update(body)
        if hasattr(shared.sd_model, "unet"):
            watch()

    @app.get(PREFIX + "/state")
    def state():
        described = [(name, *describe(module)) for name, module in unet().named_modules()]
        return {
            "armed": ARMED,
            "tree": hashlib.sha256(repr(described).encode()).hexdigest(),
            "hooks": sum(sum(hooks) for *_, hooks in described),
            "own_forwards": sum("forward" in vars(block.attn1) for block in blocks()),
            "model": getattr(getattr(shared.sd_model, "sd_checkpoint_info", None), "name", None),
            "loaded": len(getattr(sd_models.model_data, "loaded_sd_models", [])),
        }

    @app.get(PREFIX + "/tunings")
    def tunings():
        from agentsd.webui.compat import HOST

        return [kept.to_dict() for kept in HOST.tunings.of_checkpoint(HOST.checkpoint())]

    @app.post(PREFIX + "/every-gain-counts")
    def every_gain_counts():
        """Seconds as on a machine where every method gains: what a busy one measures decides no test."""
        from agentsd.tuning import probe, replay, tuner

        def seconds(self, name):
            return {0: 0.1, **{k: 0.05 - 0.001 * k for of, k in self.ratios if of == self.kinds.get(name)}}

        def call(self, number, text, config=None, original=replay.Replay.call):
            return original(self, number, text, config)[0], 1.0 if config is None else 0.8

        probe.Probe.seconds, replay.Replay.call = seconds, call
        probe.MAX_TIME_TRIED, tuner.MIN_SHARE_OF_SAVING = float("inf"), 0.0

    @app.post(PREFIX + "/options")
    def options(body: dict = Body({})):  # noqa: B008
        return {name: getattr(shared.opts, name) for name in body["names"]}  # SD.Next's API lists only those changed

    @app.post(PREFIX + "/interfere")
    def interfere(body: dict = Body({})):  # noqa: B008
        for block in blocks():
            block.__dict__.pop("_forward", None)
            if body.get("blocks"):
                block._forward = MethodType(extend_context, block)
        SEEN["attn1_patch"] = bool(body.get("attn1_patch"))

    @app.post(PREFIX + "/reload-ui")
    def reload_ui():
        shared.state.request_restart()

    @app.get(PREFIX + "/axes")
    def axes():
        data = next(d for d in scripts.scripts_data if d.script_class.__module__ in ("xyz_grid.py", "scripts.xyz_grid"))
        options = data.module.axis_options
        return [option.label for option in options if not getattr(option, "is_img2img", False)]


script_callbacks.on_cfg_denoiser(lambda params: act())
script_callbacks.on_app_started(on_app_started)
