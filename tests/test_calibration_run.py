"""recipes/calibrate.py and --fairness in training: which images are read, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import datasets
import pytest
import timm
import torch
import yaml
from timm.models import save_for_hf

from ham_hf import calibration_run
from ham_hf.commands import calibrate as command
from ham_hf.config import parse_calibrate_config
from ham_hf.data import Images
from ham_hf.evaluation import calibration
from ham_hf.fitting import ReorderedLogits, align_classes
from ham_hf.models import load_pixel_model
from ham_hf.models.head import check_foldable, read_biases
from ham_hf.models.pixel_model import imagenet_synsets
from ham_hf.reporting.report import read_report
from tests.conftest import ROOT
from tests.support.documents import calibration as made_up_calibration
from tests.support.example_images import dataset, everything, load, noise, write_parquet
from tests.support.exports import FAMILIES
from tests.support.hub_server import Hub, hub_environment
from tests.support.recipe_runs import HELD_OUT, finish, recipe_module, refused as recipe_refused

pytestmark = pytest.mark.slow

NAMES = ["b", "a"]
QUICK = [*("--use_cpu", "--disable_tqdm", "--calibration_num_steps=1", "--eval_num_steps=1", "--epsilon=0.02")]
QUICK += ["--limit_test_examples=20"]
TRAINED = [*HELD_OUT, "--num_train_epochs=1"]


@pytest.fixture(scope="module")
def quick():
    """Two rounds and two values of F: what is found is tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration, "FRONTIER", (0.0,))
        patch.setattr(calibration, "NUM_ROUNDS", 2)
        yield


