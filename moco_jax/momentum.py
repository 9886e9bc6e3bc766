"""What all versions of MoCo share: a momentum encoder, its keys, and the step that uses them."""

from typing import Any

import jax
import jax.numpy as jnp

from common import momentum as momentum_encoder
from common.method import Method, embedding_metrics, stream


class MomentumMethod(Method):
    """A method with a momentum encoder, which starts as a copy of the encoder.

    Attributes:
        pairs: a query's view and its key's, of each direction of the loss.
        key_views: the views of which keys are made, in the order of their passes.
        loss_scale: factor on the loss before its gradient is taken.
    """

    pairs: tuple[tuple[int, int], ...] = ((0, 1),)
    key_views: tuple[int, ...] = (1,)
    loss_scale: float = 1.0

    def momentum(self, step: jax.Array) -> float | jax.Array:
        """Share of the old parameters in the update of the momentum encoder in step t = 0, 1 ..."""
        raise NotImplementedError

    def contrast(
        self, queries: jax.Array, keys: jax.Array, state: Any, direction: int
    ) -> tuple[jax.Array, dict]:
        """Loss of one direction, a scalar, and its metrics; no gradient reaches the keys.

        Args:
            queries: `[b, dim]`, of one view.
            keys: `[b, dim]`, of the other.
            state: before the step.
            direction: its number in `pairs`.
        """
        raise NotImplementedError

    def make_keys(self, params: Any, batch_stats: Any, images: jax.Array, key: jax.Array) -> tuple:
        """`(keys [b, dim], new batch_stats)` of uint8 images, of the momentum encoder in training.

        Its batch norm sees the batch too: the statistics are its own, and not averaged.
        """
        _, keys, batch_stats = self.setup.forward(params, batch_stats, images, key)
        return keys, batch_stats

    def next_fields(self, state: Any, keys: list[jax.Array]) -> dict[str, jax.Array]:
        """Fields of the next state that depend on the keys, one array a direction; by name."""
        del state, keys
        return {}

    def train_step(self, state: Any, batch: dict, key: jax.Array) -> tuple:
        """See `Method.train_step`. Order: momentum update, keys, queries and their loss.

        The momentum encoder is updated before it makes keys, with the parameters that make this
        step's queries. Each view has a pass of its own, so batch statistics are of one view.

        The metric "loss" is the sum of the directions whatever `loss_scale` is, and "gradient_norm"
        is of the gradient that the optimiser gets, which is `loss_scale` times that of "loss".
        """
        setup, images = self.setup, batch["images"]
        key_params = self.averaged(state, self.momentum(state.step))
        key_stats, of_view = state.key_batch_stats, {}
        for view in self.key_views:
            draws = stream(key, state.step, f"key{view}")  # drop path, where there is any
            of_view[view], key_stats = self.make_keys(key_params, key_stats, images[:, view], draws)
        keys = [of_view[view] for _, view in self.pairs]

        def loss_fn(params: Any) -> tuple:
            stats, losses, metrics, seen, projected = state.batch_stats, [], [], [], []
            for direction, ((view, _), its_keys) in enumerate(zip(self.pairs, keys, strict=True)):
                draws = stream(key, state.step, f"query{view}")
                features, z, stats = setup.forward(params, stats, images[:, view], draws)
                queries = z
                if setup.network.predictor is not None:
                    queries, stats = setup.apply("predict", params, stats, z)
                loss, scores = self.contrast(queries, its_keys, state, direction)
                losses.append(loss)
                metrics.append(scores)
                seen.append(features)
                projected.append(z)
            # means over the directions; the loss itself is their sum
            scores = jax.tree.map(lambda *x: sum(x) / len(x), *metrics)
            features, z = by_image(seen), by_image(projected)
            total = sum(losses)
            scores |= {"loss": total} | embedding_metrics(features, z)
            return self.loss_scale * total, (stats, features, scores)

        grads, (stats, features, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        state, more = setup.next_state(
            state,
            grads,
            stats,
            features,
            batch["labels"],
            key_params=key_params,
            key_batch_stats=key_stats,
            **self.next_fields(state, keys),
        )
        return state, metrics | more

    def averaged(self, state: Any, momentum: float | jax.Array) -> Any:
        """The momentum encoder's parameters after one update with the encoder's of this step."""
        return momentum_encoder.averaged(state, momentum, self.setup.network.frozen)

    def adopted(self, state: Any, taken: set[str]) -> tuple[Any, list[str]]:
        """Without a momentum encoder in that run, the key encoder is a copy of its weights."""
        return momentum_encoder.adopted(state, taken)


def by_image(directions: list[jax.Array]) -> jax.Array:
    """Rows of each direction, `[b, d]`, as one array, with those of an image one after the other.

    So they stay on its device.

    Args:
        directions: one or two arrays.

    Returns:
        `[b * directions, d]`.
    """
    return jnp.stack(directions, 1).reshape(-1, directions[0].shape[-1])
