"""Tuning: the fastest settings of each block that keep a tolerance, measured on the model that will use them.

`data` is what a tuning is, `record` collects calls of a U-Net, `probe` measures on them, `choose` decides, and `tuner`
runs them in turn. Importing `data` loads no torch.
"""
