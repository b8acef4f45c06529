"""Any image-classification dataset as batches of pixels in [0, 1] and labels.

`loading` opens a dataset and makes it ready: `sources` finds its files, `columns` its splits, columns and classes,
`parts` and `splits` hold out what is held out, `provenance` records it, `decoding` and `augment` make pixels, `pixels`
hands them out in batches. `streaming` and `shards` do so for training data that is never stored; `worker_signals`
protects decoding processes. `in_memory` takes datasets that somebody has in Python.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ham_hf.imports import names_on_demand

if TYPE_CHECKING:
    from ham_hf.data.config import CalibrationDataConfig, DataConfig
    from ham_hf.data.dataset import ImageData, TestData, load_image_data, load_test_data
    from ham_hf.data.in_memory import image_data_from
    from ham_hf.data.pixels import BatchRequest, Images, PixelBatch
    from ham_hf.data.splits import stratified_subset
    from ham_hf.data.streaming import TrainingStream

__all__ = [
    "BatchRequest",
    "CalibrationDataConfig",
    "DataConfig",
    "ImageData",
    "Images",
    "PixelBatch",
    "TestData",
    "TrainingStream",
    "image_data_from",
    "load_image_data",
    "load_test_data",
    "stratified_subset",
]

__getattr__ = names_on_demand(
    __name__,
    {
        "ham_hf.data.config": ["CalibrationDataConfig", "DataConfig"],
        "ham_hf.data.dataset": ["ImageData", "TestData", "load_image_data", "load_test_data"],
        "ham_hf.data.in_memory": ["image_data_from"],
        "ham_hf.data.pixels": ["BatchRequest", "Images", "PixelBatch"],
        "ham_hf.data.splits": ["stratified_subset"],
        "ham_hf.data.streaming": ["TrainingStream"],
    },
)
