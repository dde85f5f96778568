"""The panel: controls, preview, last run, token map, measurement, routes. Imports gradio, but no WebUI."""
