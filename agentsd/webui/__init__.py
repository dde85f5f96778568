"""The extension in a WebUI: the session, compatibility between WebUIs, the settings page, X/Y/Z axes.

Only `compat` imports the WebUI.
"""
