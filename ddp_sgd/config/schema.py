"""``RunConfig``: all sections together, and what must hold between them.

The sections about processes and devices are here; those about training are in ``sections``.
"""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from ddp_sgd.config.component import Component, Section
from ddp_sgd.config.sections import (
    CheckpointConfig,
    Count,
    DataConfig,
    EvalConfig,
    Instant,
    LogConfig,
    OptimConfig,
    PathText,
    Positive,
    ScheduleConfig,
    WandbConfig,
)


class ComputeConfig(Section):
    """How numbers are computed: precision, memory format, determinism."""

    precision: Literal["fp32", "ieee", "tf32", "bf16", "fp16"] = "fp32"
    """Type of numbers in forward and backward passes; weights, gradients and momentum stay as the
    model has them. fp32: torch's defaults, which allow TF32 in convolutions on CUDA; tf32: in
    matrix products, too; ieee: nowhere. bf16, fp16: autocast to 16 bits, in evaluations too; fp16
    with a dynamic loss scale, for devices without bf16. Source: Micikevicius et al. 2017,
    arXiv:1710.03740."""

    channels_last: StrictBool = False
    """Keep images, and the weights of convolutions, in the memory format torch.channels_last, which
    is faster with 16 bits on most devices."""

    deterministic: StrictBool = True
    """The same bits run after run, on devices of one kind: operations that have a deterministic
    implementation use it, and the others are named once. false also lets cuDNN time its kernels and
    take the fastest."""

    compile: Literal["max-autotune-no-cudagraphs"] | StrictBool = False
    """Compile the model by torch.compile before the first step, for batches of batch_size samples;
    smaller ones run as they are. max-autotune-no-cudagraphs also tries kernels out, which takes
    minutes."""

    cuda_graphs: StrictBool = False
    """Capture a whole step as one CUDA graph, which takes small steps many times faster. A model
    whose step depends on the host cannot be captured, which is checked before the first step and
    now and then at the beginning of an epoch."""

    @model_validator(mode="after")
    def _compiled_kernels_are_deterministic(self) -> "ComputeConfig":
        if self.deterministic and isinstance(self.compile, str):
            raise ValueError(
                f"compute.compile is {self.compile}, which chooses kernels by their time, while "
                "compute.deterministic is true; set compute.deterministic=false or "
                "compute.compile=true"
            )
        return self


class LocalSgdConfig(Section):
    """Post-local SGD: ranks take steps of their own, and average their weights now and then.

    Source: Lin et al. 2020, arXiv:1808.07217.
    """

    start_step: Annotated[StrictInt, Field(ge=0)] | None = None
    """Steps after which ranks go their own ways, at least 0; null: every step is common."""

    period: Count = 8
    """Steps from one average of weights and momentum buffers to the next, at least 1; they are
    averaged at the end of an epoch, too."""


class ParallelConfig(Section):
    """How the models of all ranks are kept equal."""

    replica: Literal["auto", "ddp", "flat"] = "auto"
    """ddp: torch.nn.parallel.DistributedDataParallel, which reduces gradients during the backward
    pass; flat: one all-reduce after it; auto: flat where all gradients fit into one bucket, else
    ddp. A rank that is alone needs neither."""

    bucket_mb: Positive = 25.0
    """Size of the pieces in which gradients are reduced, in MiB, above 0."""

    gradient_as_bucket_view: StrictBool = True
    """Let gradients live in the buffers that are reduced: less memory, one copy less (ddp only)."""

    static_graph: StrictBool = False
    """Promise that every step uses the same parameters in the same order; not together with
    data.accumulate above 1 (ddp only). On more than two ranks, a run that was stopped then differs
    in the last bits from one that was not."""

    find_unused_parameters: StrictBool = False
    """Search every step for parameters without a gradient, where a forward pass leaves some out
    (ddp only)."""

    compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """What gradients are turned into on the way to other ranks (ddp only). bf16, fp16: 16 bits for
    each number; powersgd: two narrow factors for each large matrix, and what they leave out goes
    with the next step. One rank has nobody to send to."""

    local_sgd: LocalSgdConfig = LocalSgdConfig()

    @model_validator(mode="after")
    def _options_fit_the_replica(self) -> "ParallelConfig":
        start = self.local_sgd.start_step
        promises = ("static_graph", "find_unused_parameters")
        needs_ddp = [key for key in promises if getattr(self, key)]
        if self.compression != "none":
            needs_ddp.append("compression")
        for key in needs_ddp:
            option = f"parallel.{key} is {str(getattr(self, key)).lower()}"
            if self.replica == "flat":
                raise ValueError(
                    f"{option} while parallel.replica is flat, which has no such option; set "
                    "parallel.replica=auto"
                )
            if start is not None:
                raise ValueError(
                    f"{option} while parallel.local_sgd.start_step is {start}, where ranks do not "
                    "exchange gradients; leave one of them out"
                )
            if key != "compression" and self.compression == "powersgd":  # it needs fixed buckets
                raise ValueError(
                    f"parallel.compression is powersgd while {option}, and it remembers every "
                    f"gradient from step to step; set parallel.{key}=false"
                )
        if start is not None and self.replica == "ddp":
            raise ValueError(
                f"parallel.replica is ddp while parallel.local_sgd.start_step is {start}; set "
                "parallel.replica=auto"
            )
        return self


