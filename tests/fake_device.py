"""A device for tests of prefetching: copies and compute are done late, in any order that events
allow.
"""

from collections import deque

import torch

POISON = 0xA5
"""Content of memory that nobody has written to."""


class Event:
    """What ``torch.cuda.Event`` does: waiting refers to the last mark at the time of the call."""

    def __init__(self):
        self.mark = {"passed": True}


class FakeDevice:
    """Two queues of operations, whose heads are done at random moments.

    Attributes:
        allocations: Pieces of memory, on the host and on the device.
        waits: How often the host had to wait.
        pending: Operations that are not done, by stream.
    """

    device = torch.device("cpu")

    def __init__(self, random, eagerness=0.5):
        self._random = random
        self._eagerness = eagerness
        self.pending = {"copies": deque(), "compute": deque()}
        self.allocations = self.waits = 0

    def pinned(self, num_bytes):
        self.allocations += 1
        return torch.full((num_bytes,), POISON, dtype=torch.uint8)

    def is_pinned(self, tensor):
        return getattr(tensor, "is_locked", False)

    def empty(self, num_bytes):
        """Allocate memory that the compute stream has freed, and still writes to."""
        self.allocations += 1
        memory = torch.zeros(num_bytes, dtype=torch.uint8)
        self.launch(lambda: memory.fill_(POISON))
        return memory

    def event(self):
        return Event()

    def copy(self, target, source):
        self._enqueue("copies", lambda: target.copy_(source))

    def move(self, leaf):
        return leaf.to(self.device)

    def launch(self, function):
        """Launch a function on the compute stream."""
        self._enqueue("compute", function)

    def record_copies(self, event):
        self._record("copies", event)

    def record_compute(self, event):
        self._record("compute", event)

    def copies_wait(self, event):
        self._enqueue("copies", event.mark)

    def compute_waits(self, event):
        self._enqueue("compute", event.mark)

    def has_failed(self):
        return False

    def host_waits(self, event):
        self.waits += not event.mark["passed"]
        while not event.mark["passed"]:
            self._do_one()

    def finish(self):
        """Do all that is pending."""
        while any(self.pending.values()):
            self._do_one()

    def _record(self, stream, event):
        event.mark = mark = {"passed": False}
        self._enqueue(stream, lambda: mark.update(passed=True))

    def _enqueue(self, stream, operation):
        self.pending[stream].append(operation)
        while self._random.random() < self._eagerness and self._ready():
            self._do_one()

    def _ready(self):
        """Streams whose next operation can be done; a mark that was passed is nothing to do."""
        ready = []
        for operations in self.pending.values():
            while operations and isinstance(operations[0], dict) and operations[0]["passed"]:
                operations.popleft()
            if operations and not isinstance(operations[0], dict):
                ready.append(operations)
        return ready

    def _do_one(self):
        ready = self._ready()
        if ready:
            self._random.choice(ready).popleft()()
        elif any(self.pending.values()):
            raise RuntimeError("the streams wait for each other")
