"""The smallest network, state and batch that have every part of the real ones."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from common.config import base_config, section
from common.models import classifier
from common.sharding import make_mesh, replicated, state_shardings, to_global
from common.train.prepare import Extent, Prepared, prepare
from common.train.step import compile_step
from moco_jax.method import MoCo
from moco_jax.v3 import MoCoV3
from simclr_jax.distil import Distil
from simclr_jax.method import SimCLR

METHODS = {"simclr": SimCLR, "moco": MoCo, "moco_v3": MoCoV3, "distil": Distil}
CLASSES = 3


def config(method: str, **changes: Any) -> ConfigDict:
    """A config of kilobytes; `changes` are dotted names with `__` for the dot.

    Plain SGD without decay keeps the gradient of the first step as its momentum.
    """
    c = base_config(method, METHODS[method].default_config())
    settings = {
        "batch_size": 16,
        "duration": "8 steps",
        "data__image_size": 8,
        "model__stages": (1, 1),
        "model__width": 4,
        "model__stem": "cifar",
        "head__kind": {"moco": "moco_v2", "moco_v3": "moco_v3"}.get(method, "simclr"),
        "head__hidden": 8,
        "head__dim": 8,
        "optimizer__learning_rate": 0.5,
        "optimizer__scaling": "none",
        "optimizer__schedule": "constant",
        "optimizer__weight_decay": 0.0,
        "augment__preset": "moco_v2",  # its mean and deviation are not 0 and 1
    }
    if method == "moco":
        settings |= {"moco__queue_length": 40, "moco__momentum": 0.75}
    if method == "moco_v3":
        settings |= {"moco_v3__momentum": 0.75, "moco_v3__predictor_hidden": 8}
    if method == "distil":
        settings |= {"views": 1, "head__kind": "moco_v1", "head__dim": CLASSES}
        dtype = changes.get("model__dtype", "float32")
        settings |= {"distil__teacher": teacher(dtype), "distil__temperature": 2.0}
    for name, value in (settings | changes).items():
        *path, last = name.split("__")
        section = c
        for part in path:
            section = section[part]
        section[last] = value
    return c


@functools.cache
def teacher(dtype: str = "float32", classes: int = CLASSES, **model: Any) -> str:
    """The file of a fine-tuned network of random weights, wider than a student."""
    changes: dict[str, Any] = {"stages": (1,), "width": 6, "stem": "cifar", "dtype": dtype}
    c = classifier.Classifier(
        config=ConfigDict({
            "model": section("model", **(changes | model)),
            "vit": section("vit"),
            "head": section("head", kind="simclr", hidden=5, dim=4),
        }),
        view_size=8, layer="head1", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25), image_size=8,
        classes=tuple(map(str, range(classes))), info={"top1": 0.625},
    )  # fmt: skip
    path = pathlib.Path(tempfile.mkdtemp(prefix="teacher")) / "teacher.safetensors"
    with jax.enable_x64(dtype == "float64"):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), c.shapes())
        classifier.save(path, c, draw_state(shapes, seed=5))
    return str(path)


def build(c: ConfigDict, devices: int | None = None) -> Any:
    """The method of `c` on the first `devices` devices (default: all)."""
    return prepared(c, devices).method


def prepared(c: ConfigDict, devices: int | None = None, classes: int = CLASSES) -> Prepared:
    """A run of `c`, 8 steps in epochs of 4, on the first `devices` devices (default: all)."""
    mesh = make_mesh(jax.devices()[:devices])
    run = prepare(METHODS[c.method], c, mesh, extent=Extent(8, 4, classes))
    return attach(run.method, run)


def attach(method: Any, run: Prepared) -> Prepared:
    """`run` with another method, which also gets it, as `method.run`."""
    abstract = jax.eval_shape(method.init, jax.random.key(0))
    method.run = dataclasses.replace(
        run,
        method=method,
        setup=method.setup,
        abstract=abstract,
        shardings=state_shardings(run.mesh, abstract),
    )
    return method.run


def draw_state(abstract: Any, seed: int = 0) -> Any:
    """A state of random NumPy arrays: every BN scale, shift and running statistic, every bias.

    Scales that start at zero would zero half of the gradients and hide faults, and encoders that
    start equal would hide one taken for the other. (Compiling the real `init` takes longer than
    all the rest of a test.)
    """
    rng = np.random.default_rng(seed)

    def draw(path: tuple, x: Any) -> np.ndarray:
        names = jax.tree_util.keystr(path)
        last = str(getattr(path[-1], "key", ""))
        if "opt_state" in names or not np.issubdtype(x.dtype, np.floating):
            value = np.zeros(x.shape)
        elif last in ("scale", "var"):
            value = rng.uniform(0.5, 1.5, x.shape)
        elif last in ("bias", "mean"):
            value = rng.uniform(-0.5, 0.5, x.shape)
        else:  # kernels, and the queue, whose rows have unit length
            value = rng.normal(size=x.shape)
            last_axis = "queue" in names
            size = (value**2).sum(-1, keepdims=True) if last_axis else np.prod(x.shape[:-1]) / 2
            value /= np.sqrt(size)
        return value.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def host_batch(c: ConfigDict, step: int) -> dict[str, np.ndarray]:
    """Random views and labels (some unknown) of one step: the whole global batch."""
    rng = np.random.default_rng([7, step])
    b, size = c.batch_size, c.data.image_size
    return {
        "images": rng.integers(0, 256, (b, c.views, size, size, 3), dtype=np.uint8),
        "labels": rng.integers(-1, CLASSES, b).astype(np.int32),
    }


def place_state(method: Any, seed: int = 0) -> Any:
    """A random state on the devices, sharded as in the loop."""
    abstract = jax.eval_shape(method.init, jax.random.key(seed))
    return jax.tree.map(
        lambda x, place: jax.make_array_from_callback(x.shape, place, lambda i: x[i]),
        draw_state(abstract, seed),
        state_shardings(method.setup.mesh, abstract),
    )


def start(method: Any, seed: int = 0) -> tuple[Any, Any, Any]:
    """Returns `(state, compiled step, root key)`, placed as the loop places them."""
    mesh = method.setup.mesh
    root = jax.jit(lambda: jax.random.key(seed + 1), out_shardings=replicated(mesh))()
    step_fn = compile_step(method.train_step, method.run)
    return place_state(method, seed), step_fn, root


@dataclasses.dataclass
class Run:
    """What a few steps gave: `states[s]` after s steps and all `metrics`, both on the host."""

    method: Any
    states: list[Any]
    metrics: list[dict]
    first: Any  # the first and the last state on the devices, as shapes
    last: Any
    state: Any  # the last state itself
    step_fn: Any
    traces: int  # how often Python went through `train_step`

    def gradient(self, step: int = 0) -> Any:
        """Of a step, from SGD's momentum before and after it. Frozen parameters have none."""

        def momentum(state: Any) -> Any:
            state = state.opt_state
            if hasattr(state, "inner_states"):  # of `optax.partition`
                state = state.inner_states["train"].inner_state
            return state[0][0].trace

        before, after = momentum(self.states[step]), momentum(self.states[step + 1])
        return jax.tree.map(lambda new, old: new - 0.9 * old, after, before) if step else after


