"""The settings of the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from ham_hf.settings import SettingsGroup, setting

TIMM_NEEDS_ORIGINALS = (
    "--cache_images ram keeps images that are already cropped, and timm's augmentation needs the originals: use "
    "--cache_images auto or none, or --augmentation crop_flip"
)


@dataclass(frozen=True, kw_only=True)
class DataConfig(SettingsGroup):
    """Which images and labels, and how they are read."""

    dataset_name: str = setting("digits", "Hub dataset id, local folder (parquet or class folders), or digits")
    dataset_config_name: str | None = setting(None, "configuration (subset) of the Hub dataset")
    dataset_revision: str | None = setting(None, "branch, tag or commit of the Hub dataset")
    train_split: str | None = setting(None, "name of the training split; none = found by rule")
    test_split: str | None = setting(None, "name of the test split; none = found by rule")
    image_column: str | None = setting(None, "column with the images; none = found by rule")
    label_column: str | None = setting(None, "column with the labels; none = found by rule")
    validation_fraction: float = setting(
        0.04, "fraction of train held out, stratified, to select the checkpoint by", at_least=0, below=1
    )
    test_fraction: float = setting(
        0.2, "fraction of train made the test split, stratified, if the dataset has none", above=0, below=1
    )
    augmentation: Literal["auto", "none", "crop", "crop_flip", "timm"] = setting(
        "auto", "training augmentation; auto = none for digits, crop_flip up to 96 px, timm's own above"
    )
    cache_images: Literal["auto", "ram", "none"] = setting(
        "auto", "ram = decode once into memory, none = decode each epoch, auto = ram where it fits"
    )
    skip_corrupt: bool = setting(False, "skip and count images that cannot be decoded, instead of stopping")
    dataloader_num_workers: int = setting(
        2, "decoding processes per device for images that are not cached", at_least=0
    )
    limit_train_examples: int | None = setting(None, "use this many training images, stratified", at_least=1)
    limit_test_examples: int | None = setting(None, "use this many test images, stratified", at_least=1)
    dataset_streaming: bool = setting(False, "read the training split from its files as it goes, without a local copy")
    shuffle_buffer_size: int = setting(
        10_000, "examples that a stream is shuffled within, kept encoded, over all processes", at_least=1
    )
    num_train_examples: int | None = setting(
        None, "examples of a streamed training split; needed for .tar archives that do not say it", at_least=1
    )

    def contradictions(self) -> Iterator[str]:
        """Settings of a stream without one, what cannot be done with a stream, and a cache that cannot be cropped."""
        if self.dataset_streaming:
            if self.limit_train_examples is not None:
                yield (
                    f"--limit_train_examples {self.limit_train_examples}: a stratified part of a stream needs a pass "
                    "over all of it; shorten the run with --max_steps, or leave --dataset_streaming out"
                )
        else:
            yield from self.idle(["num_train_examples", "shuffle_buffer_size"], "--dataset_streaming")
            if (self.augmentation, self.cache_images) == ("timm", "ram"):
                yield TIMM_NEEDS_ORIGINALS


@dataclass(frozen=True, kw_only=True)
class CalibrationDataConfig(DataConfig):
    """The dataset, by default the one that the model records; held-out parts are taken from that record too."""

    dataset_name: str | None = setting(  # type: ignore[assignment]  # `named` gives one with a name
        None, "Hub dataset id, local folder, or digits; none = the model's training data"
    )

    def named(self, dataset_name: str) -> DataConfig:
        """The same settings for a dataset of this name."""
        values = {declared.name: getattr(self, declared.name) for declared in fields(DataConfig)}
        return DataConfig(**{**values, "dataset_name": dataset_name})
