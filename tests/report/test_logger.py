import pytest

from ddp_sgd.report.logger import Loggers, NoLogger


class Recorder:
    def __init__(self, name, calls):
        self._name = name
        self._calls = calls

    def start(self, record):
        self._calls.append((self._name, "start", record))

    def write(self, rows):
        self._calls.extend((self._name, event, row) for event, row in rows)

    def finish(self, result):
        self._calls.append((self._name, "finish", result))


def test_several_sinks_get_everything_in_order_and_close_backwards():
    calls = []
    loggers = Loggers([Recorder("first", calls), Recorder("second", calls)])
    loggers.start("record")
    loggers.write([("train", {"step": 1}), ("eval", {"step": 1})])
    loggers.finish({"exit_code": 0})
    assert calls == [
        ("first", "start", "record"),
        ("second", "start", "record"),
        ("first", "train", {"step": 1}),
        ("first", "eval", {"step": 1}),
        ("second", "train", {"step": 1}),
        ("second", "eval", {"step": 1}),
        ("second", "finish", {"exit_code": 0}),
        ("first", "finish", {"exit_code": 0}),
    ]


def test_no_sink_takes_everything_and_says_nothing(capsys):
    logger = NoLogger()
    logger.start("record")
    logger.write([("train", {"step": 1})])
    logger.finish({"exit_code": 0})
    assert tuple(capsys.readouterr()) == ("", "")


def test_what_was_never_opened_gets_nothing():
    class Shut(Recorder):
        def start(self, record):
            raise OSError("shut")

    calls = []
    loggers = Loggers([Recorder("first", calls), Shut("second", calls), Recorder("third", calls)])
    with pytest.raises(OSError, match="shut"):
        loggers.start("record")
    loggers.write([("end", {"step": 1})])
    loggers.finish({"exit_code": 73})
    assert [(name, event) for name, event, _ in calls] == [
        ("first", "start"),
        ("first", "end"),
        ("first", "finish"),
    ]