def example(label: int, number: int, size: int = 32):
    """Images of two classes that differ in their colors, with more noise than color."""
    image = noise(10 * number + label, (size, size)).convert("RGB")
    return image.point([min(255, value // 2 + 60 * label) for value in range(256)] * 3)


def examples(split: int, per_class: int = 20, names=tuple(NAMES), size: int = 32):
    labels = [index % 2 for index in range(2 * per_class)]
    images = [example(label, 1000 * split + index, size) for index, label in enumerate(labels)]
    return dataset(images, labels, label_feature=datasets.ClassLabel(names=list(names)))


@pytest.fixture(scope="module")
def colors(tmp_path_factory):
    """A dataset with a split of its own for everything."""
    folder = tmp_path_factory.mktemp("colors")
    return write_parquet(folder, train=examples(0), extra=examples(1, 24), test=examples(2, 6))


def stranger(name: str, folder, *, num_classes: int = 2, size: int = 32, label_names=None, **model_args):
    """A folder as timm writes it, with a network that prefers one class; returns the network."""
    torch.manual_seed(0)
    if timm.models.get_pretrained_cfg_value(name, "fixed_input_size"):
        model_args.setdefault("img_size", size)
    model = timm.create_model(name, num_classes=num_classes, **model_args).eval()
    model.pretrained_cfg |= {"input_size": (3, size, size), "license": "bsd-3-clause", "tag": "strong"}
    settings = {"label_names": label_names} if label_names else {}
    save_for_hf(model, folder, model_config=settings, model_args=model_args, safe_serialization=True)
    return model


@pytest.fixture
def model(tmp_path):
    """Folder of a stranger's network."""
    stranger("test_resnet", tmp_path / "model")
    return tmp_path / "model"


def run(model, *arguments):
    command.main([str(model), *QUICK, *map(str, arguments)])


def refused(capsys, model, *arguments) -> str:
    return recipe_refused(capsys, "calibrate.py", str(model), *QUICK, *map(str, arguments))


def record_of(folder) -> dict:
    return json.loads((folder / "config.json").read_text())["ham_hf"]["calibration"]


def spy_on_images(monkeypatch) -> list:
    """Which images are read while the shifts are searched, as (images, rows)."""
    read, searching, batches, calibrate = [], [], Images.batches, calibration.calibrate

    def spied(images, requests, *, device):
        if searching:
            read.extend((images, request.indices) for request in requests)
        return batches(images, requests, device=device)

    def search(*arguments, **options):
        searching.append(True)
        try:
            return calibrate(*arguments, **options)
        finally:
            searching.clear()

    monkeypatch.setattr(Images, "batches", spied)
    monkeypatch.setattr(calibration, "calibrate", search)
    return read


def digits(**options):
    """The digits as HELD_OUT has them."""
    model = {"in_chans": 1, "image_size": 8, "interpolation": "bilinear", "crop_pct": 1.0}
    return load("digits", **model, limit_train_examples=800, validation_fraction=0.3, **options)


@pytest.fixture(scope="module")
def own(quick, tmp_path_factory):
    """A run of ours with --fairness; its folder, and what was read while its shifts were searched."""
    folder = tmp_path_factory.mktemp("own") / "run"
    with pytest.MonkeyPatch.context() as patch:
        read = spy_on_images(patch)
        words = [*TRAINED, "--fairness=0.5", "--calibration_num_steps=1", f"--output_dir={folder}"]
        recipe_module("train_ham.py").main(words)
    return folder, read


class TestTraining:
    def test_searches_in_the_held_out_part_alone(self, own):
        _, read = own
        data = digits(augmentation="none", limit_test_examples=40)
        assert len({id(images) for images, _ in read}) == 1
        assert torch.equal(everything(read[0][0]), everything(data.validation))
        assert {int(row) for _, rows in read for row in rows} == set(range(240))

    def test_report_card_figure_and_config(self, own):
        folder, _ = own
        report = read_report(folder)
        found = report.calibration
        assert found.fairness == 0.5
        assert found.counts == tuple(torch.bincount(digits().validation.labels))
        assert not found.seen_in_training
        assert report.training.passes > found.passes > 0
        assert set(report.results) == {"clean", "pgd-2", "cw-2"}
        card = (folder / "README.md").read_text()
        assert "## Calibration" in card
        assert "Fairness 0.5 took the worst class from" in card
        assert "figures/fairness_frontier.png" in card
        assert (folder / "figures" / "fairness_frontier.png").stat().st_size > 5000
        assert "class-shifts" in yaml.safe_load(card.split("---")[1])["tags"]
        record = record_of(folder)
        assert record["shifts"] == list(found.shifts)
        bias = read_biases(load_pixel_model(str(folder)).model.backbone, 10)[0]
        added = torch.tensor(record["original_bias"][0]) + torch.tensor(record["shifts"])
        assert bias == added.tolist()

    def test_too_few_held_out_images_are_refused_before_training(self, capsys, tmp_path):
        words = [*TRAINED, "--validation_fraction=0.1", "--fairness=0.5", f"--output_dir={tmp_path / 'run'}"]
        assert re.search("and lacks 1[12]", recipe_refused(capsys, "train_ham.py", *words))
        assert not (tmp_path / "run").exists()


class TestOwnRun:
    def test_calibrated_again_starts_from_the_original(self, own, tmp_path, monkeypatch):
        """F 0 gives the weights back that were trained, bit for bit, in the same plain architecture."""
        folder, _ = own
        read = spy_on_images(monkeypatch)
        run(folder, "--fairness=0", f"--output_dir={tmp_path / 'out'}")
        validation = everything(digits().validation)
        assert all(torch.equal(everything(images), validation) for images in {images for images, _ in read})
        record = record_of(folder)
        assert record_of(tmp_path / "out")["original_bias"] == record["original_bias"]
        assert read_biases(load_pixel_model(str(tmp_path / "out")).model.backbone, 10) == record["original_bias"]
        before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path / "out"))
        assert before["architecture"] == after["architecture"] == "resnet18"
        assert {**before["ham_hf"], "calibration": 0} == {**after["ham_hf"], "calibration": 0}
        assert before["pretrained_cfg"] == after["pretrained_cfg"]

    def test_killed_and_repeated(self, own, tmp_path, monkeypatch):
        folder, _ = own
        run(folder, "--fairness=1", f"--output_dir={tmp_path / 'whole'}")
        strike, strikes = calibration._Meter._predictions, []

        def stop(*given):
            strikes.append(1)
            if len(strikes) == 5:
                raise KeyboardInterrupt
            return strike(*given)

        arguments = ["--fairness=1", f"--output_dir={tmp_path / 'out'}"]
        with monkeypatch.context() as patch:
            patch.setattr(calibration._Meter, "_predictions", stop)
            with pytest.raises(SystemExit) as stopped:
                run(folder, *arguments)
        assert stopped.value.code == 130
        assert not (tmp_path / "out" / "model.safetensors").exists()
        run(folder, *arguments)
        assert record_of(tmp_path / "out") == record_of(tmp_path / "whole")
        assert not (tmp_path / "out" / "evaluation-progress").exists()

    def test_what_is_refused(self, own, capsys, tmp_path):
        folder, _ = own
        out = f"--output_dir={tmp_path / 'out'}"
        again = refused(capsys, folder, out, "--fairness=1", "--calibration_split=train")
        assert "--calibration_split train is the training split" in again
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").touch()
        assert "already holds files" in refused(capsys, folder, out, "--fairness=1")


class TestStranger:
    @pytest.mark.parametrize("name", [*FAMILIES, "deit_tiny_distilled_patch16_224"])
    def test_every_family(self, name, tmp_path):
        """Folded and published: plain timm's logits are the old ones plus the shift, bit for bit those of a copy."""
        arguments = dict(FAMILIES.get(name, {"embed_dim": 24, "depth": 1, "num_heads": 2}))
        stranger(name, tmp_path / "model", label_names=NAMES, **arguments)
        original = load_pixel_model(str(tmp_path / "model"))
        check_foldable(original.model, num_classes=2, image_size=32)
        shifts = torch.tensor([0.7, -0.7])
        found = {"shifts": (0.7, -0.7), "factors": (1.0,) * 2, "counts": (2, 2)}
        point = calibration.frontier_point(0.0, [1, 1], [2, 2])
        report = made_up_calibration(fairness=0.0, frontier=(point,), **found)
        config = parse_calibrate_config([f"{tmp_path / 'model'}", "--fairness=1", f"--output_dir={tmp_path / 'out'}"])
        names = {"class_names": NAMES, "model_license": "bsd-3-clause"}
        calibration_run.export_calibrated(config, original, report, shifts, **names)
        new = load_pixel_model(str(tmp_path / "out"))
        x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            torch.testing.assert_close(new.model(x), original.model(x) + shifts, rtol=1e-5, atol=1e-5)
            if new.model.upsample == 1:
                assert torch.equal(new.model(x), calibration_run.folded(original, shifts).model(x))
        assert new.class_names == tuple(NAMES)
        cfg = json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]
        assert (cfg["license"], cfg["tag"]) == ("bsd-3-clause", "strong")
        calibration_run.restore_original(new)
        assert read_biases(new.model.backbone, 2) == read_biases(original.model.backbone, 2)

    def test_labels_are_matched_by_name(self, quick, colors, tmp_path):
        """The shift of a class goes to the logit of its name, in whatever order model and data have them."""
        found = []
        for names in (NAMES, NAMES[::-1]):
            folder = tmp_path / names[0]
            model = stranger("test_resnet", folder / "model", label_names=names)
            if names != NAMES:
                with torch.no_grad():
                    for part in (model.fc.weight, model.fc.bias):
                        part.copy_(part.flip(0))
                save_for_hf(model, folder / "model", model_config={"label_names": names}, safe_serialization=True)
            split = [f"--dataset_name={colors}", "--calibration_split=extra"]
            run(folder / "model", "--fairness=1", *split, f"--output_dir={folder / 'out'}")
            found.append(record_of(folder / "out")["shifts"])
            assert load_pixel_model(str(folder / "out")).class_names == tuple(names)
        assert found[0] != [0.0, 0.0]
        assert found[0] == pytest.approx(found[1][::-1], abs=1e-6)

    def test_classes_that_the_dataset_lacks_keep_zero(self):
        aligned = ReorderedLogits(torch.nn.Identity(), [2, 0])
        assert calibration_run.shifts_of_logits(aligned, (0.5, -0.25), 4).tolist() == [-0.25, 0.0, 0.5, 0.0]

    def test_a_dataset_of_some_of_imagenets_classes(self, quick, tmp_path):
        """As ImageNet-A: timm's models name no classes, and the published one names all that they have."""
        synsets = imagenet_synsets(1000)
        names = (synsets[7], synsets[3])
        splits = {split: examples(number, names=names) for number, split in enumerate(("train", "extra"))}
        data = write_parquet(tmp_path / "data", **splits, test=examples(2, 6, names))
        stranger("test_resnet", tmp_path / "model", num_classes=1000)
        split = [f"--dataset_name={data}", "--calibration_split=extra"]
        run(tmp_path / "model", "--fairness=1", *split, f"--output_dir={tmp_path / 'out'}")
        assert load_pixel_model(str(tmp_path / "out")).class_names == synsets
        shifts = torch.tensor(record_of(tmp_path / "out")["shifts"])
        assert set(shifts.nonzero()[:, 0].tolist()) <= {3, 7}

    def test_numbers_name_the_logits_of_a_model_that_names_none(self, tmp_path):
        stranger("test_resnet", tmp_path / "model", num_classes=3)
        loaded = load_pixel_model(str(tmp_path / "model"))
        for names in (("2", "0", "1"), ("0", "1", "2")):
            aligned, _ = align_classes(loaded, names)
            assert calibration_run.own_class_names(loaded, aligned, names) == ("0", "1", "2")

    def test_reads_the_named_split_alone(self, quick, colors, model, tmp_path, monkeypatch):
        read = spy_on_images(monkeypatch)
        split = [f"--dataset_name={colors}", "--calibration_split=extra"]
        run(model, "--fairness=0.5", *split, f"--output_dir={tmp_path / 'out'}")
        inputs = load_pixel_model(str(model)).preprocessing
        geometry = {"interpolation": inputs.interpolation, "crop_pct": inputs.crop_pct}
        geometry |= {"image_size": 32, "default_image_size": 32}
        extra = load(colors, train_split="extra", test_split="train", validation_fraction=0, **geometry).train
        expected, others = everything(extra), load(colors, validation_fraction=0, **geometry)
        assert not any(torch.equal(expected[:12], everything(part)[:12]) for part in (others.train, others.test))
        assert all(torch.equal(everything(images), expected) for images in {images for images, _ in read})
        assert load_pixel_model(str(tmp_path / "out")).class_names == tuple(NAMES)

    def test_card_and_report_say_that_training_images_were_allowed(self, quick, colors, model, tmp_path):
        data = ["--fairness=1", f"--dataset_name={colors}", f"--output_dir={tmp_path / 'out'}"]
        run(model, *data, "--calibration_split=train", "--allow_training_images")
        report = read_report(tmp_path / "out")
        assert report.calibration.seen_in_training
        assert any("that the model was trained on" in note for note in report.notes)
        card = (tmp_path / "out" / "README.md").read_text()
        assert "found on images that the model was trained on (its own training images" in " ".join(card.split())

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("", "name a split that it was not trained on"),
            ("--calibration_split=train", "say --allow_training_images"),
            ("--calibration_split=test --allow_training_images", "--calibration_split test is the test split"),
            ("--calibration_split=extra --limit_calibration_examples=30", "'b' has 15 and lacks 5"),
        ],
    )
    def test_images_that_will_not_do_are_refused(self, colors, model, tmp_path, capsys, words, message):
        data = ["--fairness=1", f"--dataset_name={colors}", f"--output_dir={tmp_path / 'out'}"]
        assert message in refused(capsys, model, *data, *words.split())

    def test_a_head_without_bias_is_refused_by_name(self, colors, model, tmp_path, capsys, monkeypatch):
        loaded = load_pixel_model(str(model))
        loaded.model.backbone.fc.register_parameter("bias", None)
        monkeypatch.setattr(calibration_run, "load_pixel_model", lambda *_, **__: loaded)
        split = [f"--dataset_name={colors}", "--calibration_split=extra"]
        message = refused(capsys, model, "--fairness=1", *split, f"--output_dir={tmp_path / 'out'}")
        assert "test_resnet: the Linear that makes its logits has no bias to shift" in message
        assert not (tmp_path / "out").exists()


