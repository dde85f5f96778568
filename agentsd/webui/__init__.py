"""The parts of the WebUI extension: settings, infotext, panel, XYZ axes and the life of a patch.

`settings` and `infotext` import neither gradio nor the WebUI; only `compat` knows the differences between hosts.
"""
