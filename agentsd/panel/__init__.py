"""The panel: controls, preview, last run, token map, measurement, routes. Knows gradio, and no WebUI."""
