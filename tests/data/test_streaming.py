"""A streamed training split: its order, its parts, resuming, archives, and what is refused."""

from __future__ import annotations

import io
import json
import tarfile
import threading
from itertools import chain, islice
from pathlib import Path

import datasets
import fsspec
import pytest
import torch

import ham_hf.data.streaming
from ham_hf.data import UpdateLayout
from ham_hf.data.declarations import StreamError
from ham_hf.data.decoding import CorruptImageError
from ham_hf.data.shards import SplitFiles, count_rows, held_out_rows
from ham_hf.data.streaming import buffer_order, num_lanes
from ham_hf.methods import FAAL, HAM
from ham_hf.training.data_order import training_class_counts
from tests.support.example_images import dataset, encode, gray, gray_values, grays, load, noise, write_parquet

CPU = torch.device("cpu")
FILES = (11, 7, 13, 9, 10)  # examples of each training file; 50 in all
TWO_CLASSES = datasets.ClassLabel(names=["c0", "c1"])


def write_files(folder, train, **splits):
    """The Hub's layout with several files of train."""
    write_parquet(folder, **splits)
    for number, examples in enumerate(train):
        examples.to_parquet(folder / "data" / f"train-{number:05d}-of-00009.parquet")
    return str(folder)


def numbered_files(folder, files=FILES):
    """Training example i has the gray value i and the label i % 2; test examples are lighter."""
    starts = [sum(files[:number]) for number in range(len(files))]
    train = [grays(rows, first=start) for start, rows in zip(starts, files, strict=True)]
    return write_files(folder, train, validation=grays(6, first=200))


def stream(folder, **options):
    defaults = {"dataset_streaming": True, "validation_fraction": 0.0, "augmentation": "none"}
    return load(folder, **{**defaults, "dataloader_num_workers": 0, "shuffle_buffer_size": 8, **options})


