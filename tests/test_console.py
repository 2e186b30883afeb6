import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import python_folder
from launching import ROOT, environment

from ddp_sgd.console import (
    deliver,
    fill_descriptors,
    is_terminal,
    say,
    say_error,
    settle,
    silence,
    silent_descriptors,
)
from ddp_sgd.errors import ExitCode, OutputError
from ddp_sgd.report.journal import read_journal

TRAIN = ("train", "--epochs=1", "--name=x")
LIMIT_S = 150


def shell(folder, line, **variables):
    """Run a line of bash, in which ``"$@"`` is Python; gives the codes of its parts, and stderr."""
    script = f'{line}\nprintf "%s " "${{PIPESTATUS[@]}}" > codes'
    done = subprocess.run(
        ["bash", "-c", script, "bash", str(python_folder() / "python")],
        cwd=folder,
        env=environment(**variables),
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        timeout=LIMIT_S,
    )
    return [int(code) for code in (folder / "codes").read_text().split()], done


def assert_trained(folder, steps=45):
    """The run took every step, and says so."""
    rows = read_journal(folder / "runs" / "x" / "metrics.jsonl")
    assert rows[-1]["event"] == "end"
    assert rows[-1]["status"] == "finished"
    assert rows[-1]["step"] == steps
    result = json.loads((folder / "runs" / "x" / "result.json").read_text())
    assert (result["status"], result["exit_code"]) == ("finished", 0)


@pytest.mark.parametrize(
    "where", ["| head -3", "2>&1 | true", "> /dev/full 2> /dev/full", "<&- >&- 2>&-"]
)
def test_a_console_that_fails_does_not_end_a_run(where, tmp_path):
    words = " ".join(TRAIN)
    codes, done = shell(tmp_path, f'"$@" -m ddp_sgd.{words} {where}')
    assert codes[0] == 0, done.stderr
    assert done.stderr == ""
    assert_trained(tmp_path)
    (checkpoints,) = (tmp_path / "runs" / "x").glob("checkpoints")
    assert (checkpoints / "last").exists()


def test_prints_of_the_user_do_not_end_a_run_either(tmp_path):
    (tmp_path / "talker.py").write_text(
        "import sys, torch\n"
        "class Talker(torch.nn.Linear):\n"
        "    def forward(self, inputs):\n"
        "        print('forward', flush=True)\n"
        "        sys.stderr.write('forward\\n')\n"
        "        return super().forward(inputs)\n"
    )
    model = "'--model={class_path: talker.Talker, init_args: {in_features: 64, out_features: 10}}'"
    line = f'"$@" -m ddp_sgd.{" ".join(TRAIN)} {model} 2>&1 | head -1'
    codes, done = shell(tmp_path, line, PYTHONPATH=f"{ROOT}:{tmp_path}")
    assert codes == [0, 0], done.stderr
    assert_trained(tmp_path)


def test_ranks_under_a_launcher_whose_console_fails(tmp_path):
    words = " ".join([*TRAIN, "--runtime.device=cpu"])
    line = f'"$@" -m torch.distributed.run --standalone --nproc_per_node=2 -m ddp_sgd.{words}'
    codes, done = shell(tmp_path, f"{line} | head -1")
    assert codes == [0, 0], done.stderr
    assert_trained(tmp_path, steps=23)


def test_a_program_of_the_users_own_ends_as_it_means_to(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from ddp_sgd import RunConfig, fit, start_runtime\n"
        "with start_runtime(device='cpu') as runtime:\n"
        "    result = fit(RunConfig(epochs=1, name='x'), runtime)\n"
        "sys.exit(result.exit_code)\n"
    )
    codes, done = shell(tmp_path, '"$@" program.py | true')
    assert codes == [0, 0], done.stderr
    assert done.stderr == ""
    assert_trained(tmp_path)


COMMANDS = [
    "explain --samples=100",
    "train --help",
    "train --print_config",
    "checkpoint --help",
    "checkpoint ls nothing",
    "evaluate --help",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("place")
    (folder / "nothing").mkdir()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_reader_that_has_read_enough_is_no_error(command, place):
    codes, done = shell(place, f'"$@" -m ddp_sgd.{command} | true')
    assert codes == [0, 0]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("where", "why"), [("> /dev/full", "No space left on device"), (">&-", "it is closed")]
)
@pytest.mark.parametrize("command", COMMANDS)
def test_output_that_does_not_arrive_is_an_error(command, where, why, place):
    codes, done = shell(place, f'"$@" -m ddp_sgd.{command} {where}')
    assert codes == [ExitCode.OUTPUT]
    assert done.stderr.endswith(
        f"ddp_sgd: error: stdout is not writable: {why}; send the output to a terminal, or to a "
        "file on a disk with room.\n"
    )
    assert "Traceback" not in done.stderr


