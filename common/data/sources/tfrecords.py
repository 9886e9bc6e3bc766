"""TFRecord files: reading their records by number, and a dataset too large for memory.

Which process reads which part, and in which order, is decided in `common/data/feed/stream.py`.
"""

import dataclasses

from common.data.images.tensorflow_host import arrays, plain, tf
from common.data.sources.base import Source
from common.data.sources.tfds_features import Features
from common.errors import UserError, first_line

_BLOCK = 16  # records read from a file before the next one's turn


@dataclasses.dataclass
class Shard:
    """Part of a TFRecord file: `take` records after the first `skip`; `first` is the id of one."""

    path: str
    skip: int
    take: int
    first: int


@dataclasses.dataclass(kw_only=True)
class StreamSource(Source):
    """A TFRecord dataset that is too large for memory; `common/data/feed/stream.py` shuffles it.

    Attributes:
        shards: in order; their records are examples 0..num_examples-1.
        features: parses a record.
        shuffle_buffer: encoded images kept to shuffle among.
    """

    shards: list[Shard]
    features: Features
    shuffle_buffer: int = 1

    def in_order(self):
        @plain
        def parse(index, record):
            return index, *self.features.parse(record)

        data = numbered(self.shards, 1).map(parse, num_parallel_calls=tf.data.AUTOTUNE)
        try:
            yield from arrays(data.prefetch(64))
        except tf.errors.OpError as error:
            raise unreadable(self.name, error) from error


def records(shard: Shard) -> tf.data.Dataset:
    """The serialised records of a shard."""
    return tf.data.TFRecordDataset(shard.path).skip(shard.skip).take(shard.take)


def select_range(shards: list[Shard], start: int, end: int) -> list[Shard]:
    """The parts of `shards` that hold the examples start..end-1."""
    parts = []
    for shard in shards:
        low, high = max(start, shard.first), min(end, shard.first + shard.take)
        if low < high:
            skip = shard.skip + low - shard.first
            parts.append(Shard(shard.path, skip, high - low, low))
    return parts


def process_range(n: int, index: int, count: int) -> tuple[int, int]:
    """First and last-plus-one example of process `index` of `count`."""
    return n * index // count, n * (index + 1) // count


def numbered(shards: list[Shard], files_at_once: int) -> tf.data.Dataset:
    """(example id, serialised record) of every record, some files at a time."""
    table = tf.data.Dataset.from_tensor_slices(
        ([s.path for s in shards], [s.skip for s in shards], [s.take for s in shards],
         [s.first for s in shards])
    )  # fmt: skip

    @plain
    def read(path, skip, take, first):
        data = records(Shard(path, tf.cast(skip, tf.int64), tf.cast(take, tf.int64), 0))
        return data.enumerate(tf.cast(first, tf.int64))

    return table.interleave(
        read, cycle_length=files_at_once, block_length=_BLOCK if files_at_once > 1 else None,
        num_parallel_calls=tf.data.AUTOTUNE, deterministic=True,
    )  # fmt: skip


def unreadable(name: str, error: Exception) -> UserError:
    """The error of a set whose files are damaged or missing."""
    reason = first_line(error)
    return UserError(f"cannot read tfds:{name}: {reason}; prepare the set again, or copy it again")
