"""The settings of jobs "jepa_pretrain" and "jepa_baselines": dataclasses, of which configs are made."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.sharding import Mesh

from common.augment import CenterCrop, RandomResizedCrop
from common.checkpoint import CheckpointSpec
from common.config import ConfigError, build
from common.mesh import MeshSpec
from common.nn.ops import Policy
from common.optim import OptimSpec
from common.sharding import BATCH_AXES
from common.train_loop import TrainSpec
from experiments.shared.learned_optim import optimizer
from experiments.shared.settings import without
from jepa.config import ViTConfig, vit
from jepa.device_batch import DeviceBatch
from jepa.masks import MaskSpec
from jepa.objective import ObjectiveSpec
from jepa.probe import ProbeSpec
from jepa.recipe import EmaSpec, IJepa


@dataclass(frozen=True)
class DataSettings:
    """The images.

    Attributes:
      name: "scenes", "digits", a data set of TFDS, or folder:PATH.
      split: images that are trained on.  test_split: images that probes are tested on.
      probe_split: images that probes and kNN learn from; None takes `split`.
      held_out: share set aside as the test set, of a folder that has none.
      data_dir: folder of TFDS data sets; None takes TFDS_DATA_DIR.
      examples: training images, for a run without the set (preflight).
      crop_scale: range of a training crop's share of the image's area.
      crop_ratio: range of a training crop's width / height.  flip: whether half of the training images are mirrored.
      eval_resize: short side before the centre crop of evaluations, in pixels; None takes the model's image size.
      workers: processes that prepare batches; 0 is a thread of the main one.
      on_device: whether all images lie on the device, where crops and masks are made inside the step.
      skip_bad: whether to go on without images that cannot be read; they are counted.
    """

    name: str = "scenes"
    split: str = "train"
    test_split: str = "test"
    probe_split: str | None = None
    held_out: float = 0.1
    data_dir: str | None = None
    examples: int | None = None
    crop_scale: tuple[float, float] = RandomResizedCrop.scale
    crop_ratio: tuple[float, float] = RandomResizedCrop.ratio
    flip: bool = RandomResizedCrop.flip
    eval_resize: int | None = None
    workers: int = 0
    on_device: bool = False
    skip_bad: bool = False

    def __post_init__(self):
        if not 0 <= self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: give a share, at least 0 and below 1")
        limits = {
            "crop_scale": ("share of the image's area", 1.0),
            "crop_ratio": ("width / height", math.inf),
        }
        for name, (what, most) in limits.items():
            low, high = getattr(self, name)
            if not 0 < low <= high <= most or high == math.inf:
                raise ConfigError(
                    f"config.data.{name}={(low, high)}: give the least and the largest {what}, both above 0"
                    f"{' and at most 1' if most == 1 else ''}, the smaller first"
                )


@dataclass(frozen=True)
class ModelSettings:
    """A model of a named size, of which single fields may differ.

    Attributes:
      size: a name in jepa.config.SIZES.
      image: height and width of the images, in pixels.  patch: height and width of a patch, in pixels.
      width, depth, heads: the encoder's; None takes what the size says.
      hidden: inner width of the encoder's MLP; None takes what the size says.
      predictor_width, predictor_depth: the predictor's; None takes what the size says.
      predictor_heads: the predictor's; None takes the encoder's.
      depth_rescale: whether output projections of block l are divided by sqrt(2 l) at init.
      position_scale: factor on the encoder's position table.
    """

    size: str = "tiny"
    image: int = 64
    patch: int = 8
    width: int | None = None
    depth: int | None = None
    heads: int | None = None
    hidden: int | None = None
    predictor_width: int | None = None
    predictor_depth: int | None = None
    predictor_heads: int | None = None
    depth_rescale: bool = ViTConfig.depth_rescale
    position_scale: float = ViTConfig.position_scale

    def __post_init__(self):
        _ = self.config  # refuses sizes that do not fit

    @cached_property
    def config(self) -> ViTConfig:
        """The named size with every field replaced that is set."""
        return vit(**{k: v for k, v in dataclasses.asdict(self).items() if v is not None})


@dataclass(frozen=True)
class OptimSettings(OptimSpec):
    """AdamW, with its warm-up also in epochs.

    Attributes:
      warmup_epochs: epochs of linear warm-up, where `warmup` is 0.
    """

    warmup_epochs: float = 0.0


@dataclass(frozen=True)
class TrainSettings(TrainSpec):
    """Training, with its length also in epochs.

    Attributes:
      epochs: passes over the training images; give either these or `steps`.
    """

    batch: int = 128
    epochs: float | None = None


@dataclass(frozen=True)
class ProbeSettings:
    """The evaluations.

    Attributes:
      knn_train: images in the bank of the kNN monitor, a random part; None takes all.
      knn_test: images that the monitors look at, a random part; None takes all.
      neighbors: images of the bank that vote.
      linear: whether linear probes follow the training.
      train_examples: images that the linear probes learn from, a random part; None takes all.
      test_examples: images that the linear probes are tested on, a random part; None takes all.
      test_on_train: whether the test set may share images with what probes learn from.
      epochs: passes of the linear probes over their images.  batch: images in one of their updates.
    """

    knn_train: int | None = 5000
    knn_test: int | None = 1000
    neighbors: int = 20
    linear: bool = True
    train_examples: int | None = None
    test_examples: int | None = None
    test_on_train: bool = False
    epochs: int = ProbeSpec.epochs
    batch: int = ProbeSpec.batch

    def __post_init__(self):
        if self.neighbors < 1:
            raise ValueError(f"neighbors={self.neighbors}: at least 1 image votes")
        # What a probe learns from or is tested on; the collapse monitors compare two images.
        least = dict(knn_train=self.neighbors, knn_test=2, train_examples=2, test_examples=1)
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                reason = f", as neighbors={low} vote" if name == "knn_train" else ""
                raise ValueError(
                    f"{name}={value}: give at least {low}{reason}, or None for all images"
                )
        self.spec(seed=0)

    def spec(self, seed: int) -> ProbeSpec:
        """How the linear probe is trained."""
        return ProbeSpec(epochs=self.epochs, batch=self.batch, seed=seed)


@dataclass(frozen=True)
class WriterSettings:
    """Where the rows of metrics go besides metrics.jsonl.

    Attributes:
      tensorboard: whether to write for TensorBoard.  wandb: whether to write to Weights & Biases.
      wandb_project: the project in Weights & Biases; None takes WANDB_PROJECT, else "triptych".
    """

    tensorboard: bool = False
    wandb: bool = False
    wandb_project: str | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of the jobs, resolved: what follows from others is filled in.

    Attributes:
      job: what is run, a key of experiments.jobs.JOBS.  name: the experiment's name, in rows and in the log.
    """

    job: str = "jepa_pretrain"
    name: str = ""
    data: DataSettings
    model: ModelSettings
    masks: MaskSpec = without("grid")
    objective: ObjectiveSpec
    optim: OptimSettings
    ema: EmaSpec
    train: TrainSettings
    mesh: MeshSpec
    policy: Policy = without("batch_axes", "at_once")
    checkpoint: CheckpointSpec = without("every_steps")
    probe: ProbeSettings
    writers: WriterSettings

    def __post_init__(self):
        image, resize = self.model.image, self.data.eval_resize
        if resize is not None and resize < image:
            raise ConfigError(
                f"config.data.eval_resize={resize}: give config.model.image={image} pixels or more, or None for just that"
            )
        if self.masks.mode == "paper" and self.train.batch % self.masks.collate:
            raise ConfigError(
                f"config.masks.collate={self.masks.collate} does not divide config.train.batch={self.train.batch}"
            )
        self.optim.lr_schedule(self.train.steps)  # refuses a warm-up that does not fit

    @cached_property
    def recipe(self) -> IJepa:
        """The method that is trained."""
        steps = self.train.steps
        tx, log_tx = optimizer(self.optim, steps)
        momentum = self.ema.schedule(int(self.optim.schedule_scale * steps))
        return IJepa(
            self.model.config, self.masks, tx, momentum, self.objective, self.policy, log_tx
        )

    def on(self, mesh: Mesh) -> "Settings":
        """The settings with the policy that fits the mesh's devices."""
        model = self.recipe.model
        return dataclasses.replace(
            self, policy=self.policy.built_for(mesh, model.tokens * model.hidden)
        )

    @property
    def augmentation(self) -> RandomResizedCrop:
        """The training transform: random resized crop, and a flip where asked for."""
        data = self.data
        return RandomResizedCrop(self.model.image, data.crop_scale, data.crop_ratio, data.flip)

    @property
    def device_batch(self) -> DeviceBatch | None:
        """What makes batches inside the train step, where the images lie on the device."""
        if not self.data.on_device:
            return None
        return DeviceBatch(self.augmentation, self.recipe.masks, self.train.seed)

    @property
    def evaluation_crop(self) -> CenterCrop:
        """The test transform: resize and centre crop."""
        return CenterCrop(size=self.model.image, resize=self.data.eval_resize or self.model.image)


