"""Distillation of SimCLR v2 (Chen et al. 2020b, section 2): a student learns a teacher's labels.

The teacher is a network that `--mode=finetune` has trained on few labels. For images without labels
it gives probabilities, and the student, of any size, is trained to give the same: what the labels
and the pretraining taught the teacher is passed on by all images.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import flax
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from common.contrast import check_temperature
from common.data.augment import presets
from common.errors import UserError
from common.method import Classification, Method, embedding_metrics, stream
from common.models import classifier, finetuned
from common.models.classifier import SECTIONS, SUFFIX, Classifier
from common.setup import Setup, TrainState
from common.sharding import AXIS, each_device, replicated
from simclr_jax import teacher as teachers
from simclr_jax.distil_loss import distillation_loss_with_metrics

NAME = f"distilled{SUFFIX}"
_HEAD = "moco_v1"  # one linear layer with a bias: the student's classifier


@flax.struct.dataclass
class DistilState(TrainState):
    """The state of a student.

    Attributes:
        teacher: arrays of the teacher, as `classifier.load` gives them; no step changes them. They
            are part of the state, and of its checkpoints, so that a run goes on with the teacher
            it began with, even if the file holds other weights by then; and not constants of the
            compiled step, which would hold gigabytes. None where no step is taken.
    """

    teacher: Any


class Distil(Method):
    """Knowledge distillation; the embedding of the student's head are its logits."""

    MEANINGS: ClassVar = {
        "teacher": "a fine-tuned network: its file, WORKDIR/finetuned/NAME.safetensors, or a "
        "workdir that has one",
        "temperature": "of both softmaxes: 1 in the authors' notebook; less makes the teacher's "
        "probabilities sharper",
    }
    VIEWS: ClassVar = (1, 2)  # each is an image of its own
    FIXED: ClassVar = ("teacher",)

    @staticmethod
    def default_config() -> ConfigDict:
        """`config.distil`."""
        return ConfigDict({"teacher": "", "temperature": 1.0})

    @classmethod
    def adapt(cls, config: ConfigDict) -> None:
        """See `Method.adapt`: network, data and optimiser stay, and views are crops and flips."""
        if config.method == "distil":
            return
        with config.unlocked():
            del config[config.method]
            config.method, config.distil = "distil", cls.default_config()
        config.views = 1
        # published: random crops and flips only, in fine-tuning and in distillation
        config.augment.update(jitter=0.0, grey=0.0, blur=0.0, solarise=0.0, rotate=0.0)
        for name in config.augment_view2:
            config.augment_view2[name] = None
        config.head.update(kind=_HEAD, dim=0)

    @classmethod
    def complete(cls, config: ConfigDict, workdir: epath.Path | None = None) -> ConfigDict:
        """See `Method.complete`: the teacher's file decides on the number of classes.

        Raises:
            UserError: no teacher, one that cannot take the views, or a head that is no classifier.
        """
        if not config.distil.teacher:
            raise UserError(
                "distil.teacher is empty: give a fine-tuned network, --config.distil.teacher=FILE, "
                "or the workdir of one"
            )
        path = teachers.named(config.distil.teacher, workdir)
        teacher, head = classifier.describe(teachers.readable(path, workdir)), config.head
        classes = len(teacher.classes)
        if head.kind != _HEAD or head.dim not in (0, classes):
            raise UserError(
                f"head.kind={head.kind} and head.dim={head.dim}: the head of a student is a linear "
                f"classifier of its teacher's {classes} classes, so set head.kind={_HEAD} and "
                "head.dim=0 (that number)"
            )
        size = presets.resolve(config.augment, config.data.image_size).size
        teachers.check_size(teacher, size, path)
        config = config.copy_and_resolve_references()
        config.head.dim, config.distil.teacher = classes, path
        return config

    def __init__(self, setup: Setup) -> None:
        """Reads the header of the teacher's file, unless no step is to be taken.

        Raises:
            UserError: for a temperature that is not positive, or a file that is no classifier.
        """
        super().__init__(setup)
        check_temperature(setup.config.temperature, "distil.temperature")
        self._path, self.teacher = None, None
        if setup.training:
            self._path = teachers.readable(setup.config.teacher, setup.workdir)
            self.teacher = classifier.describe(self._path)
            self.classification = Classification(
                self.teacher.classes, self.student_logits, self.teacher_logits
            )

    @property
    def notes(self) -> Mapping[str, str]:
        """See `Method.notes`: where the teacher comes from, and how good it is known to be."""
        if self.teacher is None:
            return {}
        teacher, top1 = self.teacher, self.teacher.info.get("top1")
        known = f", top-1 {100 * top1:.2f} % when it was saved" if top1 is not None else ""
        given = self.setup.config.teacher
        kept = "" if str(self._path) == given else f"\n            (its copy, {self._path})"
        return {
            "teacher": f"{given}{kept}\n            "
            f"{teacher.network.backbone.in_words()}, layer {teacher.layer}, "
            f"{len(teacher.classes)} classes, trained at {teacher.image_size} px{known}"
        }

    def init(self, key: jax.Array) -> DistilState:
        """See `Method.init`; the teacher is zeros here, see `placed`."""
        start = super().init(key)
        fields = {field.name: getattr(start, field.name) for field in dataclasses.fields(start)}
        zeros = None
        if self.teacher is not None:
            shapes = self.teacher.shapes()
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return DistilState(**fields, teacher=zeros)

    def placed(self, state: DistilState) -> DistilState:
        """See `Method.placed`: reads the teacher's arrays, and keeps a copy in the workdir.

        Raises:
            UserError: the file is damaged, or has changed since its header was read.
        """
        assert self.teacher is not None and self._path is not None
        found, arrays = classifier.load(self._path)
        if found.info["digest"] != self.teacher.info["digest"]:
            raise UserError(f"{self._path} has changed while it was read: start again")
        if self.setup.workdir is not None:
            teachers.keep(self.setup.workdir, found, arrays)
        place = replicated(self.setup.mesh)
        arrays = jax.tree.map(
            lambda x, like: jax.make_array_from_callback(
                like.shape, place, np.asarray(x, like.dtype).__getitem__
            ),
            arrays,
            state.teacher,
        )
        return dataclasses.replace(state, teacher=arrays)

    def resumed(self, state: DistilState) -> DistilState:
        """See `Method.resumed`: what has taught the run so far must be what its file holds."""
        assert self.teacher is not None and self._path is not None
        teachers.check_arrays(state.teacher, self.teacher, self._path)
        return state

    def train_step(self, state: DistilState, batch: dict, key: jax.Array) -> tuple:
        """See `Method.train_step`. Student and teacher see the same crops, and no labels."""
        setup = self.setup
        b, views, *shape = batch["images"].shape
        images = batch["images"].reshape(b * views, *shape)
        draws = stream(key, state.step, "encoder")  # drop path, where there is any
        with jax.named_scope("teacher"):
            targets = jax.lax.stop_gradient(self.teacher_logits(state, images))

        def loss_fn(params: Any) -> tuple:
            features, logits, stats = setup.forward(params, state.batch_stats, images, draws)
            loss, metrics = distillation_loss_with_metrics(
                logits, targets, setup.config.temperature
            )
            metrics |= {"loss": loss} | embedding_metrics(features, logits)
            return loss, (stats, features, metrics)

        grads, (stats, features, metrics) = jax.grad(loss_fn, has_aux=True)(state.params)
        state, more = setup.next_state(state, grads, stats, features, batch["labels"])
        return state, metrics | more

    def teacher_logits(self, state: DistilState, images: jax.Array) -> jax.Array:
        """Logits `[n, c]` of the teacher in eval mode, in as many parts as the student's passes.

        Args:
            state: of the run.
            images: uint8 `[n, h, w, 3]`, scaled by the teacher's own mean and deviation.
        """
        assert self.teacher is not None
        logits, parts = self.teacher.logits, self.setup.microbatches
        if parts == 1 or len(images) % (parts * self.setup.mesh.size):
            return logits(state.teacher, images)

        def local(arrays: Any, images: jax.Array, axis: str | None) -> jax.Array:
            del axis
            blocks = images.reshape(parts, -1, *images.shape[1:])
            made = jax.lax.map(functools.partial(logits, arrays), blocks)
            return made.reshape(-1, made.shape[-1])

        whole, rows = PartitionSpec(), PartitionSpec(AXIS)
        return each_device(local, self.setup.mesh, (whole, rows), rows)(state.teacher, images)

    def student_logits(self, state: DistilState, features: jax.Array) -> jax.Array:
        """Logits `[n, c]` of features `[n, d]` of the student's backbone, in eval mode."""
        logits: Any = self.setup.network.head.apply(
            {"params": state.params["head"]}, features, False
        )
        return logits

    def finish(
        self, config: ConfigDict, state: DistilState, workdir: epath.Path, info: dict[str, Any]
    ) -> None:
        """See `Method.finish`: the student as a file, which can be the teacher of another one."""
        assert self.teacher is not None
        dense = state.params["head"]["dense1"]
        arrays = {
            "params": {
                "network": {"backbone": state.params["backbone"]},
                "classifier": {"kernel": dense["kernel"], "bias": dense["bias"]},
            },
            "batch_stats": {k: x for k, x in state.batch_stats.items() if k == "backbone"},
        }
        student = Classifier(
            config=ConfigDict({name: config[name] for name in SECTIONS}),
            view_size=presets.resolve(config.augment, config.data.image_size).size,
            layer="backbone",
            mean=self.setup.mean,
            std=self.setup.std,
            image_size=config.data.image_size,
            classes=self.teacher.classes,
            info=info
            | {
                "teacher": self.setup.config.teacher,
                "teacher_digest": self.teacher.info["digest"],
                "temperature": self.setup.config.temperature,
            },
        )
        if jax.process_index() == 0:
            path = workdir / finetuned.FOLDER / NAME
            path.parent.mkdir(parents=True, exist_ok=True)
            classifier.save(path, student, jax.device_get(arrays))
