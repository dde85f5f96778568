"""The extension in a WebUI: session, settings page, X/Y/Z axes; only `compat` imports the WebUI."""
