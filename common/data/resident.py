"""A data set that lives in device memory, and what the host still sends: ids and draws.

Every device holds the whole set and takes its own rows out of it, so that nothing is communicated:
CIFAR-10 is 150 MB. No TensorFlow.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from common.data import draws
from common.data.presets import Augmentation
from common.data.sources import Source
from common.errors import UserError
from common.sharding import replicated

_SHARE = 0.5  # of a device's memory, at most; the rest is for the network


def load(source: Source, mesh: Mesh) -> dict[str, jax.Array]:
    """Puts a data set on every device.

    Args:
        source: images of one shape, held as pixels.
        mesh: the device mesh.

    Returns:
        `data_images` uint8 [n, h, w * 3] and `data_labels` int32 [n]. (With the channels as an
        axis of their own, a TPU would pad 3 of them to 128.)

    Raises:
        UserError: other images, or more of them than fit.
    """
    if source.kind not in ("pixels", "views"):
        raise UserError(
            f"data.augment_on=device needs images of one shape, held as pixels, and "
            f"{source.name} ({source.split}) has files of any shape: choose both or host"
        )
    shapes = shapes_of(source.num_examples, source.image_shape)
    size = sum(x.dtype.itemsize * x.size for x in shapes.values())
    memory = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    if memory and size > _SHARE * memory:
        raise UserError(
            f"{source.name} ({source.split}) has {size / 2**30:.1f} GiB and a device "
            f"{memory / 2**30:.1f}: more than data.augment_on=device can keep there; choose both"
        )
    images, labels = source.read(np.arange(source.num_examples))
    arrays = {"data_images": images, "data_labels": labels}
    return {
        name: jax.make_array_from_process_local_data(
            replicated(mesh),
            np.ascontiguousarray(x, shapes[name].dtype).reshape(shapes[name].shape),
        )
        for name, x in arrays.items()
    }


def shapes_of(n: int, image_shape: tuple[int, int]) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of what `load` returns for n images [h, w, 3]."""
    height, width = image_shape
    return {
        "data_images": jax.ShapeDtypeStruct((n, height, width * 3), np.uint8),
        "data_labels": jax.ShapeDtypeStruct((n,), np.int32),
    }


class ResidentBatches:
    """Which examples come next and what is to happen to them; `pipeline.Batches` says the rest.

    Args:
        source: of the training split.
        config: the whole config.
        augmentations: of view 1 and view 2.
        plan: step -> (epoch, ids [b]) of this process.
        steps: in an epoch.
        position: of the first batch.
    """

    readers = 0
    corrupt_count = 0

    def __init__(
        self,
        source: Source,
        config: ConfigDict,
        augmentations: tuple[Augmentation, Augmentation],
        plan: Callable[[int], tuple[int, np.ndarray]],
        steps: int,
        position: int,
    ) -> None:
        self._shape, self._augmentations, self._plan = source.image_shape, augmentations, plan
        self._seed, self._most = config.seed, config.steps_per_dispatch
        self.steps_per_epoch, self.position = steps, position

    def take(self, steps: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """What the program of the next steps takes.

        Args:
            steps: 1 to `steps_per_dispatch`.

        Returns:
            Ids [steps, b], and the batch: `ids` int32 [b, steps_per_dispatch], `parameters`
            float32 [b, steps_per_dispatch, 2, draws.PARAMETERS] with boxes, both 0 after the first
            `steps`, and `steps` int32.
        """
        planned = [self._plan(self.position + i) for i in range(steps)]
        epochs, ids = np.array([epoch for epoch, _ in planned]), np.stack([i for _, i in planned])
        b = ids.shape[1]
        parameters = np.zeros((b, self._most, 2, draws.PARAMETERS), np.float32)
        for epoch in np.unique(epochs):  # of many steps at once: a call costs as much as 1,000 rows
            chosen = np.flatnonzero(epochs == epoch)
            drawn, _ = draws.draw_pair(
                self._augmentations, self._seed, int(epoch), ids[chosen].ravel(), self._shape
            )
            parameters[:, chosen] = drawn.reshape(len(chosen), b, *drawn.shape[1:]).swapaxes(0, 1)
        padded = np.zeros((b, self._most), np.int32)
        padded[:, :steps] = ids.T
        self.position += steps
        return ids, {"ids": padded, "parameters": parameters, "steps": np.int32(steps)}
