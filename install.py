"""Run by the WebUI before it starts. All that is needed comes with a supported WebUI; torch and gradio are its own."""

import importlib.util

if importlib.util.find_spec("einops") is None:
    import launch

    launch.run_pip("install einops", "einops for Agent Attention")
