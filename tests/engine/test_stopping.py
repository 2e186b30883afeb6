import os
import signal
import subprocess
import sys
import threading

import pytest

from ddp_sgd.engine.stopping import StopRequest, stop_on_signal


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_becomes_a_request_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with stop_on_signal() as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == number.name  # the first reason stays
    assert signal.getsignal(number) is before


def test_only_chosen_signals():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signal(signal.SIGUSR2) as stop:
        os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.reason == "SIGUSR2"
        assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_nothing_is_heard():
    heard = []
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with stop_on_signal() as stop:
            heard.append(stop.reason)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert heard == [None]
    assert signal.getsignal(signal.SIGTERM) is before


def test_somebody_else_may_ask():
    stop = StopRequest()
    stop.ask("the operator")
    stop.ask("somebody later")
    assert stop.reason == "the operator"


def test_listening_needs_no_torch():
    code = "import sys, ddp_sgd.engine.stopping; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