def epoch(data, *, number=0, first=0, per_update=4, batch=4, world=1, rank=0):
    layout = UpdateLayout(batch_size=batch, accumulation=per_update // (batch * world), world=world, rank=rank, seed=0)
    return list(data.train.batches(layout, epoch=number, first_update=first, device=CPU))


def numbers(batches):
    return [batch.indices.tolist() for batch in batches]


def flat(lists):
    return list(chain.from_iterable(lists))


def values(batch):
    """Gray values, which are the numbers of the examples."""
    return (batch.x[:, 0, 0, 0] * 255).round().int().tolist()


# --- the order


def naive_buffer(length, size, draws):
    waiting, held, given = list(range(size, length)), list(range(min(size, length))), []
    for draw in draws:
        place = int(draw * len(held))
        given.append(held[place])
        if waiting:
            held[place] = waiting.pop(0)
        else:
            held[place] = held[-1]
            held.pop()
    return given


@pytest.mark.parametrize(("length", "size"), [(30, 7), (30, 1), (5, 9), (1, 1)])
def test_shuffle_buffer_gives_everything_once_and_holds_no_more_than_it_may(length, size):
    order = buffer_order(length, size, torch.Generator().manual_seed(3)).tolist()
    assert sorted(order) == list(range(length))
    assert all(place < number + size for number, place in enumerate(order))
    draws = torch.rand(length, generator=torch.Generator().manual_seed(3), dtype=torch.float64).tolist()
    assert order == naive_buffer(length, size, draws)


@pytest.mark.parametrize(
    ("per_update", "files", "lanes"),
    [(8, 3, 2), (8, 100, 8), (1024, 300, 8), (8192, 300, 64), (7, 100, 7), (13, 9, 1)],
)
def test_lanes_divide_an_update(per_update, files, lanes):
    assert num_lanes(per_update, files) == lanes


def test_each_example_comes_once_and_updates_are_the_same_for_any_number_of_processes(tmp_path):
    data = stream(numbered_files(tmp_path / "set"))
    assert len(data.train) == 50
    alone = numbers(epoch(data, per_update=8, batch=8))
    assert len(alone) == 6
    seen = flat(alone)
    assert len(set(seen)) == 48
    assert set(seen) <= set(range(50))
    assert seen != sorted(seen)
    for world, batch in ((1, 2), (2, 4), (2, 2), (4, 2), (8, 1)):
        ranks = [numbers(epoch(data, per_update=8, batch=batch, world=world, rank=rank)) for rank in range(world)]
        steps = 8 // (batch * world)
        for update, together in enumerate(alone):
            parts = [flat(mine[update * steps : (update + 1) * steps]) for mine in ranks]
            assert flat(parts) == together


def test_epochs_differ_and_seeds_differ_and_pixels_and_labels_belong_to_the_numbers(tmp_path):
    data = stream(numbered_files(tmp_path / "set"))
    first, second = epoch(data), epoch(data, number=1)
    assert numbers(first) != numbers(second)
    assert numbers(first) == numbers(epoch(data))
    for batch in first:
        assert values(batch) == batch.indices.tolist()
    labels = {number: label for batch in first for number, label in zip(values(batch), batch.y.tolist(), strict=True)}
    ends = [sum(FILES[:number]) for number in range(len(FILES))]
    expected = {start + row: row % 2 for start, rows in zip(ends, FILES, strict=True) for row in range(rows)}
    assert labels.items() <= expected.items()


@pytest.mark.parametrize(("augmentation", "workers"), [("timm", 0), ("crop_flip", 2)])
def test_resumed_stream_goes_on_bit_for_bit_without_decoding_what_came_before(
    tmp_path, augmentation, workers, monkeypatch
):
    files = [dataset([noise(10 * f + i, (24, 20)) for i in range(10)], [i % 2 for i in range(10)]) for f in range(4)]
    folder = write_files(tmp_path / "set", files, test=grays(4))
    data = stream(folder, augmentation=augmentation, image_size=16, dataloader_num_workers=workers)
    options = {"per_update": 8, "batch": 2, "world": 2, "rank": 1}
    whole = epoch(data, **options)
    decoded = []
    original = ham_hf.data.streaming.decode_or_explain

    def spy(*args, where):
        decoded.append(where)
        return original(*args, where=where)

    monkeypatch.setattr(ham_hf.data.streaming, "decode_or_explain", spy)
    for first in (1, 3):
        rest = epoch(data, first=first, **options)
        assert len(rest) == len(whole) - 2 * first
        for left, right in zip(rest, whole[2 * first :], strict=True):
            assert all(torch.equal(getattr(left, name), getattr(right, name)) for name in ("x", "y", "indices"))
        if not workers:
            assert len(decoded) == 2 * len(rest)
            decoded.clear()


@pytest.fixture
def opened_files(monkeypatch):
    """Numbers of the files that are read, in order."""
    opened, original = [], ham_hf.data.streaming.Shards.read

    def spy(self, file, start, stop):
        opened.append(file)
        return original(self, file, start, stop)

    monkeypatch.setattr(ham_hf.data.streaming.Shards, "read", spy)
    return opened


def test_resuming_late_does_not_read_the_files_that_are_done_with(tmp_path, opened_files):
    data = stream(numbered_files(tmp_path / "set", (20,) * 6), shuffle_buffer_size=4)
    epoch(data, per_update=1, batch=1)
    assert sorted(opened_files) == list(range(6))
    opened_files.clear()
    epoch(data, first=110, per_update=1, batch=1)
    assert len(opened_files) == 1


def test_a_process_reads_only_the_files_of_its_lanes(tmp_path, opened_files):
    data = stream(numbered_files(tmp_path / "set", (10,) * 8))
    epoch(data, per_update=8, batch=4, world=2, rank=0)
    mine = set(opened_files)
    opened_files.clear()
    epoch(data, per_update=8, batch=4, world=2, rank=1)
    assert (len(mine), len(set(opened_files)), len(mine & set(opened_files))) == (4, 4, 0)


def test_stopping_in_the_middle_leaves_no_thread_behind(tmp_path):
    data = stream(numbered_files(tmp_path / "set"))
    layout = UpdateLayout(batch_size=4, accumulation=1, world=1, rank=0, seed=0)
    batches = data.train.batches(layout, epoch=0, first_update=0, device=CPU)
    assert len(list(islice(batches, 2))) == 2
    assert any(thread.name.startswith("ham_hf stream") for thread in threading.enumerate())
    batches.close()
    assert not any(thread.name.startswith("ham_hf stream") for thread in threading.enumerate())


# --- the parts


def test_held_out_are_the_first_rows_of_every_file_and_train_never_sees_them(tmp_path):
    data = stream(numbered_files(tmp_path / "set"), validation_fraction=0.2)
    starts = [sum(FILES[:number]) for number in range(len(FILES))]
    held_out = held_out_rows(FILES, 0.2)
    assert sum(held_out) == 10
    expected = {start + row for start, rows in zip(starts, held_out, strict=True) for row in range(rows)}
    assert set(gray_values(data.validation)) == expected
    assert len(data.train) == 40
    seen = {number for some in range(5) for batch in epoch(data, number=some) for number in values(batch)}
    assert seen == set(range(50)) - expected
    assert len(data.test) == 6


@pytest.mark.parametrize(("files", "fraction"), [((5, 5), 0.9), ((1, 1, 8), 0.5), ((100,) * 7, 0.013), ((0, 4), 0.5)])
def test_held_out_part_has_its_share_and_leaves_every_file_one(files, fraction):
    found = held_out_rows(files, fraction)
    assert all(0 <= held < max(rows, 1) for held, rows in zip(found, files, strict=True))
    assert sum(found) <= round(fraction * sum(files))
    if fraction < 0.1:
        assert sum(found) == round(fraction * sum(files))


@pytest.mark.faults(quick=True)
def test_a_file_that_is_cut_off_is_named_while_its_rows_are_counted(tmp_path):
    folder = numbered_files(tmp_path / "set")
    file = sorted(Path(folder).glob("data/train-*"))[2]
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(StreamError, match=rf"{file.name} cannot be read \(\w+: .*(magic bytes|[Pp]arquet)"):
        stream(folder)


@pytest.mark.faults(quick=True)
def test_a_missing_label_is_named_where_classes_are_counted(tmp_path):
    examples = dataset([gray(value) for value in range(6)], [0, 1, 0, None, 1, 0], label_feature=TWO_CLASSES)
    folder = write_files(tmp_path / "set", [examples], validation=grays(6, first=200))
    data = stream(folder, validation_fraction=0.3)
    with pytest.raises(StreamError, match=r"train-00000-of-00009\.parquet, row 3: label None"):
        training_class_counts(data.train, FAAL(), 2)


def test_class_counts_come_from_the_label_column_of_what_is_trained_on(tmp_path):
    folder = write_files(
        tmp_path / "set",
        [dataset([gray(i) for i in range(4)], [2, 0, 0, 1]), dataset([gray(i) for i in range(3)], [2, 2, 2])],
        test=dataset([gray(0), gray(1), gray(2)], [0, 1, 2]),
    )
    data = stream(folder, validation_fraction=0.3)
    assert training_class_counts(data.train, FAAL(), 3).tolist() == [2, 1, 2]
    assert training_class_counts(data.train, HAM(), 3).isnan().all()


@pytest.mark.parametrize("streaming", [False, True])
def test_test_split_without_labels_is_passed_over(tmp_path, streaming):
    """As in ImageNet-1k, whose test labels are all -1."""
    hidden = dataset([gray(0), gray(1)], [-1, -1], label_feature=TWO_CLASSES)
    folder = write_files(tmp_path / "set", [grays(10)], validation=grays(4), test=hidden)
    data = load(folder, dataset_streaming=streaming, validation_fraction=0.2)
    assert (data.test_split_origin, len(data.test)) == ("validation", 4)
    with pytest.raises(ValueError, match=r"split 'test', .* 2 of 2 examples have no label"):
        load(folder, dataset_streaming=streaming, validation_fraction=0.2, test_split="test")


def test_a_new_version_of_the_files_is_read_anew(tmp_path):
    folder = numbered_files(tmp_path / "set")
    assert len(stream(folder).train) == 50
    grays(3).to_parquet(tmp_path / "set" / "data" / "train-00000-of-00009.parquet")
    assert len(stream(folder).train) == 50 - FILES[0] + 3


# --- archives


def write_archive(path, values, *, start=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("LICENSE"))  # no example, as datasets reads it
        for number, value in enumerate(values, start):
            texts = {"cls": str(value % 2).encode(), "json": json.dumps({"v": value}).encode()}
            members = {"png": encode(gray(value)), **texts}
            for extension, content in members.items():
                info = tarfile.TarInfo(f"ex{number:04d}.{extension}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))


CARD = """---
dataset_info:
  features:
  - name: png
    dtype: image
  - name: cls
    dtype:
      class_label:
        names:
          '0': even
          '1': odd
---
"""


def archives(folder, lengths=(5, 7), *, card=True):
    start = 0
    for number, length in enumerate(lengths):
        write_archive(folder / f"set-train-{number}.tar", list(range(start, start + length)), start=start)
        start += length
    write_archive(folder / "set-validation-0.tar", [200, 201, 202])
    if card:
        (folder / "README.md").write_text(CARD)
    return str(folder)


def test_webdataset_archives(tmp_path):
    data = stream(archives(tmp_path / "set"), validation_fraction=0.17)
    assert data.class_names == ("even", "odd")
    assert (len(data.train), len(data.validation or []), len(data.test)) == (10, 2, 3)
    batches = epoch(data, per_update=2, batch=2)
    assert sorted(flat(map(values, batches))) == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    assert all(batch.y.tolist() == [value % 2 for value in values(batch)] for batch in batches)
    (tmp_path / "set" / "README.md").write_text(CARD.replace("even", "3").replace("odd", "5"))
    assert load(str(tmp_path / "set"), label_column="cls").class_names == ("3", "5"), "which YAML reads as numbers"
    with pytest.raises(ValueError, match=r"--method faal needs the number of training images of each class"):
        training_class_counts(data.train, FAAL(), 2)


def test_archives_without_names_of_classes_are_refused(tmp_path):
    folder = archives(tmp_path / "set", card=False)
    with pytest.raises(ValueError, match=r"--dataset_streaming: column 'cls' is int64, and the classes .*README\.md"):
        stream(folder, label_column="cls")


def archive_files(*files):
    return SplitFiles(split="train", files=files, version="1", stream=None)


def test_number_of_examples_of_archives(tmp_path):
    folder = Path(archives(tmp_path / "set"))
    files = [str(folder / f"set-train-{number}.tar") for number in (0, 1)]
    assert count_rows(archive_files(*files), None) == (5, 7)
    assert count_rows(archive_files(*files), 12) == (5, 7)
    with pytest.raises(ValueError, match=r"--num_train_examples 13: the files have 12 examples"):
        count_rows(archive_files(*files), 13)
    info = {"splits": {"train": {"filenames": ["set-train-0.tar", "set-train-1.tar"], "shard_lengths": [4, 6]}}}
    (folder / "_info.json").write_text(json.dumps(info))
    assert count_rows(archive_files(*files), None) == (4, 6)


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize(
    "text",
    [
        '{"splits": {"train": {"filenames": ["set-train-0.tar"]}}}',
        *(
            f'{{"splits": {{"train": {{"filenames": ["set-train-0.tar"], "shard_lengths": [{length}]}}}}}}'
            for length in ("-1", "1e999", "2.5", "true", '"7"', "null", "1" + 18 * "0")
        ),
        100_000 * "[",
        "[" + 2**26 * " " + "]",
        "\xff",
    ],
    ids=lambda text: text[-25:-3].strip()[:20] or "white",
)
def test_hostile_list_of_archives(tmp_path, text):
    folder = Path(archives(tmp_path / "set"))
    (folder / "_info.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"_info\.json: expected splits with filenames and shard_lengths"):
        count_rows(archive_files(str(folder / "set-train-0.tar")), None)


def test_remote_archives_need_a_number_of_examples():
    files = ["memory://set/a.tar", "memory://set/b.tar"]
    with fsspec.open(files[0], "wb") as opened:
        opened.write(b"")
    with pytest.raises(ValueError, match=r"needs the number of training examples.*--num_train_examples"):
        count_rows(archive_files(*files), None)
    assert count_rows(archive_files(*files), 13) == (6, 6)
    with pytest.raises(ValueError, match=r"--num_train_examples 1: there are 2 archives"):
        count_rows(archive_files(*files), 1)


# --- what goes wrong


@pytest.mark.faults(quick=True)
def test_a_file_that_is_shorter_than_it_should_be(tmp_path):
    folder = Path(archives(tmp_path / "set"))
    info = {"splits": {"train": {"filenames": ["set-train-0.tar", "set-train-1.tar"], "shard_lengths": [9, 7]}}}
    (folder / "_info.json").write_text(json.dumps(info))
    with pytest.raises(StreamError, match=r"set-train-0\.tar, row 5: the file ends here, and 9 examples"):
        epoch(stream(str(folder)), per_update=16, batch=16)


@pytest.mark.faults(quick=True)
def test_label_that_is_no_class_and_file_that_vanishes(tmp_path):
    bad = dataset([gray(0), gray(1), gray(2)], [0, 1, -1], label_feature=TWO_CLASSES)
    data = stream(write_files(tmp_path / "set", [bad], test=grays(4)), image_size=8, validation_fraction=0.34)
    with pytest.raises(StreamError, match=r"train-00000-of-00009\.parquet, row 2: label -1, .* declares 2 classes"):
        epoch(data, per_update=2, batch=2)
    (tmp_path / "set" / "data" / "train-00000-of-00009.parquet").unlink()
    with pytest.raises(StreamError, match=r"reading the stream failed .*--resume_from_checkpoint latest"):
        epoch(data, per_update=2, batch=2)


@pytest.mark.faults(quick=True)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_is_named_or_another_one_takes_its_place(tmp_path, workers):
    images = [gray(value) for value in range(6)]
    images[4] = b"no image"
    folder = write_files(tmp_path / "set", [dataset(images, [0, 1] * 3)], test=grays(4))
    options = {"image_size": 8, "dataloader_num_workers": workers, "validation_fraction": 0.2}
    named = r"'train', .*train-00000.*, row 4: the image cannot be read .*--skip_corrupt"
    with pytest.raises(CorruptImageError, match=named):
        epoch(stream(folder, **options), per_update=5, batch=5)
    (batch,) = epoch(stream(folder, skip_corrupt=True, **options), per_update=5, batch=5)
    seen = values(batch)
    assert len(seen) == 5
    assert set(seen) == {1, 2, 3, 5}
    assert batch.y.tolist() == [value % 2 for value in seen]
    assert batch.indices.tolist() == seen


def one_file(folder):
    return write_files(folder, [grays(8)], test=grays(4))


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda folder: "digits", {}, r"--dataset_name digits is the digits of the package, and only parquet"),
        (lambda folder: write_files(folder, [grays(4)]), {}, "no split but 'train' is .*leave --dataset_str"),
        (one_file, {"validation_fraction": 0.01}, "--validation_fraction 0.01 of 8 examples in 1 files leaves none"),
        (one_file, {"num_train_examples": 9}, "--num_train_examples 9: the files have 8 examples"),
    ],
)
def test_what_is_refused(tmp_path, make, options, message):
    with pytest.raises(ValueError, match=message):
        stream(make(tmp_path / "set"), **options)


def test_class_folders_and_saved_datasets_are_refused(tmp_path):
    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "folders" / split / name).mkdir(parents=True)
            gray(1).save(tmp_path / "folders" / split / name / "1.png")
    with pytest.raises(ValueError, match=r"folders is read by datasets' ImageFolder, and only parquet"):
        stream(str(tmp_path / "folders"))
    datasets.DatasetDict(train=grays(4), test=grays(4)).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match=r"saved is a folder written by save_to_disk, and only parquet"):
        stream(str(tmp_path / "saved"))
