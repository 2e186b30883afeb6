"""Configuration sections for data parallelism, devices and timeouts."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from ddp_sgd.config.sections import Count, Positive, Section

Instant = (
    Annotated[StrictFloat, Field(gt=0.0)]
    | Annotated[
        StrictStr, Field(pattern=r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d)?(Z|[+-]\d\d:\d\d)?$")
    ]
)


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
        needs_ddp = {
            "static_graph": self.static_graph,
            "find_unused_parameters": self.find_unused_parameters,
            "compression": self.compression != "none",
        }
        local = self.local_sgd.start_step is not None
        for key in (key for key, needed in needs_ddp.items() if needed):
            value = str(getattr(self, key)).lower()
            if self.replica == "flat":
                raise ValueError(
                    f"parallel.{key} is {value} while parallel.replica is flat, which has no such "
                    "option; set parallel.replica=auto"
                )
            if local:
                raise ValueError(
                    f"parallel.{key} is {value} while parallel.local_sgd.start_step is "
                    f"{self.local_sgd.start_step}, where ranks do not exchange gradients; "
                    "leave one of them out"
                )
        if local and self.replica == "ddp":
            raise ValueError(
                f"parallel.replica is ddp while parallel.local_sgd.start_step is "
                f"{self.local_sgd.start_step}; set parallel.replica=auto"
            )
        return self

    @model_validator(mode="after")
    def _buckets_stay_for_powersgd(self) -> "ParallelConfig":
        moving = {
            "static_graph": self.static_graph,
            "find_unused_parameters": self.find_unused_parameters,
        }
        for key in (key for key, is_set in moving.items() if is_set):
            if self.compression == "powersgd":
                raise ValueError(
                    f"parallel.compression is powersgd while parallel.{key} is true, and it "
                    f"remembers every gradient from step to step; set parallel.{key}=false"
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
