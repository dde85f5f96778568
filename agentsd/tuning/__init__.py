"""Tuning: the fastest settings of each block that keep a tolerance, measured on the model that will use them.

`result` is what a tuning is, `record` collects calls of a model, `probe` tries candidates in their blocks, `choose`
decides, `replay` makes calls again and times them, and `tuner` runs these in turn. Importing `result` loads no torch.
"""
