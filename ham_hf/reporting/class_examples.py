"""Test images that say most about a class: the ones most easily broken and the ones that hold, before and after.

They need the model and the data, so a run makes them while it has both, and keeps them in ``examples.parquet``: one
row per image with three pictures, PNGs as they are where those fit, else JPEGs of a smaller size. The page is made of
that file again without either. The file stays where it was written: images of a dataset are not for everybody
(`ham_hf.hub`).
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor, nn

from ham_hf.attacks import ThreatModel, evaluation_mode, unsaturated_cross_entropy
from ham_hf.data import BatchRequest, Images
from ham_hf.evaluation import AttackResult, NamedAttack, predict, standard_attacks
from ham_hf.evaluation.config import EvaluationConfig
from ham_hf.evaluation.verdicts import Verdicts, verdicts_of
from ham_hf.files import replacing
from ham_hf.seeding import Stream, make_generator

EXAMPLES_NAME = "examples.parquet"
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


@dataclass(frozen=True, kw_only=True)
class ExampleStrip:
    """A few test images before and after the attack, and what the model says of them.

    Attributes:
        clean: (N, C, H, W) pixels in [0, 1], C = 1 or 3.
        adversarial: (N, C, H, W) pixels in [0, 1].
        labels: (N,) true classes.
        clean_predictions: (N,) predicted classes of ``clean``.
        adversarial_predictions: (N,) predicted classes of ``adversarial``, -1 for logits that are not finite.
        attack: title of the attack, for the figure.
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
        clean_prediction: class of the image as it is.
        attacked_prediction: class of the attacked image; -1 where the logits are not finite.
        enlargement: what the difference was multiplied by to be seen.
        clean: PNG or JPEG of the image.
        attacked: likewise of the attacked image.
        difference: likewise of attacked minus clean, enlarged around middle gray.
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
    """Images of some classes; ``attack`` is the title of what they were attacked with for the page."""

    attack: str
    examples: tuple[ClassExample, ...]


@dataclass(frozen=True, eq=False, kw_only=True)
class AttackedImages:
    """N chosen images, on the CPU.

    Attributes:
        rows: (N,) which rows of the verdicts they are.
        kinds: N times ``WEAK`` or ``STRONG``.
        clean: (N, C, H, W) pixels in [0, 1].
        attacked: (N, C, H, W) pixels in [0, 1].
        attacked_predictions: (N,) classes, -1 for logits that are not finite.
    """

    rows: Tensor
    kinds: Sequence[str]
    clean: Tensor
    attacked: Tensor
    attacked_predictions: Tensor


