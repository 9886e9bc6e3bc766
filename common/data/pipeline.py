"""Batches of two views for training, and of plain images for evaluation.

The order is global and then split: batch t of epoch e is `order(seed, e, n)[t * B : (t + 1) * B]`
on any number of processes, and each process loads the rows that its devices hold. A batch follows
from (seed, step) alone, so a run that was interrupted starts again anywhere at no cost.
"""

import functools
from collections.abc import Iterator

import numpy as np
from ml_collections import ConfigDict

from common.data import presets
from common.data.draws import order
from common.data.sources import Source
from common.errors import UserError

__all__ = ["eval_batches", "order", "steps_per_epoch", "train_batches"]

# From this size on, evaluation cuts the centre out of a larger image, as ImageNet is evaluated;
# smaller sets are used whole.
_CENTRE_CROP_ABOVE = 64
_CENTRE_CROP = 0.875


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Full batches in the set; what remains is dropped, other examples in each epoch.

    Raises:
      UserError: the set is smaller than a batch.
    """
    if not 1 <= batch_size <= source.num_examples:
        raise UserError(
            f"batch_size is {batch_size}, but {source.name} ({source.split}) has "
            f"{source.num_examples} examples; expected 1 to {source.num_examples}. "
            "Set a smaller config.batch_size."
        )
    return source.num_examples // batch_size


def train_batches(
    source: Source,
    config: ConfigDict,
    *,
    rows: np.ndarray,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    saved_process_count: int | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end, over epochs.

    Args:
      source: of the training split.
      config: the whole config: `seed`, `batch_size`, `data`, `augment`, `augment_view2`.
      rows: [b_local] rows of the global batch that this process holds, in its order.
      start_step: position in the data; nothing before it is decoded.
      process_index, process_count: who reads which share of a streamed set; else unused.
      saved_process_count: how many processes had read up to `start_step`.

    Returns:
      Iterator of {"images": uint8 [b_local, 2, h, w, 3], "labels": int32 [b_local] (-1
      unlabelled), "ids": int64 [b_local]}, with the attributes `steps_per_epoch`, `position`
      (pass it as `start_step` to continue after the batches taken) and `corrupt_count`.

    Raises:
      UserError: batch larger than the set, bad augmentation, a corrupt image (while iterating).
    """
    steps = steps_per_epoch(source, config.batch_size)
    rows = np.asarray(rows, np.int64)
    augmentations = presets.resolve_views(config)
    if source.kind == "stream":
        from common.data import stream

        return stream.train_batches(
            source, config, augmentations, steps, rows, start_step, process_index, process_count,
            saved_process_count,
        )  # fmt: skip

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        return order(config.seed, epoch, source.num_examples)

    def plan(step: int) -> tuple[int, np.ndarray]:
        epoch, step = divmod(int(step), steps)
        return epoch, epoch_order(epoch)[step * config.batch_size + rows]

    if source.kind == "views":
        batches = _fake_batches(source, plan, start_step)
    else:
        from common.data import feed

        batches = feed.train_feed(source, plan, config.seed, augmentations, start_step)
    return Batches(batches, source, steps, start_step)


class Batches:
    """Iterator over batches that knows its place.

    Attributes:
      steps_per_epoch: full batches in an epoch.
      position: of the next batch in the data; equals the training step, except after a streamed
        run went on with another number of processes.
      corrupt_count: corrupt images replaced so far.
    """

    def __init__(self, batches: Iterator[dict], source: Source, steps: int, position: int):
        self._batches, self._source = batches, source
        self.steps_per_epoch, self.position = steps, position

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._batches)
        self.position += 1
        return batch

    @property
    def corrupt_count(self) -> int:
        return self._source.corrupt_count


def _fake_batches(source: Source, plan, step: int) -> Iterator[dict[str, np.ndarray]]:
    while True:
        _, ids = plan(step)
        views = np.stack([source.fetch(ids), source.fetch(ids + 1)], axis=1)
        yield {"images": views, "labels": source.read(ids)[1], "ids": ids}
        step += 1


def eval_batches(
    source: Source,
    batch_size: int,
    image_size: int,
    rows: np.ndarray,
    *,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[dict[str, np.ndarray]]:
    """One pass over a set, without augmentation and in its own order.

    The shorter side is resized (bilinear, antialiased) and the centre is cut out: 87.5 % of it
    above 64 pixels, all of it below. The last batch is padded, so that every process sees the same
    number of batches of one shape.

    Args:
      source: of any split.
      batch_size: of the global batch, >= 1.
      image_size: side of the images, in pixels.
      rows: [b_local] rows of the global batch that this process holds.
      process_index, process_count: who reads which share of a streamed set; else unused.

    Returns:
      Iterator of {"images": uint8 [b_local, h, w, 3], "labels": int32 [b_local], "mask": bool
      [b_local] (False: padding), "ids": int64 [b_local] (-1: padding)}.

    Raises:
      UserError: batch_size < 1, or a corrupt image.
    """
    if batch_size < 1:
        raise UserError(f"the evaluation's batch size is {batch_size}; expected at least 1.")
    rows = np.asarray(rows, np.int64)
    if source.kind == "stream":
        from common.data import stream

        return stream.eval_batches(
            source, batch_size, image_size, rows, process_index, process_count
        )
    plan = [start + rows for start in range(0, source.num_examples, batch_size)]
    if source.image_shape == (image_size, image_size) and source.kind in ("pixels", "views"):
        read = (source.read(np.minimum(ids, source.num_examples - 1)) for ids in plan)
    else:
        from common.data import feed

        read = feed.eval_feed(source, plan, image_size)
    return _masked(source, plan, read)


def _masked(source: Source, plan: list[np.ndarray], read) -> Iterator[dict[str, np.ndarray]]:
    """Hides what lies past the end of the set, where the last example was read again."""
    for ids, (images, labels) in zip(plan, read, strict=True):
        mask = ids < source.num_examples
        yield {
            "images": np.where(mask[:, None, None, None], images, np.uint8(0)),
            "labels": np.where(mask, labels, -1).astype(np.int32),
            "mask": mask,
            "ids": np.where(mask, ids, -1),
        }


def resize_to(image_size: int) -> int:
    """Length of the shorter side before the centre is cut out."""
    return round(image_size / _CENTRE_CROP) if image_size > _CENTRE_CROP_ABOVE else image_size