def resolve(values: Mapping[str, Any], examples: int | None = None) -> Settings:
    """Checks a config's dict, and fills in what follows from other settings, such as the steps of its epochs.

    Args:
      examples: length of the training set; None takes config.data.examples.

    Raises:
      ConfigError: naming the setting, its value and the remedy.
    """
    if missing := [f.name for f in dataclasses.fields(Settings) if f.name not in values]:
        raise ConfigError(f"config.{missing[0]} is missing")
    train, optim = dict(values["train"]), dict(values["optim"])
    train["steps"], per_epoch = _steps(train, examples or values["data"]["examples"] or 0)
    if optim["warmup"] and optim["warmup_epochs"]:
        raise ConfigError(
            f"config.optim.warmup={optim['warmup']} and config.optim.warmup_epochs={optim['warmup_epochs']}: set one of them"
        )
    optim["warmup"] = optim["warmup"] or int(optim["warmup_epochs"] * per_epoch)
    model = build(ModelSettings, values["model"], "config.model.").config
    computed = {
        "train": train,
        "optim": optim,
        "masks": {**values["masks"], "grid": model.grid},
        "policy": {**values["policy"], "batch_axes": BATCH_AXES},
    }
    return build(Settings, {**values, **computed})


def _steps(train: Mapping[str, Any], examples: int) -> tuple[int, int]:
    """(updates of the run, updates of an epoch)"""
    epochs, steps, batch = train["epochs"], train["steps"], train["batch"]
    if (epochs is None) == (steps is None):
        raise ConfigError(
            f"config.train.epochs={epochs} and config.train.steps={steps}: set exactly one of them, the other to None"
        )
    per_epoch = examples // batch if batch > 0 else 0
    if examples and not per_epoch:
        raise ConfigError(
            f"config.train.batch={batch} is larger than the {examples} training images: lower it"
        )
    return (int(epochs * per_epoch) if steps is None else steps), per_epoch