def run(method: Any, steps: int = 3, rows: Any = slice(None)) -> Run:
    """Takes `steps` steps on the batches of `host_batch`.

    Args:
        method: from `build`.
        steps: how many.
        rows: of the global batch, those that this process holds.
    """
    c, mesh = method.run.config, method.setup.mesh
    traced = []
    inner = method.train_step

    @functools.wraps(inner)  # jit looks for the name of the argument to donate
    def counted(*args: Any) -> Any:
        traced.append(1)
        return inner(*args)

    method.train_step = counted
    state, step_fn, root = start(method)
    fetch = jax.jit(lambda x: x, out_shardings=replicated(mesh))
    first, states, metrics = avals(state), [jax.device_get(fetch(state))], []
    for step in range(steps):
        batch = to_global(mesh, {k: v[rows] for k, v in host_batch(c, step).items()})
        state, scalars = step_fn(state, batch, root)
        states.append(jax.device_get(fetch(state)))
        metrics.append(jax.device_get(scalars))
    return Run(method, states, metrics, first, avals(state), state, step_fn, len(traced))


def avals(tree: Any) -> dict[str, tuple]:
    """Shape, dtype, weak type and sharding of every array by its path."""
    return {
        jax.tree_util.keystr(path): (x.shape, x.dtype, x.aval.weak_type, x.sharding)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


# A ViT of kilobytes with all that a step may have to deal with: frozen patches, drop path, and no
# batch norm; views of 8 pixels.
VIT: dict[str, Any] = {
    "model__encoder": "vit", "vit__width": 12, "vit__depth": 2, "vit__heads": 3, "vit__patch": 4,
    "vit__mlp_ratio": 2.0, "vit__patches": "frozen", "vit__drop_path": 0.3,
}  # fmt: skip
# A network of SimCLR v2 with two bottlenecks, in groups that several devices share.
SK: dict[str, Any] = {
    "model__bottleneck": True, "model__resnet_d": True, "model__sk_ratio": 0.5,
    "model__stem": "imagenet", "model__bn_groups": 4, "head__layers": 3,
}  # fmt: skip
VARIANTS: dict[str, dict] = {
    "simclr": {},
    "simclr_sk": SK,
    "simclr_dcl": {"simclr__loss": "dcl"},
    # Two slots of 32 keys, 24 of the oldest one masked, as in moco_symmetric.
    "simclr_memory": {"simclr__memory_length": 40, "simclr__memory_momentum": 0.75},
    "simclr_supcon": {"simclr__loss": "supcon"},
    # Larger than anything else in the step, and no multiple of the batch.
    "moco": {"model__bn_groups": 8, "moco__queue_length": 8189},
    # Two slots of 32 keys, 24 of the oldest one masked.
    "moco_symmetric": {"model__bn_groups": 4, "moco__symmetric": True},
    # Two slots of 16 keys of each view, 12 of the oldest one masked.
    "moco_v2plus": {
        "moco__symmetric": True, "moco__queue_per_view": True, "moco__queue_length": 20,
        "moco__momentum_end": 0.95, "moco__loss_scale": 0.5, "model__bn_groups": 1,
    },
    "moco_short_queue": {
        "model__bn_groups": 1, "moco__queue_length": 5, "head__kind": "moco_v1",
    },
    "moco-v3": {},
    "moco-v3_vit": VIT | {"head__layers": 3},
    "simclr_vit": VIT | {"vit__patches": "conv", "vit__positions": "learned"},
    "distil": {},
    "distil_groups": {"model__bn_groups": 4, "views": 2},
    "distil_vit": VIT | {"vit__patches": "conv"},
    "moco_vit": VIT | {"vit__pool": "mean", "model__bn_groups": 4},
}  # fmt: skip


def cached_run(variant: str, devices: int, dtype: str = "float64") -> Run:
    """`run` of a variant, once for all tests."""
    return _cached_run(variant, devices, dtype)  # `cache` would tell a default from its value


@functools.cache
def _cached_run(variant: str, devices: int, dtype: str) -> Run:
    with jax.enable_x64(dtype == "float64"):
        return run(build(variant_config(variant, dtype), devices))


def forget_runs() -> None:
    """Lets go of what `cached_run` has compiled."""
    _cached_run.cache_clear()


def variant_config(variant: str, dtype: str = "float64") -> ConfigDict:
    """The config of one of `VARIANTS`, whose name begins with that of its method."""
    method = variant.split("_")[0].replace("-", "_")
    return config(method, model__dtype=dtype, **VARIANTS[variant])


def named_leaves(tree: Any) -> dict[str, np.ndarray]:
    """Every array of a tree by its path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}


def has_no_gradient(name: str, head_kind: str) -> bool:
    """Whether a parameter cannot change the loss, so that its gradient is nothing but rounding.

    The bias of attention's keys adds one number to all logits of a row, which softmax removes. That
    of the last layer norm adds one row to all features, which a batch norm in the head removes.
    """
    removed = head_kind in ("simclr", "moco_v3") and name.endswith("['backbone']['norm']['bias']")
    return removed or name.endswith("['key']['bias']")


def assert_close(got: Any, want: Any, relative: float, absolute: float) -> None:
    """Compares two trees tensor by tensor: `|got - want| <= relative |want| + absolute`.

    `absolute` stands for the tensors whose true value is 0 and which hold nothing but rounding.
    """
    got, want = named_leaves(got), named_leaves(want)
    assert got.keys() == want.keys()
    for name, b in want.items():
        a = got[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if not np.issubdtype(b.dtype, np.floating):
            np.testing.assert_array_equal(a, b, err_msg=name)
            continue
        assert np.isfinite(a).all(), name
        error, norm = np.linalg.norm(a - b), np.linalg.norm(b)
        assert error <= relative * norm + absolute, f"{name}: {error:.2e} of {norm:.2e}"
