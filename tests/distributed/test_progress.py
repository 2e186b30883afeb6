from ddp_sgd.distributed.progress import Phase, ProgressTracker


class Clock:
    now = 5.0

    def __call__(self):
        return self.now


def test_phases_are_counted_and_timed():
    clock = Clock()
    progress = ProgressTracker(clock)
    progress.enter(Phase.DATA, 7)
    clock.now += 2
    progress.enter(Phase.FORWARD)
    progress.touch()
    clock.now += 3
    progress.enter(Phase.DATA, 8)
    clock.now += 4
    assert (progress.step, progress.phase, progress.count, progress.ticks) == (
        8,
        "reading data",
        3,
        4,
    )
    assert progress.spent_s() == {"start": 0.0, "reading data": 6.0, "forward pass": 3.0}
    clock.now += 1  # looking does not disturb
    assert progress.spent_s()["reading data"] == 7.0
