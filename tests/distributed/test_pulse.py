from ddp_sgd.distributed.pulse import Pulse


class Clock:
    now = 5.0

    def __call__(self):
        return self.now


def test_phases_are_counted_and_timed():
    clock = Clock()
    pulse = Pulse(clock)
    pulse.at("reading data", 7)
    clock.now += 2
    pulse.at("forward pass")
    pulse.tick()
    clock.now += 3
    pulse.at("reading data", 8)
    clock.now += 4
    assert (pulse.step, pulse.phase, pulse.count, pulse.ticks) == (8, "reading data", 3, 4)
    assert pulse.spent_s() == {"start": 0.0, "reading data": 6.0, "forward pass": 3.0}
    clock.now += 1  # looking does not disturb
    assert pulse.spent_s()["reading data"] == 7.0
