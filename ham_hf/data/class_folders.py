"""Sort the images of a folder into splits and classes, by the names of folders alone.

A split is a folder at the top that is named like one (``train``, ``val``, ``test``, ...) and holds class folders.
Words in the names of classes and files do not matter. Every image file is in exactly one split and class, or raises
an error, or is counted in a note with an example.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

SPLIT_OF_FOLDER = {
    **dict.fromkeys(("train", "training", "trainval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
IMAGE_EXTENSIONS = frozenset(ImageFolder.EXTENSIONS) | {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif"}
DATA_EXTENSIONS = (".parquet", ".arrow", ".tar", ".tar.gz", ".tgz", ".zip")
METADATA_NAMES = frozenset(ImageFolder.METADATA_FILENAMES)
HEIF_BRANDS = (b"heic", b"heix", b"mif1", b"avif")
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"RIFF")


def list_files(root: Path) -> tuple[list[str], list[str]]:
    """Every file below a folder, also behind links, as relative paths; and notes on links back up, not followed."""
    found: list[str] = []
    loops: list[str] = []

    def visit(folder: str, above: frozenset[str]) -> None:
        here = os.path.realpath(folder)
        if here in above:
            loops.append(os.path.relpath(folder, root))
            return
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_dir():
                visit(entry.path, above | {here})
            else:
                found.append(os.path.relpath(entry.path, root).replace(os.sep, "/"))

    visit(str(root), frozenset())
    return found, note(loops, "links lead back to a folder above them and are not followed")


def is_image_name(path: str) -> bool:
    """Whether a file is an image by its extension, in upper or lower case."""
    return PurePosixPath(path).suffix.lower() in IMAGE_EXTENSIONS


def is_image(path: str) -> bool:
    """Whether a file is an image by its extension and not hidden."""
    return is_image_name(path) and not is_hidden(path)


def is_hidden(path: str) -> bool:
    """Whether a file or a folder above it is hidden, or left by a macOS archiver."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(path).parts)


def sort_into_classes(
    paths: Iterable[str], split_of: Mapping[str, str] | None = None
) -> tuple[dict[str, list[tuple[str, str]]], list[str]]:
    """Put every image file into its split and class.

    An image's class is the folder that it is in. Class folders may lie in further folders, all equally deep, if that
    leaves their names unique. A single folder at the top counts as the root.

    Args:
        paths: relative paths of all files, with ``/``.
        split_of: the split of each file that the dataset's README.md names; other files are ignored. None: folders
            decide.

    Returns:
        Of each split the paths of its images, sorted, each with its class; and notes on files that are left out.

    Raises:
        ValueError: for an image without a class folder, class folders at different depths, two class folders or two
            split folders with one name, a file that is listed twice, and a name that is not Unicode.
    """
    listed = sorted(paths)
    refuse_repeated(listed)
    hidden = [path for path in listed if is_image_name(path) and is_hidden(path)]
    notes = note(hidden, "image files are hidden (their name or their folder's begins with a dot) and are not read")
    visible = list(filter(is_image, listed))
    if split_of is None:
        splits, apart = _split_folders(visible, common_folder(visible))
    else:
        splits, apart = _declared_splits(visible, split_of), []
    notes += note(apart, "image files lie outside of the split folders and are not read")
    archives = [path for path in listed if not is_hidden(path) and path.lower().endswith(DATA_EXTENSIONS)]
    notes += note(archives, "archives and data files lie beside class folders and are not read")
    with_classes = {}
    for split, (folder, found) in splits.items():
        names, depth_notes = _classes_of(found, folder)
        notes += depth_notes
        with_classes[split] = list(zip(found, names, strict=True))
    above = {PurePosixPath(path).parent.parent for found in with_classes.values() for path, _ in found}
    beside = {PurePosixPath(path).parent for path in listed if not is_hidden(path)}
    beside -= {PurePosixPath(path).parent for path in visible}
    empty = sorted(str(folder) for folder in beside if folder.parts and folder.parent in above)
    notes += note(empty, "folders beside class folders hold no image that can be read and are no classes")
    return with_classes, notes


def note_unnamed_images(files: Mapping[str, str]) -> list[str]:
    """A note on local files, by their paths, that begin as images do and are not named so."""
    unnamed = []
    for path, where in files.items():
        if is_hidden(path) or is_image_name(path):
            continue
        with open(where if os.path.isfile(where) else os.devnull, "rb") as file:
            start = file.read(12)
            if start.startswith(SIGNATURES) or (start[4:8] == b"ftyp" and start[8:] in HEIF_BRANDS):
                unnamed.append(path)
    return note(unnamed, "files hold images by their first bytes and have no image's extension; they are not read")


def refuse_repeated(listed: Sequence[str]) -> None:
    """Raise ValueError naming a file that is listed twice or whose name is not Unicode."""
    twice = [path for path, count in Counter(listed).items() if count > 1]
    if twice:
        raise ValueError(f"{len(twice)} files are listed twice, such as {shown(twice[0])}: list each once")
    # Python's form of names that are not UTF-8.
    odd = [path for path in listed if any("\ud800" <= letter <= "\udfff" for letter in path)]
    if odd:
        raise ValueError(f"{len(odd)} file names are not Unicode, such as {shown(odd[0])}: rename the files")


