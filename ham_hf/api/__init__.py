"""Functions for your own training loops and notebooks, one per module; all can be imported from `ham_hf`.

`loss` is the adversarial loss of one batch, `evaluation` measures any model on any loader, `calibration` makes one
fairer without training, `training` runs the whole trainer. Nothing here needs an accelerator from the caller.
"""
