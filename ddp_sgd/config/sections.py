"""The sections of the configuration: one frozen model each.

Each field carries its docstring, unit and range; ``--help`` and ``docs/configuration.md`` are made
from them.
"""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import (
    AfterValidator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    model_validator,
)

from ddp_sgd.config.component import Component, HeldOut, Section


def expand_home(path: str) -> str:
    """Put the home folder in the place of a leading ``~`` or ``~USER``; other paths stay as is.

    Raises:
        ValueError: There is no such home folder; the message is the remedy.
    """
    if not path.startswith("~"):
        return path
    try:
        return str(Path(path).expanduser())
    except RuntimeError as error:
        raise ValueError("name a user who has a home folder here, or write the path out") from error


Fraction = Annotated[StrictFloat, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[StrictFloat, Field(ge=0.0)]
Positive = Annotated[StrictFloat, Field(gt=0.0)]
Count = Annotated[StrictInt, Field(ge=1)]
Text = Annotated[StrictStr, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(expand_home)]
Instant = (
    Annotated[StrictFloat, Field(gt=0.0)]
    | Annotated[
        StrictStr, Field(pattern=r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?$")
    ]
)


class DataConfig(Section):
    """Which samples, and how many at a time."""

    train: Component = Component(class_path="ddp_sgd.data.Digits", init_args={"split": "train"})
    """Map-style data set to train on: it has a length and gives (input, target) for an index."""

    eval: HeldOut | None = Component(class_path="ddp_sgd.data.Digits", init_args={"split": "eval"})
    """Map-style data set to score; null trains without evaluation. Several by name: each is scored
    in order, as eval/NAME/loss and so on, and the first chooses the best checkpoint. Names have
    letters, digits, hyphen and underscore."""

    test: Component | None = None
    """Map-style data set that is scored once, at the end of the run, with the weights of the best
    checkpoint; without a held-out set, with the last ones."""

    collate: Component | None = None
    """Function from a list of samples to a batch (inputs, targets), for training and evaluation;
    samples may then have any form, and are read one by one. It gets lists of any length, of one
    sample too. null: torch's default_collate, for samples (input, target)."""

    batch_size: Count = 32
    """Samples of one rank in one forward pass (a micro-batch), at least 1."""

    accumulate: Count = 1
    """Micro-batches of one rank in one optimizer step, at least 1. Global batch = ranks x
    accumulate x batch_size."""

    tail: Literal["exact", "drop"] = "exact"
    """The last, smaller global batch of an epoch: train it with its true count, or leave it out."""

    workers: Annotated[StrictInt, Field(ge=0)] = 0
    """Loader processes of each rank; 0 reads in the rank itself, which is faster for data in
    memory."""

    device: Literal["auto", "host", "accelerator"] = "auto"
    """Where data sets of arrays live; auto: on a CUDA device if they fit into a quarter of its free
    memory, divided by its ranks. Others are read on the host."""

    train_transforms: tuple[Component, ...] = ()
    """Callables of (batch, draws), applied on the device to the inputs of each micro-batch."""

    eval_transforms: tuple[Component, ...] = ()
    """The same for evaluation, where a sample has the same random numbers every time."""

    @property
    def eval_sets(self) -> dict[str, Component]:
        """The held-out sets by key, ``data.eval`` or ``data.eval.NAME``, in their order."""
        if isinstance(self.eval, Component):
            return {"data.eval": self.eval}
        return {f"data.eval.{name}": each for name, each in (self.eval or {}).items()}


class OptimConfig(Section):
    """How weights move: SGD as in torch.optim.SGD, with a rate that is quoted for a named batch."""

    lr: Positive = 0.05
    """Learning rate for reference_batch samples per step, above 0."""

    reference_batch: Count | None = None
    """Samples a step that lr is quoted for; null means one rank's batch_size x accumulate, so that
    the rate grows with the number of ranks."""

    scaling: Literal["linear", "sqrt", "none"] = "linear"
    """How the peak rate follows from k = global batch / reference_batch: lr k, lr sqrt(k), or lr.
    Source: linear, Goyal et al. 2017, arXiv:1706.02677; sqrt, Krizhevsky 2014, arXiv:1404.5997."""

    momentum: Annotated[StrictFloat, Field(ge=0.0, lt=1.0)] = 0.9
    """Share of the last update direction that is kept, in [0, 1)."""

    nesterov: StrictBool = False
    """Look one momentum step ahead; needs momentum above 0. Source: Sutskever et al. 2013."""

    weight_decay: NonNegative = 0.0
    """Factor of the weight that is added to its gradient, at least 0."""

    decay_norm_and_bias: StrictBool = False
    """Decay biases and the parameters of normalization layers as well. These are told by type and
    name: torch's normalization layers and classes named like one, parameters whose name begins or
    ends with bias, and all with fewer than two dimensions. Source: He et al. 2019,
    arXiv:1812.01187."""

    clip_norm: Positive | None = None
    """Largest L2 norm of the whole gradient, above 0; null does not clip."""

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "OptimConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "optim.nesterov is true while optim.momentum is 0; set optim.momentum=0.9 or so"
            )
        return self


class ScheduleConfig(Section):
    """How the rate changes over the run: a factor of the peak rate for every step."""

    name: Literal["constant", "step", "cosine", "linear", "polynomial", "one_cycle"] = "cosine"
    """Shape of the curve after the warm-up, which multiplies it and does not shift it."""

    warmup_epochs: Literal["auto"] | NonNegative = "auto"
    """Length of the rise from lr to the peak, in epochs, at least 0; auto: 5, at most a tenth of
    the run, when k > 1. The end of the run cuts a longer one off, which the plan notes.
    Source: Goyal et al. 2017, arXiv:1706.02677, section 2.2."""

    warmup_start: Literal["auto"] | Annotated[StrictFloat, Field(gt=0.0, le=1.0)] = "auto"
    """Factor of the peak rate at which the warm-up starts, in (0, 1]; auto: lr / peak, that is 1
    when k <= 1."""

    milestones: tuple[Positive, ...] = ()
    """Epochs at which the rate is multiplied by gamma, ascending (step only). Those that the run
    does not reach mean nothing, which the plan notes."""

    gamma: Positive = 0.1
    """Factor at each milestone, above 0 (step only)."""

    power: Positive = 2.0
    """Exponent of the decay (polynomial only)."""

    final: Fraction = 0.0
    """Factor of the peak rate at the end of the run, in [0, 1] (cosine, linear, polynomial,
    one_cycle)."""

    peak_at: Annotated[StrictFloat, Field(gt=0.0, lt=1.0)] = 0.3
    """Part of the run at which the peak is reached, in (0, 1) (one_cycle only). Source: Smith 2018,
    arXiv:1803.09820."""

    _used_by: ClassVar[dict[str, tuple[str, ...]]] = {
        "milestones": ("step",),
        "gamma": ("step",),
        "power": ("polynomial",),
        "final": ("cosine", "linear", "polynomial", "one_cycle"),
        "peak_at": ("one_cycle",),
    }

    @model_validator(mode="after")
    def _arguments_fit_the_name(self) -> "ScheduleConfig":
        for key in sorted(self.model_fields_set & set(self._used_by)):
            value = getattr(self, key)
            if (
                self.name not in self._used_by[key]
                and value != type(self).model_fields[key].default
            ):
                names = " or ".join(self._used_by[key])
                raise ValueError(
                    f"schedule.{key} is {value} while schedule.name is {self.name}; "
                    f"set schedule.name={names}, or leave schedule.{key} out"
                )
        if self.name == "step" and not self.milestones:
            raise ValueError(
                "schedule.milestones is empty while schedule.name is step; "
                "name epochs, such as [30, 60]"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(
                f"schedule.milestones is {list(self.milestones)}; "
                "put the epochs in ascending order, once"
            )
        if self.name == "one_cycle" and self.warmup_epochs not in ("auto", 0.0):
            raise ValueError(
                f"schedule.warmup_epochs is {self.warmup_epochs} while schedule.name is one_cycle, "
                "which has its own rise; set schedule.warmup_epochs=0 and move schedule.peak_at"
            )
        return self


class EvalConfig(Section):
    """When the model is scored."""

    every_epochs: Count = 1
    """Epochs between evaluations, at least 1; the end of the run is always scored."""


class LogConfig(Section):
    """What is written down, and how often."""

    every_steps: Count = 10
    """Steps between rows of metrics, at least 1."""

    tensorboard: StrictBool = False
    """Write TensorBoard files into the run folder as well; needs the extra ddp_sgd[tensorboard]."""


class CheckpointConfig(Section):
    """When the state of the run is saved, besides at its end and where it is stopped."""

    every_steps: Count | None = None
    """Steps between saves, at least 1; null: none by steps."""

    every_epochs: Count | None = 1
    """Epochs between saves, at least 1; null: none by epochs."""

    every_minutes: Positive | None = None
    """Minutes between saves, above 0; null: none by the clock."""

    keep: Count = 3
    """Newest checkpoints that are kept, at least 1; the best by held-out accuracy, or loss, is kept
    beside them."""


class WandbConfig(Section):
    """Weights & Biases. What is left null follows the user's settings, such as WANDB_PROJECT."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: as WANDB_DISABLED and WANDB_MODE say, else online with an API key, else offline."""

    project: Text | None = None
    """Project of the run; null: WANDB_PROJECT, else ddp_sgd."""

    entity: Text | None = None
    """User or team that owns the project."""

    group: Text | None = None
    """Name under which runs are shown together."""

    name: Text | None = None
    """Name of the run; null: WANDB_NAME, else the name of this configuration."""

    tags: tuple[Text, ...] = ()
    """Labels of the run."""