def labeled(split: int, *labels: str, per_class: int = 6, names=None):
    """Images of these classes, ordered by class; labels are strings, or count ``names``."""
    values = [label for label in labels for _ in range(per_class)]
    images = [noise(1000 * split + number, (32, 32)) for number in range(len(values))]
    if names is None:
        return dataset(images, values, label_feature=datasets.Value("string"))
    return dataset(images, list(map(names.index, values)), label_feature=datasets.ClassLabel(names=list(names)))


def ordinary():
    """Splits to train and to test on."""
    return {"train": labeled(0, "a", "b"), "test": labeled(2, "a", "b")}


class TestNamedSplit:
    """Which images a named split gives, without a search."""

    @pytest.fixture
    def found_in(self, tmp_path):
        """What is found to calibrate on in a dataset of these splits, of which the model has seen some."""

        def find(split="extra", *words, num_classes=2, trained_on=None, **splits):
            data = write_parquet(tmp_path / "data", **splits)
            stranger("test_resnet", tmp_path / "model", num_classes=num_classes)
            loaded = load_pixel_model(str(tmp_path / "model"))
            if trained_on is not None:
                record = load(data, train_split=trained_on, validation_fraction=0.0).provenance.record()
                loaded = dataclasses.replace(loaded, metadata={"trained_on": record})
            named = [f"--dataset_name={data}", f"--calibration_split={split}", "--fairness=1", *words]
            config = parse_calibrate_config([str(tmp_path / "model"), *QUICK, *named])
            return calibration_run.images_to_calibrate_on(loaded, config)

        return find

    def test_new_images_in_the_same_order_are_not_the_training_images(self, found_in):
        """As many images of each class, class after class, as in class folders: pixels tell the splits apart."""
        splits = {split: labeled(number, "a", "b", per_class=24) for number, split in enumerate(("train", "extra"))}
        found = found_in(**splits, test=labeled(2, "a", "b"), trained_on="train")
        assert not found.seen_in_training
        assert found.origin == "48 images of split extra"

    def test_training_images_under_another_name_are_recognized(self, found_in):
        same = labeled(0, "a", "b", per_class=24)
        with pytest.raises(ValueError, match="--calibration_split copy is the training split"):
            found_in("copy", **ordinary(), seen=same, copy=same, trained_on="seen")

    @pytest.mark.parametrize(("trained_on", "seen"), [(None, False), ("validation", True)])
    def test_a_validation_split_without_train_is_not_what_it_was_trained_on(self, found_in, trained_on, seen):
        splits = {"validation": labeled(0, "a", "b", per_class=24), "test": labeled(2, "a", "b")}
        words = ("--train_split=validation", "--allow_training_images")
        assert found_in("validation", *words, **splits, trained_on=trained_on).seen_in_training == seen

    def test_an_unknown_split_is_named_with_its_own_flag(self, found_in):
        message = "--calibration_split nope: the dataset has no such split; there are 'train'"
        with pytest.raises(ValueError, match=message):
            found_in("nope", **ordinary())

    def test_one_test_image_is_read_without_a_warning(self, found_in, caplog):
        found_in(**ordinary(), extra=labeled(1, "a", "b", per_class=20))
        assert "no example" not in caplog.text

    @pytest.mark.parametrize("declared", [False, True])
    def test_labels_are_those_of_the_other_splits_by_name(self, declared, found_in):
        """Classes that the split lacks, or that it declares in another order."""
        here = (["d", "a", "c"], ["d", "c", "b", "a"]) if declared else (["c", "d", "a"], None)
        others = list("abcd") if declared else None
        found = found_in(
            train=labeled(0, *"abcd", names=others),
            extra=labeled(1, *here[0], per_class=20, names=here[1]),
            test=labeled(2, "a", "c", names=others),
            num_classes=4,
        )
        assert found.data.class_names == tuple("abcd")
        assert found.images.labels.tolist() == ["abcd".index(name) for name in here[0] for _ in range(20)]

    def test_a_class_that_only_this_split_has_is_refused(self, found_in):
        extra = labeled(1, "a", "b", "x", "y", per_class=20)
        with pytest.raises(ValueError, match=r"--calibration_split extra has classes .* do not have: x, y"):
            found_in(**ordinary(), extra=extra)


