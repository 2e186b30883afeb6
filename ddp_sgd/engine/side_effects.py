"""Undo the side effects of a forward or backward pass, so that a sanity check leaves no trace."""

import random
from collections import deque
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from ddp_sgd.tree import tensors_in

Place = tuple[nn.Module, str]
"""A buffer by its module and its name there: assignments replace the tensor, not the place."""


class _Memory(NamedTuple):
    """A storage and what it held."""

    storage: torch.UntypedStorage
    content: torch.UntypedStorage


class _Form(NamedTuple):
    """A parameter or buffer as it was: the tensor, its version, and another one on its memory."""

    tensor: torch.Tensor
    version: int
    data: torch.Tensor

    @property
    def is_elsewhere(self) -> bool:
        """Whether the tensor was resized, or given other memory, such as by ``p.data = ...``."""
        now = self.tensor
        if now.layout is not torch.strided or self.data.layout is not torch.strided:
            return False
        return (now.shape, now.stride(), now.data_ptr()) != (
            self.data.shape,
            self.data.stride(),
            self.data.data_ptr(),
        )


@contextmanager
def undo_side_effects(
    modules: Sequence[nn.Module], generators: Sequence[torch.Generator]
) -> Iterator["SideEffects"]:
    """Put modules and random number generators back as they were when the block ends.

    Parameters and buffers (also resized or replaced ones), gradients, attributes, the contents of
    lists, dictionaries and sets among the attributes, torch's given generators, ``random`` and
    ``numpy.random``. Modules that are still lazy are left out: what gives them a shape stays.

    Args:
        modules: Modules with all that is below them.
        generators: Generators that a forward pass draws from.

    Yields:
        What the passes in the block have changed so far.
    """
    effects = SideEffects(modules, generators)
    try:
        yield effects
    finally:
        effects.undo()


class OperatorWatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at the operators of a pass; a subclass defines ``__torch_dispatch__``."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Return False: to disable torch's compiler here, torch would import it, for 2 s."""
        return False


class CollectiveWatch(OperatorWatch):
    """Notices collectives, such as those of a loss over the samples of all ranks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = False

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.seen = self.seen or function.namespace in ("c10d", "_c10d_functional")
        return function(*args, **(kwargs or {}))


class WriteWatch(OperatorWatch):
    """Notices which memory the operators of torch write to, even where no value changes.

    Some kernels, such as those of fused observers, do not count a write as a new version.

    Attributes:
        written: Addresses of storages.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.written: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        named = kwargs or {}
        for value in _outputs_among(function, args, named):
            for tensor in tensors_in(value):
                if tensor.layout is torch.strided:
                    self.written.add(tensor.untyped_storage().data_ptr())
        return function(*args, **named)


