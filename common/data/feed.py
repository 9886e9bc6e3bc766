"""tf.data over a source with random access: read, decode, crop, augment, batch.

What a step needs is worked out in NumPy (ids, draws, bytes or pixels); TensorFlow does the work on
pixels, in parallel and in order. Images of one shape are handled as whole batches, all others one
by one.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from common.data import augment_host, corrupt, decode, draws
from common.data.pipeline import resize_to
from common.data.presets import Augmentation
from common.data.sources import Source
from common.data.tensorflow_host import plain, tf, traced

_READ_AHEAD = 2  # batches
_NEVER = np.iinfo(np.int64).max


def train_feed(
    source: Source,
    plan: Callable[[int], tuple[int, np.ndarray]],
    seed: int,
    augmentations: tuple[Augmentation, Augmentation],
    step: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of two views without end.

    Args:
      source: of kind "pixels", "encoded" or "path".
      plan: step -> (epoch, ids [b]).
      seed: of the run.
      augmentations: of view 1 and view 2.
      step: the first one.

    Yields:
      {"images": uint8 [b, 2, size, size, 3], "labels": int32 [b], "ids": int64 [b]}.

    Raises:
      UserError: a corrupt image, unless the source replaces them.
    """

    def load(step: int):
        epoch, ids = plan(step)
        payload, labels = source.read(source.stand_ins(ids))
        parameters, crops = draw_pair(augmentations, seed, epoch, ids, source.image_shape)
        return ids, labels, payload, parameters, crops

    @plain
    def whole(ids, labels, images, parameters, crops):
        parameters = tf.ensure_shape(parameters, [b, 2, draws.PARAMETERS])
        images = tf.ensure_shape(images, [b, *source.image_shape, 3])
        return {"images": augment(images, parameters), "labels": labels, "ids": ids}

    @plain
    def single(index, label, payload, parameters, crops):
        views = augment(corrupt.file_bytes(source, payload), parameters, crops)
        return {"images": views, "labels": label, "ids": index}

    augment = augmenter(source, augmentations)
    b = len(plan(step)[1])
    start = tf.Variable(step, dtype=tf.int64)
    data = _loaded(start, _NEVER, load, source, (tf.float32, tf.float32))
    if source.kind == "pixels":
        data = data.map(whole, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    else:
        data = data.unbatch()
        data = data.map(single, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
        data = data.batch(b, drop_remainder=True)
    return _guarded(source, data.prefetch(_READ_AHEAD), lambda step: plan(step)[1], start, _NEVER)


def draw_pair(
    augmentations: tuple[Augmentation, Augmentation],
    seed: int,
    epoch: int,
    ids: np.ndarray,
    shape: tuple[int, int] | None,
) -> tuple[np.ndarray, np.ndarray]:
    """All draws of both views.

    Args:
      augmentations: of view 1 and view 2.
      seed, epoch, ids: as in `draws.uniforms`.
      shape: (h, w) when all images share it.

    Returns:
      parameters float32 [b, 2, PARAMETERS], with boxes if the shape is known; crop draws float32
      [b, 2, CROP_DRAWS], or [b, 0] if it is.
    """
    parameters = []
    for view, augmentation in enumerate(augmentations):
        drawn = draws.view_parameters(augmentation, seed, epoch, ids, view)
        if shape is not None:
            drawn[:, draws.BOX] = draws.crop_boxes(augmentation, *shape, seed, epoch, ids, view)
        parameters.append(drawn)
    crops = np.zeros((len(ids), 0), np.float32)
    if shape is None:
        crops = np.stack([draws.crop_draws(seed, epoch, ids, view) for view in (0, 1)], axis=1)
    return np.stack(parameters, axis=1), crops


def eval_feed(
    source: Source, plan: list[np.ndarray], image_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """One pass over `plan`, decoded and resized.

    Args:
      source: of kind "pixels", "encoded" or "path".
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
        if source.kind == "pixels":
            payload = tf.ensure_shape(payload, [*source.image_shape, 3])
        else:
            payload = corrupt.file_bytes(source, payload)
        return {"images": shown(payload), "labels": label}

    shown = evaluator(image_size, encoded=source.kind != "pixels")
    start = tf.Variable(0, dtype=tf.int64)
    data = _loaded(start, len(plan), load, source, ()).unbatch()
    data = data.map(single, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    data = data.batch(len(plan[0]), drop_remainder=True).prefetch(_READ_AHEAD)
    batches = _guarded(source, data, lambda step: plan[step], start, len(plan))
    return ((batch["images"], batch["labels"]) for batch in batches)


def augmenter(source: Source, augmentations: tuple[Augmentation, Augmentation]) -> Callable:
    """`augment_pixels` or `augment_encoded` for a source.

    Where corrupt images are replaced, all of each image is decoded: whether it is good must not
    depend on the crop, or a resumed run could choose otherwise.
    """
    whole = source.on_corrupt == "replace"
    return _augmenter(augmentations, source.kind == "pixels", whole)


@functools.cache  # one trace for all epochs and restarts
def _augmenter(augmentations: tuple, pixels: bool, whole: bool) -> Callable:
    if pixels:
        return traced(lambda x, p: augment_host.augment_pixels(x, p, augmentations))
    return traced(
        lambda x, p, crops: augment_host.augment_encoded(x, p, crops, augmentations, whole)
    )


@functools.cache
def evaluator(image_size: int, encoded: bool) -> Callable:
    """Function of one image, or of its file's bytes, to uint8 [image_size, image_size, 3]."""

    def shown(image):
        image = decode.decode(image) if encoded else image
        return augment_host.centre(image, resize_to(image_size), image_size)

    return traced(shown)


def _loaded(
    start: tf.Variable, end: int, load: Callable, source: Source, extra: tuple
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
            values[3].set_shape([None, 2, draws.PARAMETERS])
            values[4].set_shape([None, None] if source.image_shape else [None, 2, draws.CROP_DRAWS])
        return tuple(values)

    return steps.map(call, num_parallel_calls=_READ_AHEAD, deterministic=True)


def _guarded(
    source: Source,
    data: tf.data.Dataset,
    ids_of: Callable[[int], np.ndarray],
    start: tf.Variable,
    end: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yields from `data`; when an image cannot be read, names it or goes on without it."""
    failure = tf.errors.OpError  # a name of our own: modules may be gone when a generator is closed
    while True:
        step = int(start.numpy())
        try:
            for batch in data.as_numpy_iterator():
                yield batch
                step += 1
            return
        except failure as error:
            ahead = range(step, min(end, step + corrupt.LOOK_AHEAD))
            corrupt.replace_or_name(source, map(ids_of, ahead), error)
            start.assign(step)