CALIBRATE = """
import json, sys
import ham_hf.evaluation.calibration as calibration
from ham_hf.commands.calibrate import main
calibration.FRONTIER, calibration.NUM_ROUNDS = (0.0,), 2
for words in json.loads(sys.argv[1]):
    main(words)
"""
CARD = """---
license: cc-by-4.0
tags: [timm, strong, image-classification]
---
# Strong
"""


def published(hub: Hub, name: str, folder) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.add("model", name, {**files, "README.md": CARD.encode()})


def test_strangers_on_the_hub(colors, tmp_path):
    """A Hub id and a timm name, whose weights, license and tags come from the Hub; the latter has 998 more classes."""
    names = [f"n{index}" for index in range(1000)]
    many = {split: examples(number, 20, names, 160) for number, split in enumerate(("train", "extra", "test"))}
    data = {"them/strong": colors, "test_resnet.r160_in1k": write_parquet(tmp_path / "data", **many)}
    ids = {"them/strong": "them/strong", "test_resnet.r160_in1k": "timm/test_resnet.r160_in1k"}
    stranger("test_resnet", tmp_path / "two")
    stranger("test_resnet", tmp_path / "many", num_classes=1000, size=160)
    with Hub() as hub:
        published(hub, "them/strong", tmp_path / "two")
        published(hub, "timm/test_resnet.r160_in1k", tmp_path / "many")
        options = [*QUICK, "--fairness=1", "--calibration_split=extra"]
        places = {name: [f"--dataset_name={data[name]}", f"--output_dir={tmp_path / name[:4]}"] for name in data}
        words = [[name, *options, *places[name]] for name in data]
        env = hub_environment(hub, tmp_path / "home", token=None) | {"PYTHONPATH": str(ROOT)}
        finish([sys.executable, "-c", CALIBRATE, json.dumps(words)], env)
    for name, num_classes in zip(data, (2, 1000), strict=True):
        out = tmp_path / name[:4]
        shifts = record_of(out)["shifts"]
        assert len(shifts) == num_classes
        assert shifts[2:] == [0.0] * (num_classes - 2)
        metadata = yaml.safe_load((out / "README.md").read_text().split("---")[1])
        assert metadata["license"] == "cc-by-4.0"
        assert metadata["base_model"] == ids[name]
        assert {"strong", "ham_hf", "class-shifts"} <= set(metadata["tags"])
        assert "adversarial-training" not in metadata["tags"]
