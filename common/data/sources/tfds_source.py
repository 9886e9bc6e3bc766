"""TensorFlow data sets that are already prepared on this machine (or in a bucket).

ArrayRecord sets are read at random from disk. TFRecord sets are read into memory, as pixels where
all images have one shape and as encoded bytes otherwise; those larger than `data.cache_gib` are
streamed.
"""

import collections
import dataclasses
import itertools
import logging
import threading
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from common.data.images import decode, decoding
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import arrays, plain, tf, traced
from common.data.sources.base import ArraySource, Source, to_rgb
from common.errors import UserError, first_line
from common.run import files

_UNLABELLED = ("unlabelled", "unlabeled")
_GIB = 2**30

# TFDS warns its users of a property that only TFDS itself reads.
logging.getLogger("absl").addFilter(lambda r: "`FeatureConnector.dtype`" not in r.getMessage())


@dataclasses.dataclass
class Shard:
    """Part of a TFRecord file: `take` records after the first `skip`; `first` is the id of one."""

    path: str
    skip: int
    take: int
    first: int


@dataclasses.dataclass
class StreamSource(Source):
    """A TFRecord set that is too large for memory; `stream.py` reads it.

    Attributes:
        shards: in order; their records are examples 0..num_examples-1.
        features: parses a record.
        shuffle_buffer: encoded images kept to shuffle among.
    """

    shards: list[Shard] = None
    features: "Features" = None
    shuffle_buffer: int = 1


@dataclasses.dataclass
class RecordSource(Source):
    """An ArrayRecord set."""

    records: object = None
    features: "Features" = None
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def read(self, ids):
        with self._lock:  # its readers are opened on first use, by one thread only
            examples = self.records.__getitems__([int(i) for i in ids])
        images = np.array([example[self.features.image] for example in examples], object)
        if self.features.label is None:
            return images, np.full(len(ids), -1, np.int32)
        labels = [example[self.features.label] for example in examples]
        return images, np.array(labels, object if self.features.by_value else np.int32)


_MANY_VALUES = 100  # of a label; so many or fewer are classes
_LABEL_NAMES = ("label", "class", "category", "target")  # of features that need not be classes


class Features:
    """Which of a data set's features are the image and the label.

    Args:
        info: the data set's description.
        labelled: False ignores the labels there may be.

    Attributes:
        image, label: names of the features; `label` is None where nothing is labelled.
        num_classes, class_names: as in `Source`; 0 and () as long as `by_value`.
        by_value: whether the classes are the values, integers or text, that the label has.
        account: a line where somebody may have expected other labels.

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
                "expected one image feature. Use a data set of single images."
            )
        self.image = "image" if "image" in images else images[0]
        self.label = "label" if "label" in labels else labels[0] if len(labels) == 1 else None
        self.by_value, self.account = False, ()
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


def open_tfds(name: str, split: str, config: ConfigDict, sure: bool = False) -> Source:
    """Opens a prepared data set.

    Args:
        name: as TFDS knows it, such as "cifar10" or "imagenet2012:5.1.0".
        split: a split or a slice of one, such as "train" or "train[:10%]".
        config: the config's `data` section.
        sure: labels that are values are classes, however few images there are of each: those of the
          training split decide whether they are.

    Returns:
        An `ArraySource`, `RecordSource` or `StreamSource`.

    Raises:
        UserError: not prepared, no such split, or no image in it.
    """
    builder = _builder(name, config.dir)
    info = builder.info
    try:
        chosen = info.splits[split]
    except (KeyError, ValueError) as error:
        raise UserError(
            f"tfds:{name} has no split {split!r}; expected one of {', '.join(info.splits)} or a "
            "slice of it. Set data.train_split or data.test_split."
        ) from error
    if not chosen.num_examples:
        raise UserError(f"the split {split!r} of tfds:{name} is empty; expected images.")
    features = Features(info, labelled=_labelled(split, config))
    shape = features.image_feature.shape[:2]
    # a sum of splits does not know its bytes
    n = sum(part.num_examples for part in info.splits.values())
    size = sum(part.num_bytes for part in info.splits.values())
    encoded = size * chosen.num_examples / n / _GIB if size else np.inf
    fixed = None not in shape
    decoded = chosen.num_examples * np.prod(shape) * 3 / _GIB if fixed else np.inf
    random_access = info.file_format.name == "ARRAY_RECORD"
    how = decoding.of(config)
    in_memory = (decoded if random_access else min(encoded, decoded)) <= config.cache_gib
    if features.by_value and not in_memory:
        features = Features(info, labelled=False)
        features.account = (
            "no labels: which values they have is only known of a set in memory, and this one has "
            "more than data.cache_gib",
        )
    common = dict(
        name=info.name, split=split, num_examples=chosen.num_examples,
        num_classes=features.num_classes, class_names=features.class_names,
        account=features.account,
    )  # fmt: skip
    if random_access:
        records = builder.as_data_source(split=split, decoders=features.decoders)
        source = RecordSource(
            kind="encoded", labels=None, records=records, features=features, **common
        )
        if not in_memory:
            return source
        pairs = (source.read(ids) for ids in np.array_split(
            np.arange(chosen.num_examples), max(1, chosen.num_examples // 1024)))  # fmt: skip
        return _in_memory(pairs, shape, common, features, how, sure)
    shards = _shards(chosen)
    if not in_memory:
        return StreamSource(
            kind="stream", labels=None, shards=shards, features=features,
            shuffle_buffer=config.get("shuffle_buffer", 16384), **common,
        )  # fmt: skip
    shape = shape if decoded <= config.cache_gib else None
    return _in_memory(_read(shards, features), shape, common, features, how, sure)


def class_names(name: str, split: str, config: ConfigDict) -> tuple[str, ...]:
    """Names of the classes of a split whose own they are; () where all splits share them."""
    if not _labelled(split, config):
        return ()
    if Features(_builder(name, config.dir).info).by_value:
        return open_tfds(name, split, config).class_names
    return ()


def _labelled(split: str, config: ConfigDict) -> bool:
    return split.split("[")[0] not in _UNLABELLED and config.labels != "none"


def _classes(
    values: np.ndarray, feature: str, sure: bool
) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Labels that are integers or text: int32 [n], names of the classes, and a line about them.

    A negative integer and an empty text are no label. Many values of which half or more occur once
    are measurements or ids, not classes; but `sure` says that they are classes.
    """
    # objects, since integers of 64 bits with and without a sign have no type in common
    values = [v.decode(errors="backslashreplace") if isinstance(v, bytes) else v for v in values]
    labelled = np.array([v != "" if isinstance(v, str) else v >= 0 for v in values], bool)
    counts = collections.Counter(itertools.compress(values, labelled))
    found = sorted(counts)
    numbers = np.full(len(values), -1, np.int32)
    rare = sum(n == 1 for n in counts.values())
    if not found or (not sure and len(found) > _MANY_VALUES and 2 * rare >= len(found)):
        line = f"no labels: {feature!r} has {len(found):,} values for {len(values):,} images"
        return numbers, (), line
    number = {value: i for i, value in enumerate(found)}
    numbers[labelled] = [number[v] for v in itertools.compress(values, labelled)]
    names = tuple(map(str, found))
    more = ", ..." if len(names) > 5 else ""
    return numbers, names, f"classes are the values of {feature!r}: {', '.join(names[:5])}{more}"


