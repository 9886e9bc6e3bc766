"""A dataset that lives in device memory, and what the host still sends: ids and draws.

Every device holds the whole set and takes its own rows out of it, so that nothing is communicated:
CIFAR-10 is 150 MB. No TensorFlow.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from common.data.augment import draws, on_device
from common.data.augment.presets import Augmentation
from common.data.feed.batches import Batches
from common.data.feed.recipe import FeedRecipe, Plan
from common.data.sources.base import Source
from common.errors import UserError
from common.sharding import replicated

_SHARE = 0.5  # of a device's memory, at most; the rest is for the network


def load(source: Source, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a dataset on every device.

    Args:
        source: images of one shape, held as pixels.
        mesh: the device mesh.

    Returns:
        `data_images` uint8 [n, h, w * 3] and `data_labels` int32 [n]. (With the channels as an
        axis of their own, a TPU would pad 3 of them to 128.)

    Raises:
        UserError: other images, or more of them than fit.
    """
    if reason := obstacle(source, mesh):
        raise UserError(reason)
    shapes = shapes_of(source.num_examples, source.shape)
    images, labels = source.read(np.arange(source.num_examples))
    arrays = {"data_images": images, "data_labels": labels}
    return {
        name: jax.make_array_from_process_local_data(
            replicated(mesh),
            np.ascontiguousarray(x, shapes[name].dtype).reshape(shapes[name].shape),
        )
        for name, x in arrays.items()
    }


def obstacle(source: Source, mesh: Mesh) -> str:
    """Why `load` cannot put a dataset on the devices, in one line; "" if it can."""
    if not has_one_shape(source):
        return (
            f"data.augment_on=device needs images of one shape, held as pixels, and "
            f"{source.name} ({source.split}) has files of any shape: choose both or host"
        )
    shapes = shapes_of(source.num_examples, source.shape)
    size = sum(x.dtype.itemsize * x.size for x in shapes.values())
    memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if memory and size > _SHARE * memory:
        return (
            f"{source.name} ({source.split}) has {size / 2**30:.1f} GiB and a device "
            f"{memory / 2**30:.1f}: more than data.augment_on=device can keep there; choose both"
        )
    return ""


def has_one_shape(source: Source) -> bool:
    """Whether the images are pixels of one shape, which need no decoding."""
    return source.kind in ("pixels", "views")


def shapes_of(n: int, image_shape: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `load` returns for n images [h, w, 3]."""
    height, width = image_shape
    return {
        "data_images": jax.ShapeDtypeStruct((n, height, width * 3), np.uint8),
        "data_labels": jax.ShapeDtypeStruct((n,), np.int32),
    }


def views(
    batch: dict[str, jax.Array],
    i: jax.Array | int,
    augmentations: tuple[Augmentation, ...],
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array]:
    """What one step of a batch sees; part of a compiled program.

    Args:
        batch: what `ResidentBatches.take` gave, as global arrays, and what `load` gave.
        i: which of its steps, from 0.
        augmentations: one a view, v of them.
        mesh: the device mesh.

    Returns:
        Views uint8 [b, v, size, size, 3], sharded along b, and labels int32 [b].
    """
    ids = batch["ids"][:, i]
    images = batch["data_images"][ids]
    images = images.reshape(*images.shape[:2], -1, 3)
    images = on_device.views(
        on_device.augment_pixels, images, batch["parameters"][:, i],
        augmentations=augmentations, mesh=mesh,
    )  # fmt: skip
    return images, batch["data_labels"][ids]


class ResidentBatches(Batches):
    """Which examples come next and what is to happen to them; see `batches.Batches`.

    Args:
        source: of the training split.
        recipe: of the run.
        plan: step -> (epoch, ids [b]) of this process.
        steps: in an epoch.
        position: of the first batch.
    """

    def __init__(
        self,
        source: Source,
        recipe: FeedRecipe,
        plan: Plan,
        steps: int,
        position: int,
    ) -> None:
        super().__init__(iter(()), source, steps, position, readers=0)
        self._shape, self._recipe, self._plan = source.image_shape, recipe, plan

    def take(self, steps: int) -> tuple[np.ndarray, dict[str, Any]]:
        """What the program of the next steps takes.

        Args:
            steps: 1 to `steps_per_dispatch`.

        Returns:
            Ids [steps, b], and the batch: `ids` int32 [b, steps_per_dispatch], `parameters`
            float32 [b, steps_per_dispatch, v, draws.PARAMETERS] with boxes, both 0 after the first
            `steps`, and `steps` int32.
        """
        most = self._recipe.steps_per_dispatch
        planned = [self._plan(self.position + i) for i in range(steps)]
        epochs, ids = np.array([epoch for epoch, _ in planned]), np.stack([i for _, i in planned])
        b = ids.shape[1]
        parameters = np.zeros((b, most, len(self._recipe.views), draws.PARAMETERS), np.float32)
        for epoch in np.unique(epochs):  # of many steps at once: a call costs as much as 1,000 rows
            chosen = np.flatnonzero(epochs == epoch)
            drawn, _ = draws.draw_views(
                self._recipe.views, self._recipe.seed, int(epoch), ids[chosen].ravel(), self._shape
            )
            parameters[:, chosen] = drawn.reshape(len(chosen), b, *drawn.shape[1:]).swapaxes(0, 1)
        padded = np.zeros((b, most), np.int32)
        padded[:, :steps] = ids.T
        self.position += steps
        return ids, {"ids": padded, "parameters": parameters, "steps": np.int32(steps)}
