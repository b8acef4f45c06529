"""Training examples read as a stream: their order, each process's part of it, and decoding in workers.

The order of an epoch is a function of (seed, epoch) and of what an update takes, not of the number of processes:

- The files are permuted, what remains of a whole number of updates is left out at the end, and the sequence of
  examples is cut into equally long *lanes*: eight, or one per 128 examples of an update if these are more, or fewer
  where there are fewer files or where that number does not divide an update (`num_lanes`).
- Each lane is shuffled through a buffer: the next example is drawn from those that the buffer holds, and the next one
  of the lane takes its place. Which one is drawn is decided before anything is read, so the order is known in advance.
- Every update takes the same number of examples from each lane. A process reads the lanes that its part of the update
  comes from; where the number of processes divides that of lanes, a lane is read by one process.

So every process has equally many examples, each example comes at most once in an epoch, and a resumed run, also with
another number of processes, continues with the examples that the uninterrupted one would have seen. It reads again
what the buffer holds at that place, row groups of parquet files and archives from their beginning, and decodes nothing
that came before.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from ham_hf.data.decoding import CorruptImageError, PixelTransform, decode_or_explain
from ham_hf.data.pixels import (
    PixelBatch,
    UpdateLayout,
    augment_batch,
    done_by_workers,
    isolated_rng,
    seed_for_example,
    to_unit_interval,
)
from ham_hf.data.shards import Example, Shards
from ham_hf.seeding import Stream, derive_seed, make_generator

logger = logging.getLogger(__name__)

EXAMPLES_PER_LANE = 128  # of an update
MIN_LANES = 8
READ_AHEAD = 2  # batches that are read, not yet decoded, beside those that the workers have

T = TypeVar("T")


def num_lanes(per_update: int, num_files: int) -> int:
    """Lanes of the stream: a divisor of ``per_update``, so that every update takes equally many examples of each.

    The largest one that is at most one per 128 examples of an update (but eight may be), and one per file.
    """
    most = min(num_files, max(MIN_LANES, per_update // EXAMPLES_PER_LANE))
    return next(lanes for lanes in range(min(most, per_update), 0, -1) if per_update % lanes == 0)


def buffer_order(length: int, buffer_size: int, generator: torch.Generator) -> Tensor:
    """Order (length,) in which a shuffle buffer gives 0, 1, ...: entry t is less than ``t + buffer_size``."""
    size = min(buffer_size, length)
    held, order = list(range(size)), []
    for incoming, draw in enumerate(torch.rand(length, generator=generator, dtype=torch.float64).tolist(), size):
        slot = int(draw * len(held))
        order.append(held[slot])
        if incoming < length:
            held[slot] = incoming
        else:
            held[slot] = held[-1]
            held.pop()
    return torch.tensor(order, dtype=torch.int64)


class Stretch(NamedTuple):
    """Rows ``start`` to ``stop`` of the file of a number."""

    file: int
    start: int
    stop: int


def lane_stretches(shards: Shards, whole: int, lanes: int, generator: torch.Generator) -> list[list[Stretch]]:
    """The rows that each lane of an epoch reads, in order: ``whole`` examples of permuted files, cut up."""
    files = torch.randperm(len(shards.num_rows), generator=generator).tolist()
    length = whole // lanes
    found: list[list[Stretch]] = [[] for _ in range(lanes)]
    place = 0
    for file in files:
        row, end = shards.num_held_out[file], shards.num_rows[file]
        while row < end and place < whole:
            stop = min(end, row + length - place % length)
            found[place // length].append(Stretch(file, row, stop))
            place += stop - row
            row = stop
    return found


class Request(NamedTuple):
    """The examples of a batch, not yet decoded, and the seed of its augmentation."""

    examples: list[Example]
    seed: int


class TrainingStream:
    """The training examples of a dataset that is not copied.

    Args:
        shards: the files.
        train_transform: from an image to (C, S, S) uint8 pixels, random if the augmentation is timm's.
        augmentation: see `ham_hf.data.pixels.augment_batch`.
        in_chans: channels to decode to, 1 or 3.
        buffer_size: examples of the shuffle buffers of all lanes together; they are spread over the processes.
        num_workers: processes that decode; 0 decodes in the calling one.
        skip_corrupt: take another example of the batch twice where one cannot be read, and log it.
    """

    def __init__(
        self,
        shards: Shards,
        train_transform: PixelTransform,
        *,
        augmentation: str,
        in_chans: int,
        buffer_size: int,
        num_workers: int,
        skip_corrupt: bool,
    ) -> None:
        self.shards, self.buffer_size = shards, buffer_size
        self._augmentation, self._num_workers = augmentation, num_workers
        # No closure: a process that is not forked gets it by pickle.
        self._decode = partial(_decode, train_transform, in_chans, skip_corrupt)

    def __len__(self) -> int:
        return sum(self.shards.num_rows) - sum(self.shards.num_held_out)

    def plan(self, per_update: int) -> list[Any]:
        """Settings that a resumed run must share to get the same examples; JSON types."""
        return [self.buffer_size, num_lanes(per_update, len(self.shards.num_rows)), list(self.shards.num_rows)]

    def batches(
        self, layout: UpdateLayout, *, epoch: int, first_update: int, device: torch.device
    ) -> Iterator[PixelBatch]:
        """This process's batches of an epoch from an update on, one per accumulation step, in order.

        Args:
            layout: how updates are made.
            epoch: 0-based epoch.
            first_update: 0-based update of the epoch to begin with; earlier images are not decoded.
            device: where the batches go.

        Raises:
            StreamError: if the stream breaks.
            CorruptImageError: if an image cannot be read, unless ``skip_corrupt``.
        """
        requests = self._requests(layout, epoch, first_update)
        # A thread reads, as it only waits for files and network; workers decode.
        with closing(_read_ahead(requests, READ_AHEAD)) as ready:
            batches = done_by_workers(self._decode, ready, self._num_workers, device)
            for pixels, labels, indices, request_seed in batches:
                pixels = augment_batch(pixels.to(device, non_blocking=True), self._augmentation, request_seed)
                yield PixelBatch(to_unit_interval(pixels), labels.to(device, non_blocking=True), indices.cpu())

    def _requests(self, layout: UpdateLayout, epoch: int, first_update: int) -> Generator[Request, None, None]:
        cpu, seed, rank, batch_size = torch.device("cpu"), layout.seed, layout.rank, layout.batch_size
        per_update = layout.per_update
        updates = len(self) // per_update
        lanes = num_lanes(per_update, len(self.shards.num_rows))
        stretches = lane_stretches(
            self.shards, updates * per_update, lanes, make_generator(cpu, seed, Stream.DATA_ORDER, epoch)
        )
        share, of_lane = per_update // layout.world, per_update // lanes
        readers = []
        for lane in range(rank * share // of_lane, math.ceil((rank + 1) * share / of_lane)):
            generator = make_generator(cpu, seed, Stream.DATA_ORDER, epoch, 1 + lane)
            order = buffer_order(updates * of_lane, max(1, self.buffer_size // lanes), generator)
            # An update's examples are numbered lane by lane; this process takes those from rank * share on.
            mine = slice(max(0, rank * share - lane * of_lane), (rank + 1) * share - lane * of_lane)
            readers.append(_read_lane(self.shards, stretches[lane], order.view(updates, of_lane)[first_update:, mine]))
        with ExitStack() as opened:
            for reader in readers:
                opened.enter_context(closing(reader))
            for update, parts in enumerate(zip(*readers, strict=True), first_update):
                examples = [example for part in parts for example in part]
                for step in range(layout.accumulation):
                    place = (epoch, update * layout.accumulation + step, rank)
                    batch = examples[step * batch_size : (step + 1) * batch_size]
                    yield Request(batch, derive_seed(seed, Stream.AUGMENTATION, *place))


def _read_lane(shards: Shards, stretches: Sequence[Stretch], order: Tensor) -> Generator[list[Example], None, None]:
    """The examples of a lane, one list per update; ``order`` (updates, examples) has their places in the lane."""
    wanted = torch.zeros(sum(stretch.stop - stretch.start for stretch in stretches), dtype=torch.bool)
    wanted[order.flatten()] = True

    def read() -> Generator[tuple[int, Example], None, None]:
        place = 0
        for file, start, stop in stretches:
            needed = torch.nonzero(wanted[place : place + stop - start]).flatten().tolist()
            if needed:
                # Held by this generator alone, and closed with it.
                with closing(shards.read(file, start + needed[0], start + needed[-1] + 1)) as rows:
                    for number, example in enumerate(rows, place + needed[0]):
                        if wanted[number]:
                            yield number, example
            place += stop - start

    held: dict[int, Example] = {}
    with closing(read()) as reader:
        for places in order:
            batch = []
            for place in places.tolist():
                while place not in held:
                    number, example = next(reader)
                    held[number] = example
                batch.append(held.pop(place))
            yield batch


def _decode(
    transform: PixelTransform, in_chans: int, skip_corrupt: bool, request: Request
) -> tuple[Tensor, Tensor, Tensor, int]:
    """(B, C, S, S) uint8 pixels, (B,) labels and (B,) numbers of the examples of a request, and its seed."""
    pixels: list[Tensor] = []
    kept: list[Example] = []
    errors: list[CorruptImageError] = []
    with isolated_rng():
        for example in request.examples:
            try:
                image = decode_or_explain(example.encoded, in_chans, where=example.where)
            except CorruptImageError as error:
                if not skip_corrupt:
                    raise
                errors.append(error)
                continue
            kept.append(example)
            seed_for_example(request.seed, example.number)
            pixels.append(transform(image))
    for corrupt in errors:
        logger.warning("left out, another example of the batch is taken twice: %s", corrupt)
    if not kept:
        raise errors[0]
    # Batches keep their size, as sums over processes count on it.
    taken = [number % len(kept) for number in range(len(request.examples))]
    labels = torch.tensor([kept[number].label for number in taken])
    numbers = torch.tensor([kept[number].number for number in taken])
    return torch.stack([pixels[number] for number in taken]), labels, numbers, request.seed


def _read_ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The items, made by a thread that is at most ``depth`` ahead; it starts when the first one is asked for."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="ham_hf stream")
    try:
        ahead = deque(pool.submit(next, items, None) for _ in range(depth))
        while (item := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
        items.close()  # and with it the files
