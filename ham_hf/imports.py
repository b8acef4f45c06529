"""Deferred imports, so that ``import ham_hf`` and ``--help`` import neither torch nor timm.

`names_on_demand` lets a package offer names whose modules are imported when a name is first used.

`register_networks` registers immediately if timm is already imported. Otherwise a finder at the front of
``sys.meta_path`` waits for ``import timm``, lets Python import it, and then imports `ham_hf.models.cifar_nets`, which
registers. Either way ``timm.create_model("preactresnet18_cifar")`` works after ``import ham_hf`` and ``import timm``,
in any order. The finder handles no other name, leaves no trace on the module, and starts no import.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    # Not at run time: importlib.abc takes longer to import than all the rest.
    from collections.abc import Callable, Mapping, Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

NETWORKS = "ham_hf.models.cifar_nets"


def names_on_demand(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package that offers names, by the full name of the module that each comes from.

    No module of the package may have such a name: its import would take the name's place.
    """
    home_of = {name: module for module, names in homes.items() for name in names}

    def get(name: str) -> Any:  # noqa: ANN401 (any of the names)
        if name not in home_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(home_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    return get


class _AfterTimm:
    """Finds timm as the other finders do, with a loader that registers our networks afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification of timm; None for any other module, and where there is no timm."""
        if fullname != "timm":
            return None
        for finder in sys.meta_path:
            if isinstance(finder, _AfterTimm) or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = cast("Loader", _RegisteringLoader(spec.loader))
                return spec
        return None


class _RegisteringLoader:
    """Loads a module with its own loader, which takes its place, and then imports our networks."""

    def __init__(self, own: Loader) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._own
        if module.__spec__ is not None:
            module.__spec__.loader = self._own
        self._own.exec_module(module)
        import_module(NETWORKS)


def register_networks() -> None:
    """Register our networks with timm now, or as soon as it is imported; doing so again changes nothing."""
    if "timm" in sys.modules:
        import_module(NETWORKS)
    elif not any(isinstance(finder, _AfterTimm) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimm())
