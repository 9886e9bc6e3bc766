"""Batches of augmented views for training, and of plain images for evaluation.

The order is global and then split: batch t of epoch e is `order(seed, e, n)[t * B : (t + 1) * B]`
on any number of processes, and each process loads the rows that its devices hold. A batch follows
from (seed, step) alone, so a run that was interrupted starts again anywhere at no cost.
"""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
from absl import logging

from common.data.augment import draws
from common.data.augment.resize import centre
from common.data.feed.batches import Batches
from common.data.feed.recipe import FeedRecipe, Plan
from common.data.feed.resident import ResidentBatches
from common.data.order import order
from common.data.sources.base import Source
from common.errors import UserError

__all__ = [
    "eval_batches", "images_of", "order", "planned_batches", "steps_per_epoch", "train_batches",
]  # fmt: skip


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
    recipe: FeedRecipe,
    *,
    rows: np.ndarray,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    saved_readers: int | None = None,
) -> Batches:
    """Batches without end, over epochs.

    Args:
        source: of the training split.
        recipe: of the run.
        rows: [b_local] rows of the global batch that this process holds, in its order.
        start_step: position in the data; nothing before it is decoded.
        process_index, process_count: which part of a streamed dataset to read; else unused.
        saved_readers: `readers` of the batches that led up to `start_step`. If these batches have
          another order, the rest of the epoch begun is skipped, with a warning.

    Returns:
        Iterator of {"images": uint8 [b_local, v, h, w, 3], "labels": int32 [b_local] (-1
        unlabelled), "ids": int64 [b_local]}, and "parameters" float32 [b_local, v,
        draws.PARAMETERS] with `augment_on="both"`. With "device" there are
        `ResidentBatches`, of which only `take` gives anything.

    Raises:
        UserError: batch larger than the set, bad augmentation, a corrupt image (while iterating).
    """
    steps = steps_per_epoch(source, recipe.batch_size)
    rows = np.asarray(rows, np.int64)
    readers = process_count if source.kind == "stream" else 0
    if saved_readers not in (None, readers) and start_step % steps:
        begun, start_step = start_step, (start_step // steps + 1) * steps
        before, now = (
            f"by {n} process(es)" if n else "in memory" for n in (saved_readers, readers)
        )
        logging.warning(
            "%s was read %s and is now read %s, in another order: the rest of epoch %d (%d of %d "
            "steps) is skipped.", source.name, before, now, begun // steps, start_step - begun,
            steps,
        )  # fmt: skip
    if source.kind == "stream":
        from common.data.feed import stream  # TensorFlow, only where it is used

        assert isinstance(source, stream.StreamSource)
        return stream.train_batches(
            source, recipe, steps, rows, start_step, process_index, process_count
        )

    @functools.lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        return order(recipe.seed, epoch, source.num_examples)

    def plan(step: int) -> tuple[int, np.ndarray]:
        epoch, step = divmod(int(step), steps)
        return epoch, epoch_order(epoch)[step * recipe.batch_size + rows]

    return _by_plan(source, recipe, plan, steps, start_step, readers)


def planned_batches(source: Source, recipe: FeedRecipe, ids: list[np.ndarray]) -> Batches:
    """Views of given examples, as `train_batches` makes them in epoch 0.

    Args:
        source: of any split, with random access.
        recipe: how the views are made.
        ids: [b_local] of each batch, all of one length; the last is repeated without end.

    Returns:
        As `train_batches`.

    Raises:
        UserError: a corrupt image (while iterating).
    """
    return _by_plan(source, recipe, lambda t: (0, ids[min(int(t), len(ids) - 1)]), len(ids), 0, 0)


def _by_plan(
    source: Source, recipe: FeedRecipe, plan: Plan, steps: int, start_step: int, readers: int
) -> Batches:
    if recipe.augment_on == "device":
        return ResidentBatches(source, recipe, plan, steps, start_step)
    if source.kind == "views":
        batches = _fake_batches(source, plan, recipe, start_step)
    else:
        from common.data.feed import feed

        batches = feed.train_feed(source, plan, recipe, start_step)
    return Batches(batches, source, steps, start_step, readers)


def _fake_batches(
    source: Source, plan: Plan, recipe: FeedRecipe, step: int
) -> Iterator[dict[str, np.ndarray]]:
    size = recipe.size
    while True:
        epoch, ids = plan(step)
        views = np.stack(
            [source.views(ids + view, size) for view in range(len(recipe.views))], axis=1
        )
        batch = {"images": views, "labels": source.read(ids)[1], "ids": ids}
        if not recipe.colour:
            drawn, _ = draws.draw_views(recipe.views, recipe.seed, epoch, ids, (size, size))
            batch["parameters"] = drawn
        yield batch
        step += 1


def eval_batches(
    source: Source,
    batch_size: int,
    image_size: int,
    rows: np.ndarray,
    *,
    limit: int = 0,
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
        limit: at most so many examples, 0 for all: evenly spaced, because folders are sorted by
          class. (Of a streamed set, which has no random access, the first batches of each process.)
        process_index, process_count: which part of a streamed dataset to read; else unused.

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
        from common.data.feed import stream

        assert isinstance(source, stream.StreamSource)
        batches = stream.eval_batches(
            source, batch_size, image_size, rows, process_index, process_count
        )
        return itertools.islice(batches, -(-limit // batch_size)) if limit else batches
    n = min(limit or source.num_examples, source.num_examples)
    places = [start + rows for start in range(0, n, batch_size)]
    # past the end the last example is read again, and hidden
    plan = [_spaced(np.minimum(place, n - 1), n, source.num_examples) for place in places]
    read = _read_centres(source, plan, image_size)
    masks = [place < n for place in places]
    return _masked(plan, masks, read)


def images_of(source: Source, ids: np.ndarray, image_size: int) -> np.ndarray:
    """The un-augmented images uint8 [n, h, w, 3] of some examples, as evaluation sees them."""
    return next(iter(_read_centres(source, [np.asarray(ids)], image_size)))[0]


def _read_centres(
    source: Source, plan: list[np.ndarray], image_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(images, labels) of each batch of ids; TensorFlow only where files are to be decoded."""
    if source.kind in ("pixels", "views"):
        pairs = (source.read(ids) for ids in plan)
        return ((centre(images, image_size), labels) for images, labels in pairs)
    from common.data.feed import feed

    return feed.eval_feed(source, plan, image_size)


def _spaced(places: np.ndarray, count: int, n: int) -> np.ndarray:
    """Ids of the examples at `places` when `count` of `n` are taken at even distances."""
    return places * n // count


def _masked(
    plan: list[np.ndarray], masks: list[np.ndarray], read
) -> Iterator[dict[str, np.ndarray]]:
    """Hides the padding."""
    for ids, mask, (images, labels) in zip(plan, masks, read, strict=True):
        yield {
            "images": np.where(mask[:, None, None, None], images, np.uint8(0)),
            "labels": np.where(mask, labels, -1).astype(np.int32),
            "mask": mask,
            "ids": np.where(mask, ids, -1),
        }
