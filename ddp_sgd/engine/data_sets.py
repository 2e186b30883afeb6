"""Data sets of a run by their keys, given or built: training, one or several held-out, test."""

from collections.abc import Mapping, Sized
from typing import Any, NamedTuple

from torch.utils.data import IterableDataset

from ddp_sgd.config.component import Component, check_set_names
from ddp_sgd.config.sections import DataConfig
from ddp_sgd.errors import ConfigError, DataError
from ddp_sgd.instantiate import instantiate


def check_dataset(dataset: Any, where: str) -> None:
    """Refuse what is not a map-style data set with at least one sample.

    Raises:
        ConfigError: It has no length, or gives no sample for an index.
        DataError: It is empty.
    """
    by_index = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
    if not by_index or isinstance(dataset, IterableDataset):
        raise ConfigError(
            f"{where} is a {type(dataset).__name__}, which has no length or no samples by index; "
            "name a map-style data set (streaming data sets are not supported)."
        )
    if len(dataset) == 0:
        raise DataError(f"{where} is empty; name a data set with at least one sample.")


class DataSets(NamedTuple):
    """The data sets of a run.

    Args:
        train: The training set.
        held_out: By key: ``data.eval``, or ``data.eval.NAME`` of several, in order; may be empty.
        test: By key: ``data.test``; may be empty.
    """

    train: Any
    held_out: dict[str, Any]
    test: dict[str, Any]


def gather_data(data: DataConfig, *, train_set: Any, eval_set: Any, test_set: Any) -> DataSets:
    """Take the data sets that are given, and build the rest from the configuration.

    A given training set without a held-out set means that there is none.

    Args:
        data: Section ``data`` of the configuration.
        train_set: What the caller gives to train on; None: nothing.
        eval_set: The same, held out; a mapping of names holds several.
        test_set: The same, to be scored at the end.

    Raises:
        ConfigError: One is no map-style data set.
        DataError: One cannot be opened, or is empty.
    """

    def built(where: str, component: Component) -> Any:
        return instantiate(component, where, failure=DataError)

    test_sets = {} if test_set is None else {"data.test": test_set}
    eval_sets = {} if eval_set is None else key_sets(eval_set)
    if train_set is None:
        train_set = built("data.train", data.train)
        if eval_set is None:
            eval_sets = {where: built(where, each) for where, each in data.eval_sets.items()}
    if data.test is not None and not test_sets:
        test_sets = {"data.test": built("data.test", data.test)}
    for where, dataset in {"data.train": train_set, **eval_sets, **test_sets}.items():
        check_dataset(dataset, where)
    return DataSets(train_set, eval_sets, test_sets)


def key_sets(eval_set: Any) -> dict[str, Any]:
    """Return held-out data by their keys, as they are in the configuration.

    Args:
        eval_set: A data set, or several: a mapping whose keys are text.

    Raises:
        ConfigError: A name cannot be a part of a metric's name.
    """
    if not isinstance(eval_set, Mapping) or not any(isinstance(key, str) for key in eval_set):
        return {"data.eval": eval_set}
    try:
        check_set_names("eval_set", eval_set)
    except ValueError as error:
        raise ConfigError(f"{error}.") from None
    return {f"data.eval.{name}": each for name, each in eval_set.items()}
