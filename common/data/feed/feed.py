"""tf.data over a source with random access: read, decode, crop, augment, batch.

What a step needs is worked out in NumPy (ids, draws, bytes or pixels); TensorFlow does the work on
pixels, in parallel and in order. Images of one shape are handled as whole batches, all others one
by one.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from common.data.augment import draws, on_host, presets
from common.data.augment.resize import resize_to
from common.data.feed import corrupt, survey
from common.data.feed.recipe import FeedRecipe, Plan
from common.data.images import decode
from common.data.images.decoding import Decoding
from common.data.images.tensorflow_host import arrays, plain, tf, traced
from common.data.sources.base import Source

_READ_AHEAD = 2  # batches
_NEVER = np.iinfo(np.int64).max


def train_feed(
    source: Source,
    plan: Plan,
    recipe: FeedRecipe,
    step: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of augmented views without end.

    Args:
        source: of kind "pixels", "encoded" or "path".
        plan: step -> (epoch, ids [b]).
        recipe: of the run; with `augment_on="both"` what follows crop, resize and flip is left to
          the device, which then needs the draws.
        step: the first one.

    Yields:
        {"images": uint8 [b, v, size, size, 3], "labels": int32 [b], "ids": int64 [b]}, and
        "parameters" float32 [b, v, draws.PARAMETERS] with `augment_on="both"`.

    Raises:
        UserError: a corrupt image, unless the source replaces them.
    """

    def load(step: int):
        epoch, ids = plan(step)
        payload, labels = source.read(source.stand_ins(ids))
        parameters, crops = draws.draw_views(
            recipe.views, recipe.seed, epoch, ids, source.image_shape
        )
        return ids, labels, payload, parameters, crops

    shape = source.image_shape or ()  # () where `whole` is not used

    @plain
    def whole(ids, labels, images, parameters, crops):
        parameters = tf.ensure_shape(parameters, [b, n, draws.PARAMETERS])
        images = tf.ensure_shape(images, [b, *shape, 3])
        return batch(augment(images, parameters), labels, ids, parameters)

    @plain
    def single(index, label, payload, parameters, crops):
        views = augment(corrupt.file_bytes(source, payload), parameters, crops)
        return batch(views, label, index, parameters)

    augment, batch = augmenter(source, recipe), named(recipe)
    b, n = len(plan(step)[1]), len(recipe.views)
    start = tf.Variable(step, dtype=tf.int64)
    data = _loaded(start, _NEVER, load, source, (tf.float32, tf.float32), n)
    if source.kind == "pixels":
        data = data.map(whole, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    else:
        data = data.unbatch()
        data = data.map(single, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        data = data.batch(b, drop_remainder=True)
    return _guarded(source, data.prefetch(_READ_AHEAD), lambda step: plan(step)[1], start, _NEVER)


def eval_feed(
    source: Source, plan: list[np.ndarray], image_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One pass over `plan`, decoded and resized.

    Args:
        source: of kind "encoded" or "path".
        plan: ids [b] of each batch.
        image_size: side of the result.

    Yields:
        (uint8 [b, image_size, image_size, 3], int32 [b] labels).

    Raises:
        UserError: a corrupt image, unless the source replaces them.
    """
    if not plan:
        return iter(())

    def load(step: int):
        payload, labels = source.read(source.stand_ins(plan[step]))
        return plan[step], labels, payload

    @plain
    def single(index, label, payload):
        return {"images": shown(corrupt.file_bytes(source, payload)), "labels": label}

    shown = evaluator(source, image_size)
    start = tf.Variable(0, dtype=tf.int64)
    data = _loaded(start, len(plan), load, source, ()).unbatch()
    data = data.map(single, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(len(plan[0]), drop_remainder=True).prefetch(_READ_AHEAD)
    batches = _guarded(source, data, lambda step: plan[step], start, len(plan))
    return ((batch["images"], batch["labels"]) for batch in batches)


def named(recipe: FeedRecipe) -> Callable[..., dict]:
    """Function that gives (views, labels, ids, parameters) the names they have in a batch."""
    names = ("images", "labels", "ids", *(() if recipe.colour else ("parameters",)))
    return lambda *values: dict(zip(names, values, strict=False))


def augmenter(source: Source, recipe: FeedRecipe) -> Callable:
    """`augment_pixels` or `augment_encoded` for a source, or the part of it that the host does.

    Where corrupt images are replaced, all of each image is decoded: whether it is good must not
    depend on the crop, or a resumed run could choose otherwise.
    """
    whole = source.on_corrupt == "replace"
    survey.ensure_decided(source)
    views = recipe.views if recipe.colour else tuple(map(presets.crop_only, recipe.views))
    return _augmenter(views, source.kind == "pixels", whole, source.decoding)


@functools.cache  # one trace for all epochs and restarts
def _augmenter(augmentations: tuple, pixels: bool, whole: bool, how: Decoding) -> Callable:
    if pixels:
        return traced(lambda x, p: on_host.augment_pixels(x, p, augmentations))
    return traced(
        lambda x, p, crops: on_host.augment_encoded(x, p, crops, augmentations, whole, how)
    )


def evaluator(source: Source, image_size: int) -> Callable:
    """Function of the bytes of an image's file to uint8 [image_size, image_size, 3]."""
    survey.ensure_decided(source)
    return _evaluator(image_size, source.decoding)


@functools.cache
def _evaluator(image_size: int, how: Decoding) -> Callable:
    def shown(data):
        return on_host.centre(decode.decode(data, how), resize_to(image_size), image_size)

    return traced(shown)


def _loaded(
    start: tf.Variable, end: int, load: Callable, source: Source, extra: tuple, views: int = 0
) -> tf.data.Dataset:
    """Maps the NumPy function `load` over steps, from where `start` is when iteration begins."""
    # The detour reads the variable late, so that starting again traces nothing again.
    steps = tf.data.Dataset.range(1).flat_map(plain(lambda _: tf.data.Dataset.range(start, end)))
    payload = tf.uint8 if source.kind == "pixels" else tf.string
    types = (tf.int64, tf.int32, payload, *extra)
    ranks = (1, 1, 4 if source.kind == "pixels" else 1, *(None for _ in extra))

    @plain
    def call(step):
        values = tf.numpy_function(load, [step], types, stateful=False)
        for value, rank in zip(values, ranks, strict=True):
            if rank is not None:
                value.set_shape([None] * rank)
        if extra:
            values[3].set_shape([None, views, draws.PARAMETERS])
            shape = [None] if source.image_shape else [views, draws.CROP_DRAWS]
            values[4].set_shape([None, *shape])
        return tuple(values)

    return steps.map(call, num_parallel_calls=_READ_AHEAD, deterministic=True)


def _guarded(
    source: Source,
    data: tf.data.Dataset,
    ids_of: Callable[[int], np.ndarray],
    start: tf.Variable,
    end: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields from `data`; names an image that cannot be read, or continues without it."""
    failure = tf.errors.OpError  # a name of our own: modules may be gone when a generator is closed
    while True:
        step = int(start.numpy())
        try:
            for batch in arrays(data):
                yield batch
                step += 1
            return
        except failure as error:
            ahead = range(step, min(end, step + corrupt.LOOK_AHEAD))
            corrupt.replace_or_name(source, map(ids_of, ahead), error)
            start.assign(step)