class RuntimeConfig(Section):
    """The processes and the devices."""

    backend: Literal["auto", "gloo", "nccl", "xccl"] = "auto"
    """Library that carries gradients between ranks; auto: the one that fits the device."""

    device: Literal["auto", "cpu", "cuda", "xpu", "mps"] = "auto"
    """Kind of device, one for each rank; auto: an accelerator where there is one, else cpu."""

    timeout_s: Annotated[StrictFloat, Field(gt=0.0, le=86_400.0)] = 300.0
    """Longest wait for another rank, when joining and in every collective, in seconds, in (0,
    86400]; the others wait so for rank 0 while it waits for its last save."""

    hang_s: Annotated[StrictFloat, Field(ge=1.0)] | None = 300.0
    """Time without progress of a rank after which the run is ended, in seconds, at least 1; it must
    exceed the longest batch, compilation included, and the longest save. null: wait for ever."""

    deadline: Instant | None = None
    """When the run must be over: unix time in seconds, or a date and time such as
    2026-12-24T18:00:00+01:00 (without a zone: local time). The run saves and stops in time. null:
    the end of the SLURM job, if there is one."""

    @model_validator(mode="after")
    def _deadline_is_a_date(self) -> "RuntimeConfig":
        if isinstance(self.deadline, str):
            try:
                datetime.fromisoformat(self.deadline)
            except ValueError as error:
                text = f"runtime.deadline is {self.deadline!r} ({error})"
                raise ValueError(f"{text}; give a date such as 2026-12-24T18:00:00") from None
        return self


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

    steps: Count | None = None
    """Length of the run in optimizer steps, at least 1, in place of epochs: the last epoch may end
    early. null: epochs counts."""

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

    loss: Component | None = Component(class_path="torch.nn.CrossEntropyLoss")
    """Module or function of (outputs, targets) that gives the mean over the samples, or over what
    its method units(targets) gives: a tensor without dimensions, or a mapping of such by name, of
    which loss is trained, else the sum of all. null: the output of the model is that."""

    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wandb: WandbConfig = WandbConfig()
    parallel: ParallelConfig = ParallelConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    compute: ComputeConfig = ComputeConfig()

    @model_validator(mode="after")
    def _sections_fit_together(self) -> "RunConfig":
        if set(self.name) == {"."}:
            raise ValueError(
                f"name is {self.name!r}; it names a folder, so use a letter or a digit"
            )
        self._check_length()
        if self.parallel.static_graph and self.data.accumulate > 1:
            raise ValueError(
                f"parallel.static_graph is true while data.accumulate is {self.data.accumulate}, "
                "which torch cannot do together; set parallel.static_graph=false"
            )
        self._check_graphs()
        if self.compute.precision == "fp16" and self.parallel.compression in ("fp16", "powersgd"):
            raise ValueError(
                f"compute.precision is fp16 while parallel.compression is "
                f"{self.parallel.compression}, which scaled gradients do not fit; set "
                "parallel.compression=bf16"
            )
        local = self.parallel.local_sgd
        for section in ("checkpoint", "eval"):
            steps = getattr(self, section).every_steps
            if local.start_step is not None and steps and steps % local.period:
                raise ValueError(
                    f"{section}.every_steps is {steps} while parallel.local_sgd.period is "
                    f"{local.period}, and ranks differ in between; set {section}.every_steps="
                    f"{max(1, steps // local.period) * local.period}"
                )
        if self.schedule.momentum_start is not None and self.optim.momentum == 0:
            raise ValueError(
                f"schedule.momentum_start is {self.schedule.momentum_start} while optim.momentum "
                "is 0; set optim.momentum=0.9 or so"
            )
        return self

    def _check_length(self) -> None:
        """Refuse two lengths, and steps of one global batch that are counted on in another."""
        if self.steps is None:
            return
        if self.epochs != type(self).model_fields["epochs"].default:
            raise ValueError(
                f"epochs is {self.epochs} while steps is {self.steps}; leave one of them out, or "
                "set steps=null"
            )
        if self.on_resize == "rescale":
            raise ValueError(
                f"on_resize is rescale while steps is {self.steps}, and other ranks would take "
                "steps of another size; set on_resize=keep_global_batch, or epochs in place of "
                "steps"
            )

    def _check_graphs(self) -> None:
        """Refuse what cannot be a part of a captured step."""
        parallel = self.parallel
        others = {
            "parallel.replica": parallel.replica == "ddp",
            "parallel.static_graph": parallel.static_graph,
            "parallel.find_unused_parameters": parallel.find_unused_parameters,
            "parallel.compression": parallel.compression != "none",
            "parallel.local_sgd.start_step": parallel.local_sgd.start_step is not None,
        }
        for key in [key for key, is_set in others.items() if is_set and self.compute.cuda_graphs]:
            raise ValueError(
                f"compute.cuda_graphs is true while {key} is set, which cannot be captured; leave "
                "one of them out"
            )
