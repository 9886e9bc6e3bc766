"""TFRecord sets that do not fit in memory.

Process p of P reads the p-th of P equal parts of the set, reshuffled in each epoch: files in
random order, several at a time, through a shuffle buffer. The order depends on (seed, epoch, P).
Examples keep their global ids, so their augmentation is the same as in memory. Resuming inside an
epoch reads past the records that have been seen without decoding them.
"""

import time
from collections.abc import Callable, Iterator

import numpy as np

from common.data.augment import draws
from common.data.feed import corrupt, feed
from common.data.feed.batches import Batches
from common.data.feed.recipe import FeedRecipe
from common.data.images.tensorflow_host import arrays, plain, tf
from common.data.order import hash64
from common.data.sources.tfrecords import (
    StreamSource,
    numbered,
    process_range,
    select_range,
    unreadable,
)
from common.errors import UserError
from common.run import console

_FILES_AT_ONCE = 16
_FILES, _BUFFER = 3, 4  # streams of `hash64`


def epoch_records(
    source: StreamSource, seed: int, epoch: int, index: int, count: int
) -> tf.data.Dataset:
    """One process's (id, record) pairs of an epoch, shuffled, nothing decoded."""
    parts = select_range(source.shards, *process_range(source.num_examples, index, count))
    ranks = hash64(_FILES, seed, epoch, np.array([part.first for part in parts]))
    parts = [parts[i] for i in np.argsort(ranks, kind="stable")]
    buffer = min(source.shuffle_buffer, sum(part.take for part in parts))
    shuffle_seed = int(hash64(_BUFFER, seed, epoch, index, count)[0] >> np.uint64(1))
    data = numbered(parts, min(_FILES_AT_ONCE, len(parts)))
    return data.shuffle(buffer, seed=shuffle_seed, reshuffle_each_iteration=False)


def train_batches(
    source: StreamSource,
    recipe: FeedRecipe,
    steps: int,
    rows: np.ndarray,
    start: int,
    index: int,
    count: int,
) -> Batches:
    """`pipeline.train_batches` for a streamed set; `steps` is the number of steps in an epoch."""
    b = len(rows)
    if b * count != recipe.batch_size:
        raise _uneven(index, count, b, recipe.batch_size)
    batches = _train(source, recipe, steps, b, start, index, count)
    return Batches(batches, source, steps, start, count)


def _uneven(index: int, count: int, b: int, batch_size: int) -> UserError:
    return UserError(
        f"process {index} of {count} holds {b} rows of a batch of {batch_size}; expected "
        f"{batch_size / count:g}. A streamed set needs a batch that divides evenly among processes."
    )


def _train(
    source: StreamSource, recipe: FeedRecipe, steps: int, b: int, start: int, index: int, count: int
) -> Iterator[dict]:
    augment, named = feed.augmenter(source, recipe), feed.named(recipe)
    n, (epoch, done) = len(recipe.views), divmod(start, steps)
    while True:

        def draw(ids, epoch=epoch):
            return draws.draw_views(recipe.views, recipe.seed, epoch, ids, None)

        def finish(data, draw=draw):
            @plain
            def drawn(ids, labels, images):
                values = tf.numpy_function(draw, [ids], (tf.float32, tf.float32), stateful=False)
                parameters = tf.ensure_shape(values[0], [b, n, draws.PARAMETERS])
                crops = tf.ensure_shape(values[1], [b, n, draws.CROP_DRAWS])
                return ids, labels, images, parameters, crops

            @plain
            def single(index, label, image, parameters, crops):
                return named(augment(image, parameters, crops), label, index, parameters)

            data = data.map(drawn).unbatch()
            data = data.map(single, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
            return data.batch(b, drop_remainder=True)

        records_left = epoch_records(source, recipe.seed, epoch, index, count).take(steps * b)
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
    start, end = process_range(source.num_examples, index, count)
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
        for batch in _run(
            source, numbered(select_range(source.shards, start, end), 1), b, finish, 0
        ):
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
    """Batches of `pairs` after the first `done`; continues without corrupt images, or names one.

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
