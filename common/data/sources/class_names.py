"""Classes are compared by name: a label means the same in all splits that are used together."""

import unicodedata

import numpy as np

from common.data.sources.base import Source
from common.data.sources.folder_tree import some
from common.errors import UserError


def align(source: Source, names: tuple[str, ...]) -> None:
    """Numbers the labels of a test set or a bank as the training split does.

    Args:
        source: with class names; it is changed.
        names: of the classes 0, 1, ... that it is compared with; with none it is left as it is.

    Raises:
        UserError: a class that is not among those of the training split and the bank.
    """
    if not names or names == source.class_names:
        return
    exact = {name: i for i, name in enumerate(names)}
    # a name has other bytes where macOS wrote it
    alike = {unicodedata.normalize("NFC", name): i for i, name in enumerate(names)}
    numbers = [
        exact.get(name, alike.get(unicodedata.normalize("NFC", name), -1))
        for name in source.class_names
    ]
    unknown = [n for n, i in zip(source.class_names, numbers, strict=True) if i < 0]
    if unknown:
        raise UserError(
            f"{source.name} ({source.split}) has the class {unknown[0]!r}, which the training "
            f"split lacks; expected classes out of {some(names)}. Rename or remove it, or name "
            "other splits."
        )
    source.labels = np.array([*numbers, -1], np.int32)[source.labels]  # -1 stays -1
    missing = [name for i, name in enumerate(names) if i not in numbers]
    source.class_names, source.num_classes = names, len(names)
    if missing:
        source.account += (f"{len(missing)} of {len(names)} classes missing: {some(missing)}",)
