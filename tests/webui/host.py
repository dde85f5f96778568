"""A WebUI checkout under test: install the extension in it, start it, talk to its HTTP API, stop it."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from servers import REPOSITORY, Server

from agentsd.settings import infotext
from agentsd.settings.schema import ARGUMENTS, RECORD
from agentsd.settings.schema import DEFAULTS as DEFAULT_SETTINGS

PRODUCT = ("agentsd", "scripts", "javascript", "install.py", "metadata.ini", "style.css")
PROBE = "/agent-attention-probe"
EXTENSIONS = ("sd-webui-agent-attention", "agent-attention-probe")

COMMON_FLAGS = (
    "--skip-python-version-check --skip-torch-cuda-test --skip-version-check --no-hashing --do-not-download-clip "
    "--no-download-sd-model --api"
)
FORGE_FLAGS = f"{COMMON_FLAGS} --always-cpu --all-in-fp32 --skip-install --attention-pytorch"
FLAGS = {
    "a1111": f"{COMMON_FLAGS} --no-half --no-half-vae --use-cpu all",
    "forge": FORGE_FLAGS,
    "reforge": FORGE_FLAGS,
    # without the tabs that we are not in, its page is drawn in a third of the time
    "sdnext": "--skip-all --skip-git --skip-torch --experimental "
    "--disable control,video,extras,caption,gallery,models,extensions,info",
}
ENVIRONMENT = {"IGNORE_CMD_ARGS_ERRORS": "1", "TORCHDYNAMO_DISABLE": "1", "COLUMNS": "200"}
DEFAULTS: dict[str, Any] = {"prompt": "a cat", "negative_prompt": "bad", "steps": 4, "width": 128, "height": 128}
DEFAULTS |= {"seed": 1, "sampler_name": "Euler a", "cfg_scale": 7, "save_images": False}
# Settings that tests do not name: their images are small, and layers that small are left alone by default
SMALL_IMAGES = {"min_tokens": 0}
# Kept checkpoints save time; tests about switching them ask for fewer. Small images are slower with agents.
OPTIONS = {"show_progress_type": "Approx cheap", "sd_checkpoints_limit": 4, "agent_attention_even_if_slower": True}
# SD.Next loads the model before anybody can ask for another one, and its tests need no other
SDNEXT_CONFIG = {
    "offline_mode": True,
    "diffusers_dir": "models/Diffusers",
    "sd_checkpoint_autoload": True,
    "sdnq_dequantize_compile": False,
    "theme_type": os.environ.get("AGENTSD_SDNEXT_THEME", "Standard"),
    "agent_attention_even_if_slower": True,
}
# A user's own defaults: other values than ours, and whole numbers where ours have a fraction
OWN = {"Ratio": 0, "Until": 1, "k_scale2": 1, "Random partition": False, "Merge MLP": True}
OWN |= {"Agent source": "similarity", "Maximum agents": 77}
OURS = "customscript/agent_attention.py/txt2img/"
USER_DEFAULTS = {f"{OURS}{label}/value": value for label, value in OWN.items()}


@dataclass
class Result:
    """What an API call made."""

    images: list[Image.Image]
    info: dict[str, Any]

    @property
    def pixels(self) -> list[bytes]:
        return [image.convert("RGB").tobytes() for image in self.images]

    @property
    def infotext(self) -> str:
        return self.info["infotexts"][0]

    @property
    def written(self) -> dict[str, Any]:
        """What the answer says beside the image: the infotext's entries, ours among them, and notes."""
        return self.info["extra_generation_params"]

    @property
    def entry(self) -> dict[str, Any]:
        """The settings that the image's infotext names."""
        return infotext.read(self.written[infotext.KEY])


def with_record(settings: Mapping[str, Any]) -> list[Any]:
    """The script's arguments for these settings that also ask for a token map's record."""
    return [settings, *[DEFAULT_SETTINGS[name] for name in ARGUMENTS[1 : ARGUMENTS.index(RECORD)]], True]


def acted(one: Mapping[str, Any]) -> int:
    """The self-attention calls of a pass that were changed, by whatever method."""
    return sum(count for action, count in one["calls"].items() if action != "untouched")


