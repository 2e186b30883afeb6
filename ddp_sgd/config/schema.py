"""``RunConfig``: all sections together, and what must hold between them."""

from typing import Annotated, Literal

from pydantic import Field, StrictInt, StrictStr, model_validator

from ddp_sgd.config.sections import (
    CheckpointConfig,
    Component,
    Count,
    DataConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ParallelConfig,
    PathText,
    RuntimeConfig,
    ScheduleConfig,
    Section,
    WandbConfig,
)


class RunConfig(Section):
    """The whole run."""

    name: Annotated[StrictStr, Field(pattern=r"^[A-Za-z0-9._-]+$", max_length=200)] = "digits"
    """Name of the run folder below output_dir: letters, digits, dot, underscore, hyphen."""

    output_dir: PathText = "runs"
    """Folder that holds run folders; ~ is the home folder."""

    seed: Annotated[StrictInt, Field(ge=0, lt=2**63)] = 0
    """Number from which order, weights, dropout and augmentation follow, in [0, 2^63)."""

    epochs: Count = 20
    """Passes over the training data, at least 1."""

    resume: PathText = "auto"
    """What becomes of a run folder that exists. auto: an unfinished run goes on, a finished one
    gives its result, a run without a checkpoint starts again. never: the folder is moved aside to
    NAME.1, NAME.2, ... must: there has to be a checkpoint. PATH of a checkpoint, or of another run
    folder, where ~ is the home folder: start from there. Nothing is overwritten."""

    on_resize: Literal["keep_global_batch", "rescale", "refuse"] = "keep_global_batch"
    """What a resume with another number of ranks does: keep the global batch, and with it batches,
    schedule and rate; take the global batch of the new ranks; or refuse."""

    model: Component = Component(
        class_path="ddp_sgd.models.MLP", init_args={"inputs": 64, "hidden": [64, 64], "classes": 10}
    )
    """Module to train."""

    loss: Component = Component(class_path="torch.nn.CrossEntropyLoss")
    """Module or function of (outputs, targets) that gives the mean over the samples."""

    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "RunConfig":
        if set(self.name) == {"."}:
            raise ValueError(
                f"name is {self.name!r}; it names a folder, so use a letter or a digit"
            )
        if self.parallel.static_graph and self.data.accumulate > 1:
            raise ValueError(
                f"parallel.static_graph is true while data.accumulate is {self.data.accumulate}, "
                "which torch cannot do together; set parallel.static_graph=false"
            )
        local, saves = self.parallel.local_sgd, self.checkpoint.every_steps
        if local.start_step is not None and saves and saves % local.period:
            raise ValueError(
                f"checkpoint.every_steps is {saves} while parallel.local_sgd.period is "
                f"{local.period}, and ranks differ in between; set checkpoint.every_steps="
                f"{max(1, saves // local.period) * local.period}"
            )
        return self
