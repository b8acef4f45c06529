"""Fair adversarial training for any timm backbone: functions for your own training loops and notebooks.

`ThreatModel`, `pgd` and `mine_hard_examples` attack, `adversarial_loss` is the loss of one batch, `evaluate`,
`summarize` and `calibrate` measure and improve fairness, `load_pixel_model` loads a published model, `train` is the
whole trainer. Importing the package imports neither torch nor timm; each name is imported when it is first used.
Our CIFAR networks are registered with timm, whichever of the two is imported first.

The modules, in the order in which data flows: `config`; `data`; `models`; `attacks`, `mining` and `precision`;
`methods`, the training methods; `training`; `evaluation` and `metrics`; `reporting`; `hub`. `commands` read command
lines, whose stages are in `training_run` and its like; `comparison` compares runs, `api` holds the functions above.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ham_hf.imports import names_on_demand, register_networks

if TYPE_CHECKING:
    from ham_hf.api.calibration import calibrate as calibrate
    from ham_hf.api.evaluation import evaluate as evaluate
    from ham_hf.api.loss import adversarial_loss as adversarial_loss
    from ham_hf.api.training import train as train
    from ham_hf.attacks import ThreatModel as ThreatModel, pgd as pgd
    from ham_hf.metrics import summarize as summarize
    from ham_hf.mining import mine_hard_examples as mine_hard_examples
    from ham_hf.models import load_pixel_model as load_pixel_model

    __version__: str

_HOMES = {
    "ham_hf.api.calibration": ["calibrate"],
    "ham_hf.api.evaluation": ["evaluate"],
    "ham_hf.api.loss": ["adversarial_loss"],
    "ham_hf.api.training": ["train"],
    "ham_hf.attacks": ["ThreatModel", "pgd"],
    "ham_hf.metrics": ["summarize"],
    "ham_hf.mining": ["mine_hard_examples"],
    "ham_hf.models": ["load_pixel_model"],
}
__all__ = ["__version__", *(name for names in _HOMES.values() for name in names)]
_offered = names_on_demand(__name__, _HOMES)


def __getattr__(name: str) -> Any:  # noqa: ANN401 (any of the names above)
    return _version() if name == "__version__" else _offered(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("ham-hf")
    except PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


register_networks()