def image_to_base64(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


class Host(Server):
    """One WebUI checkout.

    Args:
        root: its folder.
        kind: "a1111", "forge", "reforge" or "sdnext": which flags it is started with.
        checkpoint: name of the checkpoint to start with; SD.Next's are folders.
        flags: more flags to start it with.
    """

    def __init__(self, root: Path, kind: str, checkpoint: str, flags: tuple[str, ...] = ()) -> None:
        super().__init__(root, root / "agent-attention-tests.log")
        self.kind, self.checkpoint, self.flags = kind, checkpoint, flags
        self._saved: dict[Path, bytes | None] = {}

    @property
    def models(self) -> Path:
        return self.root / "models" / ("Diffusers" if self.kind == "sdnext" else "Stable-diffusion")

    def has(self, checkpoint: str) -> bool:
        """Whether the host has a checkpoint of this name."""
        return any((self.models / name).exists() for name in (checkpoint, f"{checkpoint}.safetensors"))

    # Life

    def install(self) -> None:
        """Copy the extension and the probe into the checkout, and give its user defaults that are hard to live with."""
        config, ui_config = paths = [self.root / name for name in ("config.json", "ui-config.json")]
        self._saved = {path: path.read_bytes() if path.exists() else None for path in paths}
        ui_config.write_text(json.dumps(USER_DEFAULTS if self.kind == "a1111" else {}))
        if self.kind == "sdnext":
            config.write_text(json.dumps({**SDNEXT_CONFIG, "sd_model_checkpoint": self.checkpoint}))
        target, probe = self._removed()
        target.mkdir(parents=True)
        for part in filter(Path.exists, (REPOSITORY / name for name in PRODUCT)):
            if part.is_dir():
                shutil.copytree(part, target / part.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(part, target)
        shutil.copytree(Path(__file__).parent / "probe", probe)

    def _removed(self) -> list[Path]:
        paths = [self.root / "extensions" / name for name in EXTENSIONS]
        for path in paths:
            shutil.rmtree(path, ignore_errors=True)
        return paths

    def uninstall(self) -> None:
        """Take out what `install` put in."""
        self._removed()
        for path, content in self._saved.items():
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)

    def again(self, *flags: str) -> AbstractContextManager[Host]:
        """The same checkout, served once more with these flags."""
        other = Host(self.root, self.kind, self.checkpoint, flags)
        other.log = self.root / "agent-attention-tests-again.log"
        return other.running()

    def start(self, timeout: float = 900) -> None:
        flags = [*FLAGS[self.kind].split(), *self.flags, "--port", str(self.port)]
        if self.kind != "sdnext":
            flags += ["--ckpt", str(self.models / f"{self.checkpoint}.safetensors")]
        flags += os.environ.get("AGENTSD_WEBUI_FLAGS", "").split()
        self.launch(self._python(), "launch.py", *flags, **ENVIRONMENT, **self._pins())
        self.wait(timeout)
        if self.kind != "sdnext":
            self.call("/sdapi/v1/options", {**OPTIONS, "sd_model_checkpoint": f"{self.checkpoint}.safetensors"})

    def _python(self) -> Path:
        """Its own Python: with any other, its launcher would install the WebUI's requirements there."""
        for python in (self.root / "venv/bin/python", self.root / ".venv/bin/python"):
            if python.exists():
                return python
        raise RuntimeError(f"{self.root} has no environment of its own, venv or .venv: start it once by itself")

    def _pins(self) -> dict[str, str]:
        """What keeps reForge from fetching another commit of a repository than the one it has."""
        if self.kind != "reforge":
            return {}
        repository = str(self.root / "repositories/stable-diffusion-stability-ai")
        commit = subprocess.check_output(["git", "-C", repository, "rev-parse", "HEAD"], text=True)
        return {"STABLE_DIFFUSION_COMMIT_HASH": commit.strip()}

    def wait(self, timeout: float = 900, starts: int = 1) -> None:
        """Wait until the server has started so many times. A request before that would make its start fail."""
        self.until(lambda: self.console().count("Startup time:") >= starts, timeout)
        self.state()

    # API

    def txt2img(self, agents: list[Any] | None = None, **body: Any) -> Result:
        """Make images; `agents` are the extension's arguments."""
        return self._generate("txt2img", agents, body)

    def img2img(self, image: Image.Image, agents: list[Any] | None = None, **body: Any) -> Result:
        return self._generate("img2img", agents, {"init_images": [image_to_base64(image)], **body})

    def plot(self, x: tuple[str, str], y: tuple[str, str] = ("Nothing", ""), **body: Any) -> Result:
        """Make an X/Y/Z plot over axes, each given by its label and its values as text."""
        labels = self.call(PROBE + "/axes")
        axes = [part for label, values in (x, y, ("Nothing", "")) for part in (labels.index(label), values, [])]
        arguments = [*axes, False, True, False, False, False, False, False, 0, True]
        return self.txt2img(script_name="x/y/z plot", script_args=arguments, **body)

    def our_axes(self) -> list[str]:
        return [label for label in self.call(PROBE + "/axes") if label.startswith("[Agent Attention]")]

    def _generate(self, what: str, agents: list[Any] | None, body: dict[str, Any]) -> Result:
        body = {**DEFAULTS, **body}
        if self.kind == "forge" and body.get("enable_hr"):
            # Forge's own API fails or changes the scale without these
            body = {"hr_additional_modules": ["Use same choices"], "hr_cfg": body["cfg_scale"], **body}
        if agents and isinstance(agents[0], Mapping):
            agents = [{**SMALL_IMAGES, **agents[0]}, *agents[1:]]
        if agents is not None:
            body["alwayson_scripts"] = {**body.get("alwayson_scripts", {}), "agent attention": {"args": agents}}
        answer = self.call(f"/sdapi/v1/{what}", body)
        images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in answer["images"]]
        return Result(images, json.loads(answer["info"]))

    def use(self, checkpoint: str) -> None:
        self.call("/sdapi/v1/options", {"sd_model_checkpoint": f"{checkpoint}.safetensors"})

    def status(self) -> dict[str, Any]:
        """What the extension tells of its last run."""
        return self.call("/agent-attention/status")

    def state(self) -> dict[str, Any]:
        """What the U-Net's modules look like."""
        return self.call(PROBE + "/state")

    @cached_property
    def plain(self) -> Result:
        """The first plain image; what any test leaves behind shows in the plain images after it."""
        return self.txt2img()

    @contextmanager
    def no_trace(self) -> Iterator[None]:
        """Afterwards the plain image is what it was at first, pixel for pixel, and so are the U-Net's modules."""
        plain, before = self.plain, self.state()
        yield
        assert self.txt2img().pixels == plain.pixels
        after = self.state()
        assert (after["tree"], after["model"]) == (before["tree"], before["model"])

    def arm(self, action: str, **when: Any) -> None:
        """Have the probe act at the `step`-th call of a pass."""
        self.call(PROBE + "/arm", {"action": action, **when})

    @contextmanager
    def interference(self, **what: bool) -> Iterator[None]:
        """Another extension's ways with the U-Net."""
        self.call(PROBE + "/interfere", what)
        try:
            yield
        finally:
            self.call(PROBE + "/interfere", dict.fromkeys(what, False))

    @contextmanager
    def options(self, **options: Any) -> Iterator[None]:
        """Settings of the WebUI for a while. Its own override_settings would leave some behind."""
        current = self.call(PROBE + "/options", {"names": list(options)})
        self.call("/sdapi/v1/options", options)
        try:
            yield
        finally:
            self.call("/sdapi/v1/options", current)

    def reload_ui(self) -> None:
        """Settings → Reload UI."""
        starts = self.console().count("Startup time:")
        self.call(PROBE + "/reload-ui", {})
        self.wait(starts=starts + 1)

    @contextmanager
    def own_defaults(self, values: Mapping[str, Any]) -> Iterator[Path]:
        """Other defaults of the user's for a while, by our controls' labels."""
        file = self.root / "ui-config.json"
        before = file.read_bytes()
        try:
            if values:
                file.write_text(json.dumps({f"{OURS}{label}/value": value for label, value in values.items()}))
                self.reload_ui()
            yield file
        finally:
            file.write_bytes(before)
            self.reload_ui()