def test_ranks_do_not_wait_for_one_that_cannot_print(tmp_path):
    line = '"$@" -m torch.distributed.run --standalone --nproc_per_node=2 -m ddp_sgd.doctor'
    start = time.monotonic()
    codes, done = shell(tmp_path, f"{line} --runtime.timeout_s=1000 > /dev/full")
    assert codes == [1]  # torchrun's own, whatever it was
    assert "ddp_sgd: error: stdout is not writable: No space left on device; send" in done.stderr
    assert "exitcode  : 73" in done.stderr
    assert time.monotonic() - start < LIMIT_S


@pytest.mark.parametrize("where", ["2> /dev/full", "2>&-", "2>&1 | true", ">&- 2>&-"])
@pytest.mark.parametrize("debug", ["", " --debug"])
def test_the_code_of_an_error_does_not_depend_on_who_reads_it(where, debug, place):
    codes, _ = shell(place, f'"$@" -m ddp_sgd.train --epochs=0{debug} {where}')
    assert codes[0] == ExitCode.CONFIG


class Stream(io.StringIO):
    """A stream of the user's own, which fails in its own way."""

    def __init__(self, error, encoding="utf-8"):
        super().__init__()
        self._error = error
        self._encoding = encoding

    @property
    def encoding(self):
        return self._encoding

    def write(self, text):
        if self._error:
            raise self._error
        text.encode(self._encoding)
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(5, "I/O error"), ValueError("closed"), KeyError("?")])
def test_whatever_a_stream_raises_stays_there(error, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Stream(error))
    monkeypatch.setattr(sys, "stderr", Stream(error))
    say("a")
    say_error("a")
    settle()


@pytest.mark.parametrize("function", [say, deliver])
def test_what_an_encoding_lacks_is_escaped(function, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Stream(None, "ascii"))
    function("a é")
    assert sys.stdout.getvalue().rstrip("\n") == "a \\xe9"


def test_there_may_be_no_stream_at_all(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    say("a")
    say_error("a")
    silence(None)
    with pytest.raises(OutputError, match="stdout is not writable: it is closed; send") as caught:
        deliver("a")
    assert caught.value.exit_code == ExitCode.OUTPUT


def test_who_is_a_terminal(monkeypatch):
    closed = io.StringIO()
    closed.close()
    assert not is_terminal(None)
    assert not is_terminal(closed)
    assert not is_terminal(io.StringIO())


def test_errors_come_after_what_was_said(capfd):
    sys.stdout.write("so far\n")
    say_error("an error")
    assert capfd.readouterr() == ("so far\n", "an error\n")


def python(code, *flags, **options):
    code = f"import os, sys\nfrom ddp_sgd import console\n{code}"
    variables = environment()
    variables.pop("PYTHONUNBUFFERED", None)
    return subprocess.Popen([sys.executable, *flags, "-c", code], env=variables, **options)


def test_closed_descriptors_are_opened_so_that_no_file_takes_their_place(tmp_path):
    code = (
        "for number in (0, 1, 2): os.close(number)\n"
        "console.outlive_console()\n"
        "file = open('journal', 'w')\n"
        "os.write(1, b'from C')\n"
        "print('from Python', file=sys.stderr)\n"
        "file.write(str(file.fileno() > 2))\n"
    )
    assert python(code, cwd=tmp_path).wait(LIMIT_S) == 0
    assert (tmp_path / "journal").read_text() == "True"


def test_descriptors_that_are_open_stay_as_they_are():
    before = [os.fstat(number) for number in (0, 1, 2)]
    fill_descriptors()
    assert [os.fstat(number) for number in (0, 1, 2)] == before


def test_a_pipe_that_does_not_wait_loses_nothing():
    """Another program may have set a pipe, or a terminal, that is shared to non-blocking."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    code = "console.outlive_console()\nfor number in range(40_000): print(number)\n"
    process = python(code, stdout=write)
    os.close(write)
    with Path(f"/dev/fd/{read}").open() as lines:
        numbers = [int(line) for line in lines]
    os.close(read)
    assert process.wait(LIMIT_S) == 0
    assert numbers == list(range(40_000))


@pytest.mark.parametrize("flags", [(), ("-u",)])
def test_buffering_is_that_of_before(flags):
    """A file gets its lines in blocks, with ``python -u`` line by line."""
    code = (
        "console.outlive_console()\n"
        "print(sys.stdout.line_buffering, sys.stderr.line_buffering, sys.stdout.encoding)\n"
    )
    process = python(code, *flags, stdout=subprocess.PIPE, text=True)
    assert process.communicate(timeout=LIMIT_S)[0] == f"{bool(flags)} True utf-8\n"


def test_silent_descriptors_take_what_a_child_prints(capfd):
    with silent_descriptors():
        subprocess.run([sys.executable, "-c", "import os; os.write(2, b'a')"], check=True)
        os.write(1, b"b")
    os.write(1, b"c")
    assert tuple(capfd.readouterr()) == ("c", "")
