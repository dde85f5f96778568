"""The preview: what the settings will do at the current size, in a sentence for each sampling pass.

The page's script reads the controls and asks; all wording is here, and the last run's is the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checks import SettingError
from ..methods import LayerPlan
from ..settings.idle import idle
from ..settings.presets import CUSTOM, PRESETS, preset_of
from ..settings.schema import BY_NAME, SETTINGS, check, is_left_out, labelled
from ..words import counted, percent
from .decision import USUAL, Decision, Hint, Program, SamplingPass, decide

# Help of the panel's controls that are no settings, by the name in their element id
_HELP = {
    "preset": "Settings by intention. Changing one of them makes it Custom.",
    "tune_next": "Make the next image without Agent Attention, and find the fastest settings that stay as close to it "
    "as said on the left, for this checkpoint and size.",
    "record": "Keep which tokens were merged and where the agents sat for each image, until the next one.",
    "map_moment": "Which call of the U-Net: one for every 0.05 of the diffusion, first pass, then hires pass.",
    "map_layer": "Which of the changed layers, in the order of the U-Net.",
}


def page_data() -> dict[str, Any]:
    """Collect what the page's script needs to know about the settings, in JSON types."""
    return {
        "rows": [{"name": row.name, "kind": row.kind, "choices": list(row.choices)} for row in SETTINGS],
        "presets": {name: dict(values) for name, values in PRESETS.items()},
        "help": {**{row.name: row.tooltip for row in SETTINGS}, **_HELP},
    }


_BESIDE_A_TUNING = ("enabled", "fp32", "passes", "tuning")  # settings that have an effect there
# What a line tells, by which the page marks it
ACTS, SLOWER, NOTHING, WRONG, NOTE = "acts", "slower", "nothing", "wrong", "note"


@dataclass(frozen=True)
class Line:
    """One line of the preview or of the last run."""

    text: Sequence[str] | str = ""  # what happens, in clauses without full stops
    hint: Hint | None = None  # advice; where nothing happens, the reason and its remedy
    state: str = NOTE  # ACTS if anything is changed, SLOWER if that costs time, NOTHING, WRONG for a bad value, or NOTE

    def __str__(self) -> str:
        told = self.to_dict()
        return f"{told['text']} {told['hint']}".strip()

    def to_dict(self) -> dict[str, str]:
        """Convert the line to full sentences for the page."""
        clauses = (self.text,) if isinstance(self.text, str) else self.text
        text = " ".join(map(_sentence, filter(None, clauses)))
        return {"text": text, "hint": "" if self.hint is None else sentence(self.hint), "state": self.state}


def preview(values: Mapping[str, Any], passes: Sequence[SamplingPass], rows: int, program: Program) -> dict[str, Any]:
    """Make the preview of settings by name, missing ones and None at their defaults; the rest is as for `decide`.

    Returns:
        {"lines": [{"text", "hint", "state"}, …], "preset": name, "model": whether one is loaded, "idle": why controls
        have no effect, by setting, "passes": [{"of", "latent", "patched", "calls"}, …]}.
    """
    preset, decisions, no_effect = CUSTOM, [], {}
    try:
        checked = check({**values, "enabled": True})
    except SettingError as error:
        lines = [Line("", Hint(str(error)), WRONG)]
    else:
        preset = preset_of(checked)
        if checked["tune"]:
            text = f"The next image is made without Agent Attention and tuned on, to within {percent(checked['tune'])}"
            lines = [Line(text, Hint("that takes as long as some dozens of steps; Skip ends it"))]
        else:
            decisions = [decide(checked, sampling, rows, program) for sampling in passes]
            lines = _lines(decisions, checked, program)
            tuned = bool(decisions) and all(made.tuning is not None for made in decisions)
            others = [row.name for row in SETTINGS if not row.local and row.name not in _BESIDE_A_TUNING]
            no_effect = dict.fromkeys(others, "No effect beside the tuning that is used.") if tuned else idle(checked)
    return {
        "lines": [line.to_dict() for line in lines],
        "preset": preset,
        "model": program.unet() is not None,
        "idle": no_effect,
        "passes": [
            {"of": made.sampling.of, "latent": made.sampling.latent, "patched": made.patches, "calls": made.calls}
            for made in decisions
        ],
    }