def _builder(name: str, folder: str):
    import tensorflow_datasets as tfds

    folder = str(files.path(folder)) if folder else None
    where = folder or "TFDS_DATA_DIR, or else ~/tensorflow_datasets"
    fix = (
        "Set TFDS_DATA_DIR or config.data.dir to the folder that holds it, or prepare it with "
        f"`tfds build {name}` (`python -m tensorflow_datasets.scripts.cli.main build {name}`)."
    )
    try:
        builder = tfds.builder(name, data_dir=folder, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(f"no data set tfds:{name} (looked in {where}). {fix}") from error
    except (ValueError, AssertionError, ImportError) as error:
        raise UserError(f"cannot open tfds:{name}: {first_line(error)} {fix}") from error
    if not builder.info.splits:
        raise UserError(f"tfds:{name} is not prepared (looked in {builder.data_dir}). {fix}")
    return builder


def _shards(chosen) -> list[Shard]:
    shards, first = [], 0
    for part in chosen.file_instructions:
        take = part.examples_in_shard - part.skip if part.take == -1 else part.take
        shards.append(Shard(str(part.filename), part.skip, take, first))
        first += take
    return shards


def records(shard: Shard) -> tf.data.Dataset:
    """The serialised records of a shard."""
    return tf.data.TFRecordDataset(shard.path).skip(shard.skip).take(shard.take)


def _read(shards: list[Shard], features: Features) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All encoded images and labels, in order, in pieces."""
    for shard in shards:
        data = records(shard).map(plain(features.parse), num_parallel_calls=tf.data.AUTOTUNE)
        yield from arrays(data.batch(1024).prefetch(2))


def _in_memory(
    pairs: Iterator,
    shape: tuple[int, int] | None,
    common: dict,
    features: Features,
    how: Decoding,
    sure: bool,
) -> ArraySource:
    """Keeps the set in memory: as pixels if all images have one shape, else encoded.

    Raises:
        UserError: the files hold less than the set's description says, or cannot be read.
    """
    n, done = common["num_examples"], 0
    images = np.empty(n, object) if shape is None else np.empty((n, *shape, 3), np.uint8)
    labels = np.full(n, -1, object if features.by_value else np.int32)
    try:
        for payload, label in pairs:
            part = slice(done, done + len(label))
            done += len(label)
            if done > n:
                break
            images[part] = payload if shape is None else _decode_all(payload, shape, how)
            labels[part] = label
    except tf.errors.OpError as error:
        raise unreadable(common["name"], error) from error
    if done != n:
        raise UserError(
            f"tfds:{common['name']} ({common['split']}) holds {done} of the {n} images that its "
            "description says: a file is damaged or of another version; prepare the set again"
        )
    if features.by_value:
        labels, names, line = _classes(labels, features.label, sure)
        common |= {"num_classes": len(names), "class_names": names, "account": (line,)}
    return ArraySource(
        kind="encoded" if shape is None else "pixels", labels=labels, image_shape=shape,
        images=images, **common,
    )  # fmt: skip


def unreadable(name: str, error: Exception) -> UserError:
    """The error of a set whose files are damaged or missing."""
    reason = first_line(error)
    return UserError(f"cannot read tfds:{name}: {reason}; prepare the set again, or copy it anew")


def _decode_all(payload: np.ndarray, shape: tuple[int, int], how: Decoding) -> np.ndarray:
    data = tf.data.Dataset.from_tensor_slices(list(payload)).map(
        plain(lambda x: tf.ensure_shape(decode.decode(x, how), [*shape, 3])),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return to_rgb(next(arrays(data.batch(len(payload)))))
