"""Test images that say most about a class, before and after an attack: the most easily broken and the most robust.

A run makes them while it has the model and the data, and keeps them in ``examples.parquet``: one row per image with
three pictures, PNGs if they fit, else smaller JPEGs. The page can then be made again from that file alone. The file is
not pushed: images of a dataset may be private (`ham_hf.hub`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from ham_hf.artifacts import EXAMPLES_NAME
from ham_hf.attacks import ThreatModel, evaluation_mode, unsaturated_cross_entropy
from ham_hf.data import BatchRequest, Images, PixelBatch
from ham_hf.evaluation import AttackResult, NamedAttack, predict, standard_attacks
from ham_hf.evaluation.batch_sharing import WorkingSize
from ham_hf.evaluation.config import EvaluationConfig
from ham_hf.evaluation.verdicts import Verdicts, verdicts_of
from ham_hf.files import replacing
from ham_hf.seeding import Stream, make_generator

NUM_EXAMPLES_SHOWN = 8
"""Images of the strip."""
MAX_CLASSES = 12
"""With more classes than this, only the worst of them have images."""
NUM_PER_KIND = 3
MAX_TOTAL_BYTES = 900_000
"""Of all pictures together; as text in a page they take a third more."""
SIDES = (160, 128, 96, 64, 48, 32)
"""Longer side in pixels of JPEGs, tried until all fit."""
WEAK, STRONG = "weak", "strong"
_METADATA = "ham_hf.examples"
_SCHEMA = pa.schema(
    [
        ("label", pa.int32()),
        ("position", pa.int64()),
        ("kind", pa.string()),
        ("margin", pa.float64()),
        ("clean_prediction", pa.int32()),
        ("attacked_prediction", pa.int32()),
        ("enlargement", pa.float64()),
        ("clean", pa.binary()),
        ("attacked", pa.binary()),
        ("difference", pa.binary()),
    ]
)


@dataclass(frozen=True, eq=False, kw_only=True)
class ExampleStrip:
    """A few test images before and after the attack, and the model's predictions for them; on the CPU.

    Attributes:
        clean, adversarial: (N, C, H, W) pixels in [0, 1], C = 1 or 3.
        labels: (N,) true classes.
        clean_predictions, adversarial_predictions: (N,) predicted classes, -1 for logits that are not finite.
        attack: title of the attack.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_predictions: Tensor
    adversarial_predictions: Tensor
    attack: str


@dataclass(frozen=True, kw_only=True)
class ClassExample:
    """One image before and after an attack.

    Attributes:
        label: true class.
        position: in the test split as it was loaded.
        kind: ``WEAK`` or ``STRONG``.
        margin: logit of the true class minus the largest other one, the smallest over the attacks of the evaluation.
        clean_prediction, attacked_prediction: predicted classes; -1 where the logits are not finite.
        enlargement: factor that the difference was multiplied by to be visible.
        clean, attacked, difference: PNGs or JPEGs; the last is attacked minus clean, enlarged around middle gray.
    """

    label: int
    position: int
    kind: str
    margin: float
    clean_prediction: int
    attacked_prediction: int
    enlargement: float
    clean: bytes
    attacked: bytes
    difference: bytes


