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
Position = Annotated[StrictInt, Field(ge=0)]
Choice = (
    Position
    | Text
    | Annotated[tuple[Position, ...], Field(min_length=1)]
    | Annotated[tuple[Text, ...], Field(min_length=1)]
)
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

    order: Literal["shuffled", "sequential"] | Component = "shuffled"
    """Which samples make a step: shuffled again for each epoch; sequential, as the data set numbers
    them; or a function of (n, seed, epoch, global_batch) that returns the indices of an epoch,
    equally many in each, which are cut into global batches in that order."""

    input: Annotated[Choice | None, Field(examples=["image"])] = None
    """Part of a sample that the model gets: the name of a column, or a position from 0; a list of
    names gives a mapping of these parts, a list of positions a tuple. null: samples are (input,
    target)."""

    target: Annotated[Choice | None, Field(examples=["label"])] = None
    """Part of a sample that the loss compares with, in the same way; null, with data.input: there
    is none, and the loss is called with the outputs alone."""

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

    @model_validator(mode="after")
    def _parts_of_samples_are_chosen_once(self) -> "DataConfig":
        if self.input is None and self.target is not None:
            raise ValueError(
                f"data.target is {_shown(self.target)} while data.input is null; name the part of "
                "a sample that the model gets by data.input, too"
            )
        if self.input is not None and self.collate is not None:
            raise ValueError(
                f"data.input is {_shown(self.input)} while data.collate is "
                f"{self.collate.class_path}, which forms a batch of whole samples; leave one of "
                "the two out"
            )
        return self


def _shown(choice: Choice) -> str:
    return f"[{', '.join(map(str, choice))}]" if isinstance(choice, tuple) else str(choice)


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

    clip_value: Positive | None = None
    """Largest absolute value of each element of the gradient, above 0; null does not clip. Not
    together with clip_norm."""

    @model_validator(mode="after")
    def _one_way_to_clip(self) -> "OptimConfig":
        if self.clip_norm is not None and self.clip_value is not None:
            raise ValueError(
                f"optim.clip_value is {self.clip_value} while optim.clip_norm is {self.clip_norm}; "
                "leave one of them out"
            )
        return self

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
    """Shape of the curve."""

    curve: Component | None = None
    """A curve of your own, in place of name: a function of (step, steps_per_epoch, total_steps),
    with call: false, or an object that is called so. It gives the factor of the peak rate at a
    step, a finite number of at least 0, and follows from its arguments alone. It is checked over
    the whole run before the first step."""

    by: Literal["step", "epoch"] = "step"
    """When the rate changes, warm-up included. epoch: at the beginning of an epoch only; all of its
    steps have the rate of the first."""

    warmup: Literal["multiply", "shift", "replace"] = "multiply"
    """How the warm-up and the curve are joined. multiply: the rise multiplies the curve, which
    begins with the run; shift: the curve begins after the warm-up, and has the rest of the run, as
    in torchvision; replace: the rise takes the place of the curve's first steps, as in timm."""

    warmup_epochs: Literal["auto"] | NonNegative = "auto"
    """Length of the rise from lr to the peak, in epochs, at least 0; auto: 5, at most a tenth of
    the run, when k > 1, and 0 for one_cycle and a curve of your own. The end of the run cuts a
    longer one off, which the plan notes. Source: Goyal et al. 2017, arXiv:1706.02677, section
    2.2."""

    warmup_steps: Annotated[StrictInt, Field(ge=0)] | None = None
    """The same in steps, at least 0, in place of warmup_epochs; null: that counts."""

    warmup_start: Literal["auto"] | Annotated[StrictFloat, Field(gt=0.0, le=1.0)] = "auto"
    """Factor of the peak rate at which the warm-up starts, in (0, 1]; auto: lr / peak, that is 1
    when k <= 1."""

    momentum_start: Annotated[StrictFloat, Field(ge=0.0, lt=1.0)] | None = None
    """Momentum at the first step, in [0, 1), from which it goes in a straight line to
    optim.momentum along the warm-up; null: it is optim.momentum throughout. Needs a warm-up;
    with warmup_start: 1 the rate stays at the peak meanwhile."""

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
    def _curve_is_alone(self) -> "ScheduleConfig":
        if self.curve is None:
            return self
        for key in ("name", *sorted(self._used_by)):
            value = getattr(self, key)
            value = list(value) if isinstance(value, tuple) else value
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"schedule.{key} is {value} while schedule.curve is {self.curve.class_path}; "
                    f"leave schedule.{key} out, or set schedule.curve=null"
                )
        return self

    @model_validator(mode="after")
    def _one_length_of_the_warm_up(self) -> "ScheduleConfig":
        if self.warmup_steps is not None and self.warmup_epochs != "auto":
            raise ValueError(
                f"schedule.warmup_steps is {self.warmup_steps} while schedule.warmup_epochs is "
                f"{self.warmup_epochs:g}; leave one of them out, or set schedule.warmup_epochs=auto"
            )
        lengths = {"warmup_epochs": self.warmup_epochs, "warmup_steps": self.warmup_steps}
        for key, length in lengths.items():
            if self.name == "one_cycle" and length not in ("auto", None, 0):
                raise ValueError(
                    f"schedule.{key} is {length} while schedule.name is one_cycle, which has its "
                    f"own rise; set schedule.{key}=0 and move schedule.peak_at"
                )
        return self

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
        return self


class EvalConfig(Section):
    """When the model is scored, and how many samples at a time."""

    batch_size: Count | None = None
    """Samples of one rank in one forward pass of an evaluation, at least 1; null: data.batch_size.
    The scores are the same up to rounding, unless samples of a batch depend on each other."""

    every_epochs: Literal["auto"] | Count = "auto"
    """Epochs between evaluations, at least 1; auto: 1, or none where every_steps is set. The end of
    the run is always scored."""

    every_steps: Count | None = None
    """Steps between evaluations, at least 1; null: none by steps. Where checkpoint.every_epochs is
    set, as by default, the state is saved at each of them, so that the best one is kept."""


class LogConfig(Section):
    """What is written down, and how often."""

    every_steps: Count = 10
    """Steps between rows of metrics, at least 1."""

    train_accuracy: StrictBool = False
    """Log train/accuracy: the share of the samples since the last row whose class was predicted, in
    [0, 1]; for classification."""

    tensorboard: StrictBool = False
    """Write TensorBoard files into the run folder as well; needs the extra ddp_sgd[tensorboard]."""


class CheckpointConfig(Section):
    """When the state of the run is saved, besides at its end and where it is stopped."""

    every_steps: Count | None = None
    """Steps between saves, at least 1; null: none by steps."""

    every_epochs: Count | None = 1
    """Epochs between saves, at least 1, besides evaluations by steps; null: none by these."""

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
