"""Fair adversarial training for any timm backbone. Importing the package registers its CIFAR networks with timm."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ham_hf import cifar_nets

__all__ = ["cifar_nets"]

try:
    __version__ = version("ham-hf")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