def _lines(decisions: Sequence[Decision], values: Mapping[str, Any], program: Program) -> list[Line]:
    lines = [line_of(made, values) for made in decisions if not is_left_out(values, made.sampling.hires)]
    if not lines and decisions:
        hint = Hint("only the hires pass is chosen, and there is none", ("passes",))
        lines = [replace(line_of(decisions[0], values), hint=hint)]
    lines += [
        Line(f"{made.sampling}: made with {made.sampling.checkpoint}, so figures are those of the loaded checkpoint")
        for made in decisions
        if made.patches and made.sampling.checkpoint
    ]
    if program.unet() is None:
        return [*lines, Line(f"No model is loaded yet: figures are those of {USUAL}")]
    return [*lines, *(Line("", hint) for hint in program.advice(values))]


def sentence(hint: Hint) -> str:
    """Word a hint, naming the controls to change by their labels."""
    labels = [f"“{BY_NAME[name].label if name in BY_NAME else name}”" for name in hint.remedy]
    change = f" Change {' or '.join(labels)}." if labels else ""
    return f"{_sentence(labelled(hint.text))}{change}" if hint.text else ""


def _sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."


# Words of a pass, for the last run as well


def line_of(made: Decision, values: Mapping[str, Any]) -> Line:
    name, total = str(made.sampling), len(made.sampling.moments or ())
    head = f"{name}: {made.instead}, so {preset_of({**values, 'tuning': ''})} applies" if made.instead else name
    if not made.patches:
        return Line(f"{head}: nothing happens", made.reason, NOTHING)
    gain, state = _gain(made, total)
    if made.tuning is not None:
        return Line((f"{head}: {tuned_in_words(made)}", gain), made.reason, state)
    what = f"{layers_in_words(made.layers)}{steps_in_words(made.steps, total, 'steps')}"
    if state == ACTS and made.reason is not None and made.reason.remedy == ("min_tokens",) and made.timing is None:
        gain, state = _speed(1.0)
    return Line((f"{head}: {what}", gain), made.reason, state)


def tuned_in_words(made: Decision) -> str:
    """Say what a tuning keeps to, as in "tuned, U-Net output within 2% (deviation 1.7% measured)", and its doubts."""
    plan = made.tuning.plan
    reached = f" (deviation {plan.reached})" if plan.reached else ""
    doubts = f", but {made.doubts}" if made.doubts else ""
    return f"tuned, U-Net output within {percent(plan.tolerance)}{reached}{doubts}"


def layers_in_words(layers: Iterable[tuple[LayerPlan, int]]) -> str:
    words = (f"{plan.method.words(plan)} in {counted(n, 'layers')}" for plan, n in layers)
    return ", ".join(words) or "tokens merged outside self-attention"


def steps_in_words(changed: int, total: int, noun: str) -> str:
    """Say in which of the steps, as in ", in 12 of 20 steps"; empty where they are not known."""
    if not total:
        return ""
    return f", in all {total} {noun}" if changed == total > 1 else f", in {changed} of {total} {noun}"


def _gain(made: Decision, total: int) -> tuple[str, str]:
    """Word the gain in time of a pass, and tell the line's state."""
    tuning, timing = made.tuning, made.timing
    if tuning is not None and (timing is None or timing.layers):
        return tuning.plan.gain, _speed(tuning.speed_up)[1] if tuning.speed_up else ACTS
    measured = f"; measured here: {timing.words()}" if timing else ""
    if timing is not None and not timing.layers:
        share = made.steps / total if total else 1.0
        words, state = _speed(1 / (1 - share + share / timing.gain))
    elif timing is not None and timing.slower:
        words, state = "slower than without", SLOWER
    else:
        words, state = _speed(1 / made.share, "about ")
        words += f" by FLOPs, at most {1 / made.least:.2f}×" if state == ACTS else " by FLOPs"
    return words + measured, state


def _speed(gain: float, about: str = "") -> tuple[str, str]:
    """Word a gain in time to the digits that are shown, and tell the line's state."""
    shown = round(gain, 2)
    if shown < 1:
        return f"slower than without: {about}{gain:.2f}× the speed", SLOWER
    return (f"expected: {about}{gain:.2f}× faster", ACTS) if shown > 1 else ("no gain in time is expected", NOTHING)
