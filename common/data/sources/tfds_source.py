"""TensorFlow datasets that are already prepared on this machine (or in a bucket).

ArrayRecord sets are read at random from disk. TFRecord sets are read into memory, as pixels where
all images have one shape and as encoded bytes otherwise; those larger than `data.cache_gib` are
streamed.
"""

import dataclasses
import logging
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from common.data.images import decode, decoding
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import arrays, plain, tf
from common.data.sources.base import ArraySource, Source, to_rgb
from common.data.sources.tfds_features import Features, classes_of
from common.data.sources.tfrecords import Shard, StreamSource, records, unreadable
from common.errors import UserError, first_line
from common.run import files

_UNLABELLED = ("unlabelled", "unlabeled")
_GIB = 2**30

# TFDS warns its users of a property that only TFDS itself reads.
logging.getLogger("absl").addFilter(lambda r: "`FeatureConnector.dtype`" not in r.getMessage())


@dataclasses.dataclass(kw_only=True)
class RecordSource(Source):
    """An ArrayRecord dataset.

    Attributes:
        records: TFDS's data source, which reads examples by number.
        features: which of an example's values are the image and the label.
    """

    records: Any
    features: Features
    _lock: threading.Lock = dataclasses.field(default_factory=threading.Lock)

    def read(self, ids):
        with self._lock:  # its readers are opened on first use, by one thread only
            examples = self.records.__getitems__([int(i) for i in ids])
        images = np.array([example[self.features.image] for example in examples], object)
        if self.features.label is None:
            return images, np.full(len(ids), -1, np.int32)
        labels = [example[self.features.label] for example in examples]
        return images, np.array(labels, object if self.features.by_value else np.int32)


def open_tfds(name: str, split: str, config: ConfigDict, sure: bool = False) -> Source:
    """Opens a prepared dataset.

    Args:
        name: TFDS's, such as "cifar10" or "imagenet2012:5.1.0".
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
    # the size in bytes of a sum of splits is unknown
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


def counts(name: str, config: ConfigDict) -> dict[str, int]:
    """The splits of a prepared dataset, and how many images each has."""
    splits = _builder(name, config.dir).info.splits
    return {split: splits[split].num_examples for split in splits}


def class_names(name: str, split: str, config: ConfigDict) -> tuple[str, ...]:
    """Names of the classes of a split whose own they are; () where all splits share them."""
    if not _labelled(split, config):
        return ()
    if Features(_builder(name, config.dir).info).by_value:
        return open_tfds(name, split, config).class_names
    return ()


def _labelled(split: str, config: ConfigDict) -> bool:
    return split.split("[")[0] not in _UNLABELLED and config.labels != "none"


def _builder(name: str, folder: str):
    import tensorflow_datasets as tfds

    data_dir = str(files.path(folder)) if folder else None
    where = data_dir or "TFDS_DATA_DIR, or else ~/tensorflow_datasets"
    fix = (
        "Set TFDS_DATA_DIR or config.data.dir to the folder that holds it, or prepare it with "
        f"`python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}')"
        '.download_and_prepare()"` (ImageNet: docs/imagenet.md).'
    )
    try:
        builder = tfds.builder(name, data_dir=data_dir, try_gcs=False)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(f"no dataset tfds:{name} (looked in {where}). {fix}") from error
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
        labels, names, line = classes_of(labels, features.label, sure)
        common |= {"num_classes": len(names), "class_names": names, "account": (line,)}
    return ArraySource(
        kind="encoded" if shape is None else "pixels", labels=labels, image_shape=shape,
        images=images, **common,
    )  # fmt: skip


def _decode_all(payload: np.ndarray, shape: tuple[int, int], how: Decoding) -> np.ndarray:
    data = tf.data.Dataset.from_tensor_slices(list(payload)).map(
        plain(lambda x: tf.ensure_shape(decode.decode(x, how), [*shape, 3])),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return to_rgb(next(arrays(data.batch(len(payload)))))
