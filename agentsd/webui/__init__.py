"""The extension in a WebUI: the life of a patch, what differs between WebUIs, the settings page, X/Y/Z axes.

Only `compat` imports the WebUI.
"""
