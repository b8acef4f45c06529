"""Fair adversarial training for any timm backbone. Importing the package registers its CIFAR networks with timm.

In the order in which data flows: `config`; `data`; `models`; `attacks`, `mining` and `precision`; `methods`, the
training methods; `training`; `evaluation` and `metrics`; `reporting`; `hub`. `runs` puts stages together for the
recipes, `comparison` compares runs.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ham_hf.models import cifar_nets

__all__ = ["cifar_nets"]

try:
    __version__ = version("ham-hf")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
