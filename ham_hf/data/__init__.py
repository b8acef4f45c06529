"""Any image-classification dataset as batches of pixels in [0, 1] and labels.

`dataset` opens a dataset and prepares it: `sources` finds its files, `columns` chooses splits, columns and classes,
`splits` holds images out, `provenance` records it, `decoding` makes pixels, and `pixels` makes augmented batches of
them. `streaming` and `shards` read training data without a local copy; `in_memory` takes datasets in Python;
`evaluation_data` opens the images to evaluate a finished model on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ham_hf.imports import names_on_demand

if TYPE_CHECKING:
    from ham_hf.data.config import CalibrationDataConfig as CalibrationDataConfig, DataConfig as DataConfig
    from ham_hf.data.dataset import ImageData as ImageData, TestData as TestData, load_image_data as load_image_data
    from ham_hf.data.evaluation_data import load_test_data as load_test_data
    from ham_hf.data.in_memory import image_data_from as image_data_from
    from ham_hf.data.pixels import (
        BatchRequest as BatchRequest,
        Images as Images,
        PixelBatch as PixelBatch,
        UpdateLayout as UpdateLayout,
    )
    from ham_hf.data.splits import stratified_subset as stratified_subset
    from ham_hf.data.streaming import TrainingStream as TrainingStream

__getattr__ = names_on_demand(
    __name__,
    {
        "ham_hf.data.config": ["CalibrationDataConfig", "DataConfig"],
        "ham_hf.data.dataset": ["ImageData", "TestData", "load_image_data"],
        "ham_hf.data.evaluation_data": ["load_test_data"],
        "ham_hf.data.in_memory": ["image_data_from"],
        "ham_hf.data.pixels": ["BatchRequest", "Images", "PixelBatch", "UpdateLayout"],
        "ham_hf.data.splits": ["stratified_subset"],
        "ham_hf.data.streaming": ["TrainingStream"],
    },
)
