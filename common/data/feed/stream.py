"""TFRecord sets that do not fit in memory.

Process p of P reads the p-th of P equal parts of the set, shuffled anew in each epoch: files in
random order, several at a time, through a shuffle buffer. The order depends on (seed, epoch, P).
Examples keep their global ids, so their augmentation is the same as in memory. Resuming inside an
epoch reads past the records that have been seen without decoding them.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np
from ml_collections import ConfigDict

from common.data.augment import draws
from common.data.augment.presets import Augmentation
from common.data.feed import corrupt, feed
from common.data.feed.pipeline import Batches
from common.data.images.tensorflow_host import arrays, plain, tf
from common.data.sources.tfds_source import Shard, StreamSource, records, unreadable
from common.errors import UserError
from common.run import console

_FILES_AT_ONCE = 16
_BLOCK = 16  # records read from a file before the next one's turn
_FILES, _BUFFER = 3, 4  # streams of `draws.hash64`, beside those of draws.py


def share(shards: list[Shard], start: int, end: int) -> list[Shard]:
    """The parts of `shards` that hold the examples start..end-1."""
    parts = []
    for shard in shards:
        low, high = max(start, shard.first), min(end, shard.first + shard.take)
        if low < high:
            skip = shard.skip + low - shard.first
            parts.append(Shard(shard.path, skip, high - low, low))
    return parts


def part_of(n: int, index: int, count: int) -> tuple[int, int]:
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


def epoch_records(
    source: StreamSource, seed: int, epoch: int, index: int, count: int
) -> tf.data.Dataset:
    """One process's (id, record) pairs of an epoch, shuffled, nothing decoded."""
    parts = share(source.shards, *part_of(source.num_examples, index, count))
    ranks = draws.hash64(_FILES, seed, epoch, np.array([part.first for part in parts]))
    parts = [parts[i] for i in np.argsort(ranks, kind="stable")]
    buffer = min(source.shuffle_buffer, sum(part.take for part in parts))
    shuffle_seed = int(draws.hash64(_BUFFER, seed, epoch, index, count)[0] >> np.uint64(1))
    data = numbered(parts, min(_FILES_AT_ONCE, len(parts)))
    return data.shuffle(buffer, seed=shuffle_seed, reshuffle_each_iteration=False)


def train_batches(
    source: StreamSource,
    config: ConfigDict,
    augmentations: tuple[Augmentation, Augmentation],
    steps: int,
    rows: np.ndarray,
    start: int,
    index: int,
    count: int,
) -> Batches:
    """`pipeline.train_batches` for a streamed set; `steps` is the number of steps in an epoch."""
    b = len(rows)
    if b * count != config.batch_size:
        raise _uneven(index, count, b, config.batch_size)
    colour = config.data.augment_on == "host"
    batches = _train(source, config.seed, augmentations, steps, b, start, index, count, colour)
    return Batches(batches, source, steps, start, count)


def _uneven(index: int, count: int, b: int, batch_size: int) -> UserError:
    return UserError(
        f"process {index} of {count} holds {b} rows of a batch of {batch_size}; expected "
        f"{batch_size / count:g}. A streamed set needs a batch that divides evenly among processes."
    )