class SideEffects:
    """What passes have changed since this was made.

    Args:
        modules: Modules with all that is below them.
        generators: Generators that a forward pass draws from.
    """

    def __init__(self, modules: Sequence[nn.Module], generators: Sequence[torch.Generator]) -> None:
        found = dict.fromkeys(m for root in modules for m in root.modules())
        self._modules = [module for module in found if not _is_lazy(module)]
        self._attributes = [(m, dict(vars(m)), _contents(vars(m))) for m in self._modules]
        self._classes = [type(module) for module in self._modules]  # lazy modules become others
        self._forms = {place: _form(place[0]._buffers[place[1]]) for place in self._places()}
        tensors = [p for m in self._modules for p in m._parameters.values() if p is not None]
        self._parameters = {p: _form(p) for p in tensors}
        self._gradients = [(p, p.grad) for p in tensors]
        for parameter, _ in self._gradients:
            parameter.grad = None
        self._memory: dict[int, _Memory] = {}
        for tensor in [*tensors, *(form.tensor for form in self._forms.values())]:
            self._keep(tensor)
        self._generators = [(generator, generator.get_state()) for generator in generators]
        self._random, self._numpy = random.getstate(), np.random.get_state(legacy=False)

    @property
    def draws_from_random(self) -> bool:
        """Whether the generator of ``random`` was used."""
        return random.getstate() != self._random

    @property
    def draws_from_numpy(self) -> bool:
        """Whether the global generator of ``numpy.random`` was used."""
        now, before = np.random.get_state(legacy=False), self._numpy
        moved = now["state"]["pos"] != before["state"]["pos"]
        return moved or bool((now["state"]["key"] != before["state"]["key"]).any())

    def changed_buffers(self, written: Set[int] = frozenset()) -> list[Place]:
        """List the buffers that were written, replaced or resized, even with equal values.

        Args:
            written: What a ``WriteWatch`` has noticed.
        """
        return [
            place
            for place in self._places()
            if place not in self._forms or self._is_changed(place, self._forms[place], written)
        ]

    def resized_buffers(self) -> list[Place]:
        """List the buffers that were made, removed or resized."""
        places = dict.fromkeys([*self._forms, *self._places()])
        return [place for place in places if self._is_resized(place)]

    def changed_parameters(self) -> list[nn.Parameter]:
        """List the parameters whose values differ."""
        return [p for p, form in self._parameters.items() if self._has_other_values(p, form)]

    def written_parameters(self) -> list[nn.Parameter]:
        """List the parameters that were written or given other memory, even with equal values."""
        return [
            p
            for p, form in self._parameters.items()
            if _version(p) != form.version or self._has_other_values(p, form)
        ]

    def changed_attributes(self) -> list[str]:
        """List the plain attributes that differ from those at the last ``keep_attributes``."""
        return [
            f"{type(module).__name__}.{name}"
            for module, attributes, contents in self._attributes
            for name in _changed(vars(module), attributes, contents)
        ]

    def keep_attributes(self) -> None:
        """Take the attributes of now for those that ``undo`` puts back."""
        self._attributes = [(m, dict(vars(m)), _contents(vars(m))) for m in self._modules]

    def undo(self, *, attributes: bool = True) -> None:
        """Put everything back.

        Args:
            attributes: Whether plain attributes are put back as well, besides which parameters and
                buffers a module has.
        """
        kinds = zip(self._modules, self._classes, strict=True)
        for module, kind in [(m, kind) for m, kind in kinds if type(m) is not kind]:
            module.__class__ = kind
        for module, before, contents in self._attributes:
            if attributes:
                vars(module).clear()
                vars(module).update(before)
            own = (id(module._parameters), id(module._buffers))
            for container, content in contents:
                if attributes or id(container) in own:
                    _refill(container, content)
        with torch.no_grad():
            self._undo_writes()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._random)
        np.random.set_state(self._numpy)

    def _undo_writes(self) -> None:
        for storage, content in self._memory.values():
            if storage.nbytes() != content.nbytes():
                storage.resize_(content.nbytes())
            storage.copy_(content)
        for form in (*self._parameters.values(), *self._forms.values()):
            if form.is_elsewhere:
                form.tensor.data = form.data

    def _places(self) -> list[Place]:
        return [
            (module, name)
            for module in self._modules
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def _is_changed(self, place: Place, before: _Form, written: Set[int]) -> bool:
        now = place[0]._buffers[place[1]]
        if now is not before.tensor or before.is_elsewhere or _version(now) != before.version:
            return True
        if now.layout is torch.strided and now.untyped_storage().data_ptr() in written:
            return True
        memory = self._memory_of(now)  # writes through .data or numpy leave no version
        return memory is not None and not _equal(memory.storage, memory.content)

    def _is_resized(self, place: Place) -> bool:
        module, name = place
        if place not in self._forms or name not in module._buffers:
            return True
        now = module._buffers[name]
        return now is None or now.shape != self._forms[place].data.shape

    def _has_other_values(self, parameter: nn.Parameter, form: _Form) -> bool:
        memory = self._memory_of(form.data)
        if memory is not None and not _equal(memory.storage, memory.content):
            return True
        return form.is_elsewhere and not torch.equal(parameter.data, form.data)

    def _keep(self, tensor: torch.Tensor) -> None:
        if tensor.layout is torch.strided and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            # By address, since every call makes another object; empty storages have none.
            address = storage.data_ptr() or id(storage)
            if address not in self._memory:
                self._memory[address] = _Memory(storage, _copy_of(storage))

    def _memory_of(self, tensor: torch.Tensor) -> _Memory | None:
        if tensor.layout is not torch.strided:
            return None
        return self._memory.get(tensor.untyped_storage().data_ptr())


def _outputs_among(function: Any, args: Any, named: dict[str, Any]) -> Iterator[Any]:
    """Yield the arguments that an operator writes to, by its schema."""
    for number, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[number] if number < len(args) else named.get(argument.name)


def _is_lazy(module: nn.Module) -> bool:
    own = (*module._parameters.values(), *module._buffers.values())
    return any(tensor is not None and is_lazy(tensor) for tensor in own)


def _form(tensor: torch.Tensor | None) -> _Form:
    if tensor is None:
        raise RuntimeError("a place without a buffer")
    return _Form(tensor, _version(tensor), tensor.data)


def _version(tensor: torch.Tensor | None) -> int:
    """Count the writes to a tensor; tensors made in inference mode do not count them."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _copy_of(storage: torch.UntypedStorage) -> torch.UntypedStorage:
    copied = torch.UntypedStorage(  # type: ignore[no-untyped-call]
        storage.nbytes(), device=storage.device
    )
    return copied.copy_(storage)


def _equal(one: torch.UntypedStorage, other: torch.UntypedStorage) -> bool:
    a, b = (torch.empty(0, dtype=torch.uint8, device=s.device).set_(s) for s in (one, other))
    return torch.equal(a, b)


def _changed(
    now: dict[str, Any], before: dict[str, Any], contents: list[tuple[Any, Any]]
) -> Iterator[str]:
    """Yield the names of attributes that were set, replaced or removed, or whose items were."""
    held = {id(container): content for container, content in contents}
    own = {id(now[name]) for name in ("_parameters", "_buffers") if name in now}
    for name in dict.fromkeys([*before, *now]):
        value, old = now.get(name), before.get(name)
        is_same = value is old or (isinstance(value, (bool, int, float, str)) and value == old)
        if id(value) in own or (is_same and id(value) not in held):
            continue
        if not is_same or not _are_same_items(value, held[id(value)]):
            yield name


def _are_same_items(container: Any, content: Any) -> bool:
    now, before = (
        list(items.values()) if isinstance(items, dict) else list(items)
        for items in (container, content)
    )
    return sorted(map(id, now)) == sorted(map(id, before))


def _contents(attributes: dict[str, Any]) -> list[tuple[Any, Any]]:
    kinds = (dict, list, set, deque)
    return [(value, copy(value)) for value in attributes.values() if isinstance(value, kinds)]


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)