def choose_images(verdicts: Verdicts) -> list[tuple[int, str]]:
    """Rows of the verdicts to show, and of which kind each is, class by class.

    Of the classes (with more than ``MAX_CLASSES``: of those where the smallest share withstood), the images with the
    smallest and with the largest margin under attack among those that are right when clean, up to ``NUM_PER_KIND``
    each. An image is not shown twice. Empty without an attack.
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
    """The classes with an image that was attacked, the one with the smallest share that withstood first.

    Without an attack, those with the smallest share that is right.
    """
    attacked = bool(verdicts.judged.any())
    counted = verdicts.judged if attacked else torch.ones_like(verdicts.judged)
    right = verdicts.withstood if attacked else verdicts.clean == verdicts.labels
    shares = [
        (float(right[counted & (verdicts.labels == label)].double().mean()), int(label))
        for label in torch.unique(verdicts.labels[counted]).tolist()
    ]
    return [label for _, label in sorted(shares)]


def example_strip(
    model: nn.Module,
    images: Images,
    config: EvaluationConfig,
    results: Mapping[str, AttackResult],
    *,
    threat_model: ThreatModel,
    seed: int,
) -> ExampleStrip:
    """Images of the classes that withstood the attacks of ``results`` least, the worst first, for the figure.

    Of each class the first image, before and after the evaluation's PGD.
    """
    worst = worst_classes(verdicts_of(results, ()))[:NUM_EXAMPLES_SHOWN]
    firsts = torch.tensor([int((images.labels == label).nonzero()[0]) for label in worst])
    attack = standard_attacks(config.attack(threat_model))[0]
    return _attacked_by(model, images, [firsts], attack, seed)


def class_examples(
    model: nn.Module,
    images: Images,
    config: EvaluationConfig,
    results: Mapping[str, AttackResult],
    *,
    threat_model: ThreatModel,
    seed: int,
) -> ClassExamples | None:
    """The most easily broken images of each class and the ones that hold, for the page; None without an attack.

    They are chosen by the verdicts of ``results`` and attacked again with its PGD, from other random starts.
    """
    verdicts = verdicts_of(results, ())
    chosen = choose_images(verdicts)
    if not chosen:
        return None
    rows = torch.tensor([row for row, _ in chosen])
    batches = torch.split(verdicts.positions[rows], config.per_device_eval_batch_size)
    attack = standard_attacks(config.attack(threat_model))[0]
    found = _attacked_by(model, images, batches, attack, seed)
    shown = AttackedImages(
        rows=rows,
        kinds=[kind for _, kind in chosen],
        clean=found.clean,
        attacked=found.adversarial,
        attacked_predictions=found.adversarial_predictions,
    )
    return encode_examples(shown, verdicts, attack=found.attack)


def _attacked_by(
    model: nn.Module,
    images: Images,
    batches: Sequence[Tensor],
    attack: NamedAttack,
    seed: int,
) -> ExampleStrip:
    """The images at these positions, batch by batch, before and after the attack; on the CPU."""
    device = next(model.parameters()).device
    parts = []
    requests = [BatchRequest(positions, None) for positions in batches]
    with evaluation_mode(model):
        for number, batch in enumerate(images.batches(requests, device=device)):
            x_adv = attack(
                model,
                batch.x,
                batch.y,
                loss_fn=unsaturated_cross_entropy,
                generator=make_generator(device, seed, Stream.EVALUATION, 0, number),
            )
            found = (batch.x, x_adv, batch.y, predict(model, batch.x), predict(model, x_adv))
            parts.append([tensor.cpu() for tensor in found])
    clean, adversarial, labels, before, after = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ExampleStrip(
        clean=clean,
        adversarial=adversarial,
        labels=labels,
        clean_predictions=before,
        adversarial_predictions=after,
        attack=attack.name.upper(),
    )


def encode_examples(images: AttackedImages, verdicts: Verdicts, *, attack: str) -> ClassExamples:
    """The images as PNGs where these fit into ``MAX_TOTAL_BYTES``, else as the largest JPEGs of ``SIDES`` that do."""
    side = max(images.clean.shape[-2:])
    # Of larger ones PNGs never fit, and take long to find that out.
    tries = [(side, "PNG")] if side <= 2 * SIDES[-1] else []
    found = ClassExamples(attack=attack, examples=())
    for limit, form in [*tries, *((limit, "JPEG") for limit in SIDES if limit <= side)]:
        examples = tuple(_encode(images, verdicts, index, limit, form) for index in range(len(images.rows)))
        found = ClassExamples(attack=attack, examples=examples)
        if sum(len(e.clean) + len(e.attacked) + len(e.difference) for e in examples) <= MAX_TOTAL_BYTES:
            break
    return found


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
        ValueError: naming the file, if it is none of ours.
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


def _encode(images: AttackedImages, verdicts: Verdicts, index: int, side: int, form: str) -> ClassExample:
    row = int(images.rows[index])
    clean, attacked = images.clean[index].float(), images.attacked[index].float()
    difference = attacked - clean
    largest = float(difference.abs().max())
    enlargement = 0.5 / largest if largest > 0 else 1.0
    return ClassExample(
        label=int(verdicts.labels[row]),
        position=int(verdicts.positions[row]),
        kind=images.kinds[index],
        margin=float(verdicts.margins_attacked[row]),
        clean_prediction=int(verdicts.clean[row]),
        attacked_prediction=int(images.attacked_predictions[index]),
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
