import os
import signal
import subprocess
import sys
import threading

import pytest

from ddp_sgd.engine.triggers import StopRequest, stop_on_signal
from ddp_sgd.errors import ExitCode, StopInterrupt, StoppedError

SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_before_the_first_step_raises_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with pytest.raises(StoppedError, match=f"stopped by {number.name} before the first") as caught:
        with stop_on_signal() as stop:
            assert stop.reason is None
            try:
                os.kill(os.getpid(), number)
            except Exception:  # code of a user, around a data set
                pytest.fail("it is no error")
    assert caught.value.exit_code == ExitCode.STOPPED
    assert stop.reason == number.name
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_during_the_steps_becomes_a_flag(number):
    with stop_on_signal() as stop:
        stop.defer()
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == number.name  # the first reason stays


def test_a_signal_that_is_held_raises_at_the_end_of_the_block():
    seen = []
    with pytest.raises(StoppedError, match="SIGTERM"), stop_on_signal() as stop:
        with stop.hold():
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append(stop.is_unanswered())
        pytest.fail("it goes on")
    assert seen == [True]
    with stop_on_signal() as stop, stop.hold():
        assert stop.reason is None


def test_a_signal_that_somebody_caught_raises_at_the_first_step():
    with pytest.raises(StoppedError), stop_on_signal() as stop:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException:
            assert stop.is_unanswered()
        stop.defer()
        pytest.fail("the first step is taken")
    assert not stop.is_unanswered()


def test_a_second_signal_does_not_raise_again():
    with pytest.raises(StoppedError, match="SIGTERM"), stop_on_signal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except StopInterrupt:
            os.kill(os.getpid(), signal.SIGUSR1)  # the run is about to end
            raise


def test_a_second_interrupt_is_python_s_own_in_a_process_of_the_user_s():
    with pytest.raises(KeyboardInterrupt), stop_on_signal() as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_only_chosen_signals():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal(signal.SIGUSR2) as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.reason == "SIGUSR2"
        assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_heard():
    heard = []
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with stop_on_signal(owns_process=True) as stop:
            heard.append(stop.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [None]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_thread_and_the_wakeup_of_a_process_of_ours_go_with_the_block():
    threads = threading.active_count()
    with stop_on_signal(owns_process=True) as stop:
        stop.defer()
        assert threading.active_count() == threads + 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == "SIGTERM"
    assert threading.active_count() == threads
    assert signal.set_wakeup_fd(-1) == -1


def test_a_forked_process_tells_this_one_nothing():
    with stop_on_signal(owns_process=True) as stop:
        stop.defer()
        if (child := os.fork()) == 0:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGUSR1)
            os._exit(3 if signal.set_wakeup_fd(-1) == -1 else 4)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        os.kill(os.getpid(), signal.SIGINT)  # its first one: this process would be gone
    assert stop.reason == "SIGINT"


def test_somebody_else_may_ask():
    stop = StopRequest()
    stop.ask("the operator")
    stop.ask("somebody later")
    assert stop.reason == "the operator"


def test_an_object_of_the_user_s_needs_a_reason_only():
    class Clock:
        reason = None

    clock = Clock()
    stop = StopRequest(clock)
    assert stop.reason is None
    clock.reason = "time is up"
    assert stop.reason == "time is up"
    stop.ask("the launcher is gone")
    assert stop.reason == "the launcher is gone"
    assert clock.reason == "time is up"


def test_listening_needs_no_torch():
    code = "import sys, ddp_sgd.engine.triggers; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
