"""Which features of a TensorFlow dataset are the image and the label, and what its classes are."""

import collections
import itertools

import numpy as np

from common.data.images.tensorflow_host import tf, traced
from common.errors import UserError

_MANY_VALUES = 100  # of a label; so many or fewer are classes
_LABEL_NAMES = ("label", "class", "category", "target")  # of features that need not be classes


class Features:
    """Which of a dataset's features are the image and the label.

    Args:
        info: the dataset's description.
        labelled: False ignores the labels there may be.

    Attributes:
        image, label: names of the features; `label` is None where nothing is labelled.
        num_classes, class_names: as in `Source`; 0 and () as long as `by_value`.
        by_value: whether the classes are the values, integers or text, that the label has.
        account: a line where one might have expected other labels.

    Raises:
        UserError: no feature, or more than one, is an image.
    """

    def __init__(self, info, labelled: bool = True):
        import tensorflow_datasets as tfds

        images = [k for k, v in info.features.items() if isinstance(v, tfds.features.Image)]
        labels = [k for k, v in info.features.items() if isinstance(v, tfds.features.ClassLabel)]
        if "image" not in images and len(images) != 1:
            found = f"{len(images)} of them are images" if images else "none of them is an image"
            raise UserError(
                f"tfds:{info.name} has the features {', '.join(info.features)}, and {found}; "
                "expected one image feature. Use a dataset of single images."
            )
        self.image = "image" if "image" in images else images[0]
        self.label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
        self.by_value = False
        self.account: tuple[str, ...] = ()
        if self.label is None and labelled:
            self._look_for_values(info.features, labels)
        feature = info.features[self.label] if self.label and not self.by_value else None
        self.num_classes = feature.num_classes if feature else 0
        self.class_names = tuple(feature.names) if feature and feature.names else ()
        if not labelled:  # the class names are of the set's other splits
            self.label, self.num_classes, self.class_names = None, 0, ()
        self.image_feature = info.features[self.image]
        self.decoders = {self.image: tfds.decode.SkipDecoding()}
        wanted = [self.image] + ([self.label] if self.label else [])
        self._parser = tfds.features.FeaturesDict({name: info.features[name] for name in wanted})
        self.parse = traced(self._parse)  # traced once for all epochs

    def _look_for_values(self, features, classes: list[str]) -> None:
        """Takes a label that is an integer or a text, or says why there is none."""
        if classes:
            self.account = (
                f"no labels: of the classes {', '.join(classes)} none is called 'label'",
            )
            return
        for name in (name for name in _LABEL_NAMES if name in features):
            feature = features[name]
            kind = np.dtype(feature.np_dtype).kind if feature.shape == () else ""
            if kind and kind in "biuOSU":  # the last three are text
                self.label, self.by_value = name, True
                return
            self.account = (f"no labels: {name!r} is {feature}, no class, no integer and no text",)

    def _parse(self, record: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """A serialised record -> (encoded image, label: int32, or its value)."""
        example = self._parser.deserialize_example(record, decoders=self.decoders)
        label = example[self.label] if self.label else tf.constant(-1)
        return example[self.image], label if self.by_value else tf.cast(label, tf.int32)


def classes_of(
    values: np.ndarray, feature: str | None, sure: bool
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Labels that are integers or text: int32 [n], names of the classes, and a line about them.

    A negative integer and an empty text are no label. Many values of which half or more occur once
    are measurements or ids, not classes; but `sure` says that they are classes.
    """
    # objects, since integers of 64 bits with and without a sign have no type in common
    decoded = [v.decode(errors="backslashreplace") if isinstance(v, bytes) else v for v in values]
    labelled = np.array([v != "" if isinstance(v, str) else v >= 0 for v in decoded], bool)
    counts = collections.Counter(itertools.compress(decoded, labelled))
    found = sorted(counts)
    numbers = np.full(len(decoded), -1, np.int32)
    rare = sum(n == 1 for n in counts.values())
    if not found or (not sure and len(found) > _MANY_VALUES and 2 * rare >= len(found)):
        line = f"no labels: {feature!r} has {len(found):,} values for {len(decoded):,} images"
        return numbers, (), line
    number = {value: i for i, value in enumerate(found)}
    numbers[labelled] = [number[v] for v in itertools.compress(decoded, labelled)]
    names = tuple(map(str, found))
    more = ", ..." if len(names) > 5 else ""
    return numbers, names, f"classes are the values of {feature!r}: {', '.join(names[:5])}{more}"
