"""What a panel and other programs ask: no gradio here, and no WebUI, whose cache and options are passed in."""