@dataclass(frozen=True, kw_only=True)
class ClassExamples:
    """Images of some classes; ``attack`` is the title of their attack, for the page."""

    attack: str
    examples: tuple[ClassExample, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class RunExamples:
    """Images of one run: those of the figure, and those of the page (None without an attack)."""

    strip: ExampleStrip
    of_classes: ClassExamples | None


def choose_images(verdicts: Verdicts) -> list[tuple[int, str]]:
    """Rows of the verdicts to show, and the kind of each, class by class; empty without an attack.

    Of each class (at most the ``MAX_CLASSES`` with the smallest share that withstood): the images with the smallest
    and with the largest margin under attack among those that are right when clean, up to ``NUM_PER_KIND`` each.
    """
    usable = (verdicts.clean == verdicts.labels) & verdicts.judged & ~verdicts.margins_attacked.isnan()
    chosen = list[tuple[int, str]]()
    for label in worst_classes(verdicts)[:MAX_CLASSES]:
        rows = (usable & (verdicts.labels == label)).nonzero()[:, 0]
        rows = rows[verdicts.margins_attacked[rows].argsort(stable=True)]
        weak = rows[: min(NUM_PER_KIND, -(-len(rows) // 2))]
        strong = rows[len(weak) :].flip(0)[:NUM_PER_KIND]
        chosen += [(row, WEAK) for row in weak.tolist()] + [(row, STRONG) for row in strong.tolist()]
    return chosen


def worst_classes(verdicts: Verdicts) -> list[int]:
    """The classes that have attacked images, the one with the smallest share that withstood first.

    Without an attack: by the share that is right.
    """
    name = "verdict" if bool(verdicts.judged.any()) else "clean"
    counted, right = verdicts.seen(name), verdicts.right(name)
    shares = [
        (float(right[counted & (verdicts.labels == label)].double().mean()), int(label))
        for label in torch.unique(verdicts.labels[counted]).tolist()
    ]
    return [label for _, label in sorted(shares)]


def run_examples(
    model: nn.Module,
    images: Images,
    config: EvaluationConfig,
    results: Mapping[str, AttackResult],
    *,
    threat_model: ThreatModel,
    seed: int,
) -> RunExamples:
    """Attack a few test images again with the evaluation's PGD, from other random starts.

    The figure gets the first image of each of the classes that withstood the attacks of ``results`` least, the worst
    first; the page the most easily broken images of each class and the ones that hold (`choose_images`).
    """
    attacked = partial(_attacked, model, images, standard_attacks(config.attack(threat_model))[0], seed)
    verdicts = verdicts_of(results, ())
    worst = worst_classes(verdicts)[:NUM_EXAMPLES_SHOWN]
    strip = attacked([torch.tensor([int((images.labels == label).nonzero()[0]) for label in worst])])
    chosen = choose_images(verdicts)
    if not chosen:
        return RunExamples(strip=strip, of_classes=None)
    positions = verdicts.positions[torch.tensor([row for row, _ in chosen])]
    found = attacked(torch.split(positions, config.per_device_eval_batch_size))
    return RunExamples(strip=strip, of_classes=encode_examples(found, chosen, verdicts))


def _attacked(
    model: nn.Module, images: Images, attack: NamedAttack, seed: int, batches: Sequence[Tensor]
) -> ExampleStrip:
    """The images at these positions before and after the attack, batch by batch."""
    device = next(model.parameters()).device
    parts, size = [], WorkingSize(max(map(len, batches)))
    requests = [BatchRequest(positions, None) for positions in batches]
    with evaluation_mode(model):
        for number, batch in enumerate(images.batches(requests, device=device)):
            generator = make_generator(device, seed, Stream.EVALUATION, 0, number)
            parts.append([tensor.cpu() for tensor in _attack_batch(model, batch, attack, generator, size)])
    clean, adversarial, labels, before, after = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ExampleStrip(
        clean=clean,
        adversarial=adversarial,
        labels=labels,
        clean_predictions=before,
        adversarial_predictions=after,
        attack=attack.name.upper(),
    )


def _attack_batch(
    model: nn.Module, batch: PixelBatch, attack: NamedAttack, generator: torch.Generator, size: WorkingSize
) -> tuple[Tensor, ...]:
    """Images before and after the attack, labels, and predictions before and after it; in pieces that fit."""
    start = attack.threat_model.random_start(batch.x, generator)

    def strike(rows: slice) -> Tensor:
        return attack(model, batch.x[rows], batch.y[rows], start=start[rows], loss_fn=unsaturated_cross_entropy)

    x_adv = size.split(strike, len(batch.y))
    before = size.split(lambda rows: predict(model, batch.x[rows]), len(batch.y))
    after = size.split(lambda rows: predict(model, x_adv[rows]), len(batch.y))
    return batch.x, x_adv, batch.y, before, after


def encode_examples(images: ExampleStrip, chosen: Sequence[tuple[int, str]], verdicts: Verdicts) -> ClassExamples:
    """The images as PNGs where these fit into ``MAX_TOTAL_BYTES``, else as the largest JPEGs of ``SIDES`` that do.

    ``chosen`` says of each image which row of the verdicts it is, and of which kind.
    """
    side = max(images.clean.shape[-2:])
    # PNGs of larger images never fit, and take long to find that out.
    tries = [(side, "PNG")] if side <= 2 * SIDES[-1] else []
    for limit, form in [*tries, *((limit, "JPEG") for limit in SIDES if limit <= side)]:
        examples = tuple(_encode(images, index, *chosen[index], verdicts, limit, form) for index in range(len(chosen)))
        if sum(len(e.clean) + len(e.attacked) + len(e.difference) for e in examples) <= MAX_TOTAL_BYTES:
            break
    return ClassExamples(attack=images.attack, examples=examples)


def write_examples(examples: ClassExamples, folder: str | Path) -> Path:
    """Write ``examples.parquet`` into ``folder`` (made if needed) in one step, and return its path."""
    path = Path(folder) / EXAMPLES_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist([asdict(example) for example in examples.examples], schema=_SCHEMA)
    table = table.replace_schema_metadata({_METADATA: json.dumps({"attack": examples.attack})})
    with replacing(path) as part:
        pq.write_table(table, part)
    return path


def read_examples(folder: str | Path) -> ClassExamples | None:
    """Read the ``examples.parquet`` of a folder; None if there is none.

    Raises:
        ValueError: naming the file, if it is not ours.
    """
    path = Path(folder) / EXAMPLES_NAME
    if not path.is_file():
        return None
    try:
        table = pq.read_table(path, partitioning=None)
        attack = json.loads((table.schema.metadata or {})[_METADATA.encode()])["attack"]
        examples = tuple(ClassExample(**row) for row in table.cast(_SCHEMA).to_pylist())
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} holds no images that ham_hf wrote: {error!r}; remove it for a page without images"
        ) from error
    return ClassExamples(attack=str(attack), examples=examples)


def _encode(
    images: ExampleStrip, index: int, row: int, kind: str, verdicts: Verdicts, side: int, form: str
) -> ClassExample:
    clean, attacked = images.clean[index].float(), images.adversarial[index].float()
    difference = attacked - clean
    largest = float(difference.abs().max())
    enlargement = 0.5 / largest if largest > 0 else 1.0
    return ClassExample(
        label=int(verdicts.labels[row]),
        position=int(verdicts.positions[row]),
        kind=kind,
        margin=float(verdicts.margins_attacked[row]),
        clean_prediction=int(verdicts.clean[row]),
        attacked_prediction=int(images.adversarial_predictions[index]),
        enlargement=enlargement,
        clean=picture(clean, side, form),
        attacked=picture(attacked, side, form),
        difference=picture(0.5 + enlargement * difference, side, form),
    )


def picture(pixels: Tensor, side: int, form: str) -> bytes:
    """(C, H, W) pixels in [0, 1] as a file, its longer side at most ``side``; of four channels the first three."""
    values = (pixels.clamp(0, 1) * 255).round().byte()
    image = Image.fromarray(values[0].numpy() if len(values) < 3 else values[:3].permute(1, 2, 0).numpy())
    image.thumbnail((side, side), Image.Resampling.BOX)
    stream = io.BytesIO()
    image.save(stream, format=form, optimize=True, **({"quality": 85} if form == "JPEG" else {}))
    return stream.getvalue()
