"""TensorBoard logger."""

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ddp_sgd.errors import ConfigError
from ddp_sgd.report.journal import EventRow, RunRecord

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_EVENTS = ("train", "eval")
_AXES = ("time", "step")


class TensorBoard:
    """Writes numbers as scalars over ``step`` into the folder ``tensorboard`` of the run folder.

    Raises:
        ConfigError: TensorBoard is not installed.
    """

    def __init__(self, *, echo: Callable[[str], None]) -> None:
        """Look for the package, without importing it."""
        if find_spec("tensorboard") is None:
            raise ConfigError(
                "log.tensorboard is true while the package tensorboard is missing; "
                "pip install 'ddp_sgd[tensorboard]', or set log.tensorboard=false."
            )
        self._echo = echo
        self._writer: SummaryWriter | None = None

    def start(self, record: RunRecord) -> None:
        """Open the folder."""
        try:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(record.folder / "tensorboard"))
        except Exception as error:  # a view never ends the run
            self._stop(error)

    def write(self, rows: Sequence[EventRow]) -> None:
        """Write the numbers of rows of training and evaluation."""
        if self._writer is None:
            return
        try:
            for row in (row for event, row in rows if event in _EVENTS):
                for key, value in row.items():
                    if key not in _AXES and isinstance(value, (int, float)):
                        self._writer.add_scalar(key, value, row["step"], walltime=row["time"])
        except Exception as error:
            self._stop(error)

    def finish(self, result: Mapping[str, Any]) -> None:  # noqa: ARG002
        """Write what is left and close the files."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except Exception as error:
            self._stop(error)

    def _stop(self, error: Exception) -> None:
        self._writer = None
        self._echo(f"TensorBoard: stopped ({error}); training goes on, metrics.jsonl has every row")