def common_folder(paths: Sequence[str], depth: int = 3) -> tuple[str, ...]:
    """Folders that all paths begin with and that are not splits; at least ``depth`` parts of each path remain."""
    start: tuple[str, ...] = ()
    while paths:
        below = [PurePosixPath(path).parts[len(start) :] for path in paths]
        tops = {parts[0] for parts in below}
        if len(tops) > 1 or min(map(len, below)) < depth or split_name(next(iter(tops))) is not None:
            break
        start = (*start, tops.pop())
    return start


def split_name(folder: str) -> str | None:
    """The split that a folder is named like; None if there is none."""
    return SPLIT_OF_FOLDER.get(folder.lower())


def _split_folders(
    images: Sequence[str], start: tuple[str, ...]
) -> tuple[dict[str, tuple[tuple[str, ...], list[str]]], list[str]]:
    """Folder and images of each split, and images that are in none."""
    of_top: dict[str, list[str]] = {}
    for path in images:
        parts = PurePosixPath(path).parts[len(start) :]
        of_top.setdefault(parts[0] if len(parts) > 1 else "", []).append(path)
    tops = {top.lower() for top in of_top}
    named = [top for top in of_top if split_name(top) and not (top.lower() == "trainval" and "train" in tops)]
    # A split holds class folders; a folder of images alone is a class, whatever its name.
    holding = [top for top in named if any(_depth(path, start) > 2 for path in of_top[top])]
    if named and not holding and not [top for top in of_top if top and top not in named]:
        raise ValueError(
            f"{len(of_top[named[0]])} images lie in the split folder {shown(named[0])} itself, such as "
            f"{shown(of_top[named[0]][0])}: put each into the folder of its class, {named[0]}/CLASS/IMAGE"
        )
    if not holding:
        return ({"train": (start, list(images))} if images else {}), []
    splits = {split: ((*start, top), of_top[top]) for split, top in folder_of_split(named).items()}
    apart = [path for top in of_top if top not in named for path in of_top[top]]
    classes = [path for path in apart if _depth(path, start) > 2]
    if len({PurePosixPath(path).parent for path in classes}) > 1 and "train" not in splits:
        raise ValueError(
            f"{len(apart)} images lie outside of the split folders {' and '.join(map(shown, named))}, such as "
            f"{shown(classes[0])}, and no folder is called train: rename theirs to it, or move it away"
        )
    return splits, apart


def folder_of_split(named: Iterable[str]) -> dict[str, str]:
    """The folder of each split, of folders that are named like splits; ValueError if two are the same split."""
    folders: dict[str, str] = {}
    for top in named:
        split = str(split_name(top))
        if split in folders:
            raise ValueError(
                f"the folders {shown(folders[split])} and {shown(top)} are both the split {split!r}: rename one"
            )
        folders[split] = top
    return folders


def _declared_splits(
    images: Sequence[str], split_of: Mapping[str, str]
) -> dict[str, tuple[tuple[str, ...], list[str]]]:
    """The folder that holds the class folders, and the images, of each split that README.md declares."""
    found: dict[str, list[str]] = {}
    for path in images:
        if path in split_of:
            found.setdefault(split_of[path], []).append(path)
    parents = {split: {PurePosixPath(path).parent for path in of_split} for split, of_split in found.items()}
    classes = {folder.name for folders in parents.values() if len(folders) > 1 for folder in folders}
    splits = {}
    for split, of_split in found.items():
        folder = PurePosixPath(os.path.commonpath(parents[split]))
        # The only folder of a split is a class if another split says so.
        if len(parents[split]) == 1 and folder.name in classes:
            folder = folder.parent
        splits[split] = (folder.parts, of_split)
    return splits


def _depth(path: str, start: tuple[str, ...]) -> int:
    return len(PurePosixPath(path).parts) - len(start)


def _classes_of(images: Sequence[str], folder: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Class of each image below a split's folder, and notes."""
    where = "/".join(folder) or "the folder itself"
    loose = [path for path in images if _depth(path, folder) == 1]
    if loose:
        raise ValueError(
            f"{len(loose)} of {len(images)} images lie beside the class folders, in {where}, such as "
            f"{shown(loose[0])}, so they have no class: put each into the folder of its class, or move it away; "
            "labels may also stand in a metadata.csv with the columns file_name and label"
        )
    parents = [PurePosixPath(path).parent for path in images]
    of_depth = {_depth(path, folder): path for path in reversed(images)}
    if len(of_depth) > 1:
        first, second = (of_depth[depth] for depth in sorted(of_depth)[:2])
        raise ValueError(
            f"class folders are not equally deep: {shown(first)} and {shown(second)}; an image's class is the "
            "folder that it is in, so put all class folders beside each other"
        )
    place: dict[str, PurePosixPath] = {}
    for parent in parents:
        if place.setdefault(parent.name, parent) != parent:
            raise ValueError(
                f"the folders {shown(str(place[parent.name]))} and {shown(str(parent))} have one name, and an "
                "image's class is the folder that it is in: put all images of a class into one folder, with nothing "
                "between it and them, and call the folders of splits train and test"
            )
    deeper = [str(parent) for parent in parents[:1] if len(parent.parts) > len(folder) + 1]
    notes = [f"classes are named by the innermost folders, such as {shown(example)}" for example in deeper]
    return [parent.name for parent in parents], notes


def note(paths: Sequence[str], what: str) -> list[str]:
    """Number of files, their problem, and an example; empty without files."""
    return [f"{len(paths)} {what}, such as {shown(paths[0])}"] if paths else []


def shown(path: str) -> str:
    """A path for a message, on one line and short."""
    text = repr(path) if path.isprintable() else ascii(path)
    return text if len(text) <= 160 else f"{text[:80]}...{text[-77:]}"
