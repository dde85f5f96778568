"""The panel: controls, preview, last run, token map, routes. Imports gradio, but no WebUI."""
