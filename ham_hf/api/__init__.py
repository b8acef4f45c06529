"""What own training loops and notebooks call, one function a module; `ham_hf` itself offers them by name.

`loss` is the adversarial loss of one batch, `evaluation` measures any model on any loader, `calibration` makes one
fairer without training, `training` is the whole trainer. Nothing here needs an accelerator from the caller.
"""