def _train(source, seed, augmentations, steps, b, start, index, count, colour) -> Iterator[dict]:
    augment, named = feed.augmenter(source, augmentations, colour), feed.named(colour)
    epoch, done = divmod(start, steps)
    while True:

        def draw(ids, epoch=epoch):
            return draws.draw_pair(augmentations, seed, epoch, ids, None)

        def finish(data, draw=draw):
            @plain
            def drawn(ids, labels, images):
                values = tf.numpy_function(draw, [ids], (tf.float32, tf.float32), stateful=False)
                parameters = tf.ensure_shape(values[0], [b, 2, draws.PARAMETERS])
                crops = tf.ensure_shape(values[1], [b, 2, draws.CROP_DRAWS])
                return ids, labels, images, parameters, crops

            @plain
            def single(index, label, image, parameters, crops):
                return named(augment(image, parameters, crops), label, index, parameters)

            data = data.map(drawn).unbatch()
            data = data.map(single, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            return data.batch(b, drop_remainder=True)

        records_left = epoch_records(source, seed, epoch, index, count).take(steps * b)
        begun = time.monotonic()
        for number, batch in enumerate(_run(source, records_left, b, finish, done)):
            if number == 0 and done and index == 0:
                seconds = time.monotonic() - begun
                console.say(
                    f"resumed inside epoch {epoch}: read past {done * b:,} records in "
                    f"{seconds:.1f} s ({done * b / seconds:,.0f} records/s)"
                )
            yield batch
        epoch, done = epoch + 1, 0


def eval_batches(
    source: StreamSource, batch_size: int, image_size: int, rows: np.ndarray, index: int, count: int
) -> Iterator[dict[str, np.ndarray]]:
    """`pipeline.eval_batches` for a streamed set: each process reads its own part, in order."""
    b = len(rows)
    if b * count != batch_size:
        raise _uneven(index, count, b, batch_size)
    start, end = part_of(source.num_examples, index, count)
    largest = -(-source.num_examples // count)

    shown = feed.evaluator(source, image_size)

    @plain
    def single(index, label, image):
        return {"images": shown(image), "labels": label, "ids": index}

    def finish(data):
        data = data.unbatch().map(single, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        return data.batch(b)

    def padded():
        left = -(-largest // b)
        for batch in _run(source, numbered(share(source.shards, start, end), 1), b, finish, 0):
            batch["mask"] = np.ones(len(batch["ids"]), bool)
            missing = b - len(batch["ids"])
            filler = {"labels": -1, "ids": -1, "images": 0, "mask": 0}
            yield {k: _pad(v, missing, filler[k]) for k, v in batch.items()}
            left -= 1
        for _ in range(left):
            yield {
                "images": np.zeros((b, image_size, image_size, 3), np.uint8),
                "labels": np.full(b, -1, np.int32),
                "ids": np.full(b, -1, np.int64),
                "mask": np.zeros(b, bool),
            }

    return padded()


def in_order(source: StreamSource) -> Iterator[tuple[int, bytes, int]]:
    """One pass over (id, encoded image, label), nothing decoded."""

    @plain
    def parse(index, record):
        return index, *source.features.parse(record)

    data = numbered(source.shards, 1).map(parse, num_parallel_calls=tf.data.AUTOTUNE)
    try:
        yield from arrays(data.prefetch(64))
    except tf.errors.OpError as error:
        raise unreadable(source.name, error) from error


def _pad(values: np.ndarray, missing: int, filler: int) -> np.ndarray:
    if not missing:
        return values
    filling = np.full((missing, *values.shape[1:]), filler, values.dtype)
    return np.concatenate([values, filling])


def _run(
    source: StreamSource,
    pairs: tf.data.Dataset,
    b: int,
    finish: Callable[[tf.data.Dataset], tf.data.Dataset],
    done: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `pairs` after the first `done`; goes on without corrupt images, or names one.

    Args:
        source: its `replaced` holds the corrupt examples known so far.
        pairs: (id, record), in the same order each time it is iterated.
        b: batch size.
        finish: batches of (ids, labels, encoded images) -> batches to yield.
        done: batches to read past.
    """
    # names of our own: modules may be gone when a generator is closed
    failure, damaged = tf.errors.OpError, (tf.errors.DataLossError, tf.errors.NotFoundError)

    def replace(ids, labels, images):
        good = np.array([int(i) not in source.replaced for i in ids])
        if good.all() or not good.any():
            return labels, images
        places = np.arange(len(ids))
        # The next good image of the batch, around its end.
        stand_in = [next(p for p in np.roll(places, -i) if good[p]) for i in places]
        return labels[stand_in], images[stand_in]

    @plain
    def parse(index, record):
        image, label = source.features.parse(record)
        return index, label, image

    @plain
    def replaced(ids, labels, images):
        values = tf.numpy_function(
            replace, [ids, labels, images], (tf.int32, tf.string), stateful=True
        )
        return ids, tf.ensure_shape(values[0], labels.shape), tf.ensure_shape(values[1], ids.shape)

    while True:
        # What is read past is not even parsed.
        encoded = pairs.skip(done * b).map(parse, num_parallel_calls=tf.data.AUTOTUNE)
        try:
            data = finish(encoded.batch(b).map(replaced)).prefetch(2)
            for batch in arrays(data):
                yield batch
                done += 1
            return
        except failure as error:
            if isinstance(error, damaged):
                raise unreadable(source.name, error) from None
            _note_corrupt(source, encoded.batch(b).take(corrupt.LOOK_AHEAD), error)


def _note_corrupt(source: StreamSource, encoded: tf.data.Dataset, error: Exception) -> None:
    """Marks or reports the corrupt examples of the first batch that has new ones."""
    batches = arrays(encoded)
    while True:
        try:
            ids, _, images = next(batches)
        except StopIteration:
            raise error from None
        except tf.errors.OpError as record_error:  # not an image but its record is damaged
            raise unreadable(source.name, record_error) from None
        found = {int(i): corrupt.fault_of(x) for i, x in zip(ids, images, strict=True)}
        bad = {i: reason for i, reason in found.items() if reason}
        new = [i for i in bad if i not in source.replaced]
        if not new:
            continue
        if source.on_corrupt == "error" or len(bad) == len(ids):
            raise corrupt.error_for(source, new[0], bad[new[0]]) from None
        for index in new:
            source.replaced[index] = -1  # by a neighbour in its batch
            corrupt.warn(source, index, "its neighbour", bad[index])
        return
