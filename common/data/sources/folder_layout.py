"""What a tree of folders means: which folder is which split, and which folders are classes.

Nothing is guessed where a tree can be read in two ways: that is refused, with both readings and how
to choose one. What is taken, and what is left out, goes into `Reading.account`.
"""

import dataclasses
import re

from absl import logging
from etils import epath

from common.data.sources.folder_tree import Tree, first_few, plural, shown
from common.errors import UserError

LABELS = ("auto", "folders", "none", "legacy")
# Names of splits, in lower case, by their kind.
_SPLITS = {
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst"),
    "val": ("val", "valid", "validation"),
    "unlabelled": ("unlabelled", "unlabeled"),
}
_KIND = {name: kind for kind, names in _SPLITS.items() for name in names}
_LEGACY = {name: _KIND[name] for name in ("train", "test", "val", "validation")}
# What cameras and people call folders that are no classes: 2021, 2022 summer, 06 June, 100CANON
_MONTHS = "january february march april may june july august september october november december"
_OCCASION = re.compile(
    r".*(?<!\d)(19|20)\d\d(\d{4})?(?!\d).*"
    rf"|(\d+\W+)?({'|'.join(f'{m[:3]}|{m}' for m in _MONTHS.split())})"
    r"|\d{3}[a-z_]{5}|dcim|camera|i?phone|whatsapp.*",
    re.IGNORECASE,
)
_STAND_IN = {"test": "val", "val": "test"}  # where there is no folder of the kind itself


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a folder is read as one split.

    Attributes:
        root: folder of the split.
        paths: image files, in order.
        class_names: names of the class folders, sorted; empty where nothing is labelled.
        classes: number of the class of each file, -1 for none.
        account: lines for the user: what was taken, what was left out.
    """

    root: epath.Path
    paths: list[str]
    class_names: tuple[str, ...]
    classes: list[int]
    account: tuple[str, ...]


def read(base: epath.Path, split: str, labels: str = "auto") -> Reading:
    """Reads a folder.

    Args:
        base: the folder that the user named.
        split: name of a folder in it, or of a usual synonym of one, in any case; "." is `base`.
        labels: "folders": each folder of the split is a class. "none": no image has a label, at any
          depth. "auto": what the tree says, if it is unambiguous. "legacy": as in runs
          that began before there was a choice.

    Raises:
        UserError: no such split, no image, a folder that cannot be read, or two possible readings.
    """
    layout = _Layout(labels)
    root = layout.split(base, split)
    folders, tree = layout.classes(root), layout.tree
    paths: list[str] = []
    classes: list[int] = []
    if folders:
        for number, folder in enumerate(folders):
            paths += tree.walk(folder)
            classes += [number] * (len(paths) - len(classes))
        tree.count_others(root)
        empty = [folder for folder in tree.folders(root) if folder not in folders]
        for folder in empty:
            tree.walk(folder)  # to count what is in it instead
        beside = {
            "image beside the class folders": len(tree.files(root)),
            "folder without images": len(empty),
        }
        tree.left_out.update({what: n for what, n in beside.items() if n})
    else:
        paths = tree.walk(root)
        classes = [-1] * len(paths)
    left_out = tree.left_out_in_words()
    if not paths:
        raise UserError(
            f"no image in {root}{left_out and f' (left out: {left_out})'}; expected image files "
            "(.jpg, .png, .tif, ...), either directly there or in one folder for each class"
        )
    names = tuple(folder.name for folder in folders)
    how = f"{_count(names, 'class')} by folder: {first_few(names)}" if names else "without labels"
    account = [f"read from {shown(root)}, {how}"]
    if labels == "auto" and 2 * sum(map(_is_occasion, names)) > len(names):
        account.append(
            "named like dates or cameras: if these folders are no classes, begin a run with "
            "--config.data.labels=none"
        )
    if len(names) == 1:
        account.append("one class: any accuracy is 100 % and says nothing")
    if left_out:
        account.append(f"left out: {left_out}")
    others = [] if root == base else layout.no_splits(base)
    if others := [name for name in others if name != root.name]:
        account.append(f"other folders beside {root.name}: {first_few(others)}")
    return Reading(root, paths, names, classes, tuple(account))


def class_names(base: epath.Path, split: str, labels: str = "auto") -> tuple[str, ...]:
    """The `Reading.class_names` of a split, without a look at every file.

    Raises:
        UserError: as `read`, except that there may be no image.
    """
    layout = _Layout(labels)
    return tuple(folder.name for folder in layout.classes(layout.split(base, split)))


def test_split(base: epath.Path) -> str:
    """Returns "test" where a folder has a split for tests, or validation, and one to train on."""
    layout = _Layout("auto")
    kinds = {layout.kind(folder.name) for folder in layout.tree.folders(base)}
    return "test" if "train" in kinds and kinds & {"test", "val"} else ""


class _Layout:
    """A tree, and the rules by which it is read; see `read`."""

    def __init__(self, labels: str) -> None:
        self.labels, self.legacy = labels, labels == "legacy"
        self.tree = Tree(self.legacy)

    def kind(self, name: str) -> str | None:
        """The kind of split that a folder is by its name."""
        return _LEGACY.get(name) if self.legacy else _KIND.get(name.lower())

    def no_splits(self, base: epath.Path) -> list[str]:
        """Names of the folders in `base` that hold images and are not named like splits."""

        def has_images(folder: epath.Path) -> bool:
            try:
                return self.tree.has_image_directly(folder) or bool(self.tree.with_images(folder))
            except UserError:  # it is not read anyway
                return False

        return [f.name for f in self.tree.folders(base) if not self.kind(f.name) and has_images(f)]

    def split(self, base: epath.Path, split: str) -> epath.Path:
        """The folder of a split."""
        folders, tree = self.tree.folders(base), self.tree
        if split == "." or "/" in split:
            root = base / split
            if root.is_dir():
                return root
            raise self._no_split(base, split)
        exact = any(f.name == split for f in folders)
        root = base / split if exact else self._synonym(base, split)
        if root is None:
            if self.kind(split) != "train" or any(self.kind(f.name) for f in folders):
                raise self._no_split(base, split)
            self._refuse_a_level_too_high(base)
            return base
        if self.legacy or not self.kind(root.name):
            return root
        flat = tree.has_image_directly(root) and not tree.with_images(root)
        if flat and (others := self.no_splits(base)):
            splits = [f.name for f in folders if self.kind(f.name)]
            if self.labels == "none" and len(splits) > 1:
                return root
            if self.labels != "auto":
                if self.kind(split) != "train":  # the whole tree is the training set
                    raise self._no_split(base, split)
                return base
            raise UserError(
                f"{root} can be a split, or a class as {first_few(others)} beside it: set "
                f"data.labels=folders for classes (and data.test_split= if there is none), or "
                f"data.source=folder:{root} to read it alone"
            )
        return root

    def _synonym(self, base: epath.Path, split: str) -> epath.Path | None:
        """The folder of another name for a split, or of one that stands in for it."""
        kind = self.kind(split)
        for wanted in (kind, _STAND_IN.get(kind or "")):
            found = [f for f in self.tree.folders(base) if wanted and self.kind(f.name) == wanted]
            if len(found) > 1 and not self.legacy:
                raise UserError(
                    f"{' and '.join(f.name for f in found)} in {base} can both be the split "
                    f"{split!r}: name one of them in data.train_split or data.test_split"
                )
            if found:
                return found[0]
        return None

    def _no_split(self, base: epath.Path, split: str) -> UserError:
        present = [f.name for f in self.tree.folders(base) if self.kind(f.name)]
        found = f"it has {', '.join(present)}" if present else "it has no folder for any split"
        part = present[0] if present and "train" not in map(self.kind, present) else "train"
        text = (
            f"no split {split!r} in {base} ({found}); expected the folder {base / split}. Make it, "
            "or name another one in data.train_split or data.test_split, or parts of one: "
            f"data.train_split={part}[:80%] and data.test_split={part}[80%:]"
        )
        if self.kind(base.name) and any(self.kind(n) for n in _siblings(base)):
            text += f"; {base} is itself a split by its name: data.source=folder:{base.parent}"
        if present and (others := self.no_splits(base)):
            text += f"; if {present[0]} is a class as {first_few(others)}: data.train_split=."
        return UserError(text)

    def _refuse_a_level_too_high(self, base: epath.Path) -> None:
        for folder in self.tree.folders(base) if self.labels == "auto" else ():
            inner = [f.name for f in self.tree.folders(folder)]
            kinds = [self.kind(name) for name in inner]
            if "train" in kinds and (all(kinds) or len({*kinds} - {None}) > 1):
                raise UserError(
                    f"{folder} holds the splits {first_few(inner)}, so {base} is a level too high: "
                    f"set data.source=folder:{folder}, or data.labels if all images are meant"
                )

    def classes(self, root: epath.Path) -> list[epath.Path]:
        """The class folders of a split; none where its images have no labels."""
        tree = self.tree
        if self.labels == "none":
            return []
        if self.legacy:
            if tree.files(root) and tree.folders(root):
                logging.warning(
                    "%s lies beside the folders of %s: nothing is labelled", tree.files(root)[0],
                    root,
                )  # fmt: skip
            return [] if tree.files(root) else tree.folders(root)
        folders = tree.with_images(root)
        if self.labels == "folders":
            if not folders:
                raise UserError(
                    f"data.labels=folders, and {root} has no folder with images: set "
                    "data.labels=none, or give each class a folder"
                )
            return folders
        names = [f.name for f in folders]
        choose = "set --config.data.labels=none, or --config.data.labels=folders if"
        if folders and (files := tree.files(root)):
            raise UserError(
                f"{root} has {_count(files, 'image')} ({shown(files[0].rsplit('/', 1)[-1])}) and "
                f"the folders {first_few(names)}: {choose} those are classes, without what lies "
                "beside"
            )
        for folder in folders:
            if not tree.has_image_directly(folder):
                inner = [f.name for f in tree.with_images(folder)]
                if len(folders) == 1 and len(inner) > 1:
                    choose = f"set data.source=folder:{folder} if those are classes; else {choose}"
                raise UserError(
                    f"{folder} has all its images in folders below, {first_few(inner)}: {choose} "
                    f"{first_few(names)} {'is the class' if len(names) == 1 else 'are the classes'}"
                )
        return folders


def _is_occasion(name: str) -> bool:
    return bool(_OCCASION.fullmatch(name))


def _siblings(folder: epath.Path) -> list[str]:
    """Names of the other folders in a folder's parent."""
    try:
        return [f.name for f in folder.parent.iterdir() if f.name != folder.name and f.is_dir()]
    except OSError:
        return []


def _count(things: list[str] | tuple[str, ...], what: str) -> str:
    return f"{len(things):,} {plural(what, len(things))}"
