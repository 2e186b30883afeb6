"""Python programs for tests, each in a process forked from a server that has imported torch.

``import torch`` takes two seconds of CPU time, a fork a few hundredths. Programs of W&B, which
need no torch, are forked from a server that has imported wandb. ``Popen`` and ``run`` are
those of ``subprocess``, for commands such as ``[sys.executable, "-m", "ddp_sgd.train", ...]``:
the process is a child of the caller, with a folder, an environment, descriptors, a session, signals
and an end of its own. ``python_folder`` has a ``python`` and a ``torchrun`` for shell scripts.
Where the start of an interpreter is what is tested, use ``subprocess``.

How it works: the server forks a process that forks the command and ends; the caller is a subreaper
meanwhile, so that the command becomes its child. A command that starts ranks (the launcher,
torchrun) has a server of its own, forked before it has threads. Linux only; elsewhere, and for
options that only a real start knows, this is ``subprocess``.
"""
# What this process and its forks have is global; descriptors and folders come from the kernel.
# ruff: noqa: PLW0603, PTH109, PTH208, T201, SIM115

import atexit
import ctypes
import functools
import gc
import inspect
import io
import os
import pickle
import random
import runpy
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

HERE = Path(__file__).parent
TORCH = (
    "torch",
    "numpy",
    "torch.utils.data",
    "torch.distributed.run",  # what it imports, but itself
    "torch.distributed.elastic.agent.server.local_elastic_agent",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
    "ddp_sgd.engine.fit",
)
WANDB = ("numpy", "wandb", "ddp_sgd.report.wandb_follower", "ddp_sgd.distributed.environment")
PIPE, DEVNULL = subprocess.PIPE, subprocess.DEVNULL
STARTERS = ("ddp_sgd.launch", "ddp_sgd.torchrun", "torch.distributed.run", "benchmarks.peers")
"""Programs that start processes, which are forked as well."""
IS_LINUX = sys.platform == "linux"

_PR_SET_CHILD_SUBREAPER = 36
_MAX_BYTES = 1 << 20
_STREAMS = (0, 1, 2)
_SIGNATURE = inspect.signature(subprocess.Popen._execute_child)
_servers = {}
"""Channel and address of each server, by the modules that it has imported."""
_is_nested = False
_names = None
"""Folder with a file for each forked process, which has its name."""


class Popen(subprocess.Popen):
    """``subprocess.Popen``, but for Python programs a fork of the server."""

    def _execute_child(self, *given):
        call = _SIGNATURE.bind(self, *given).arguments
        program = _program_of(call)
        channel = _server_for(program)
        if channel is None:
            super()._execute_child(*given)
            return
        inherited = [call[end] for end in ("p2cread", "c2pwrite", "errwrite")]
        streams = [own if end == -1 else end for own, end in zip(_STREAMS, inherited, strict=True)]
        is_own_session = call["start_new_session"]
        group = call.get("process_group", -1)
        self.pid = _fork(
            channel,
            streams,
            program=program,
            folder=os.path.realpath(os.fspath(call["cwd"] or ".")),
            environ=dict(os.environ if call["env"] is None else call["env"]),
            group=None if is_own_session else os.getpgrp() if group in (-1, None) else group,
            cpus=os.sched_getaffinity(0),
            blocked=signal.pthread_sigmask(signal.SIG_BLOCK, ()),
        )
        self._child_created = True
        self._close_pipe_fds(
            *(call[end] for end in (
                "p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite"
            ))
        )  # fmt: skip


def run(
    command, *, input=None, capture_output=False, timeout=None, check=False, **options
):  # the names of subprocess.run
    """``subprocess.run`` with ``Popen`` of this module."""
    if input is not None:
        options["stdin"] = subprocess.PIPE
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, err = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    if check and process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, out, err)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@functools.cache
def python_folder():
    """A folder with a ``python`` and a ``torchrun`` that have the server run programs."""
    if not IS_LINUX:
        return Path(sys.executable).parent
    _, address = _start_server(TORCH)
    folder = Path(address).parent
    for name, first in (("python", ()), ("torchrun", ("-m", "torch.distributed.run"))):
        text = f"#!{sys.executable} -IS\n{inspect.getsource(_ask)}\n_ask({address!r}, {first!r})\n"
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return folder


@functools.cache
def starting_python():
    """A ``python`` with a real start, for other hosts and jobs; it forks what it starts itself.

    So the launcher, torchrun and the ranks of a host cost one import of torch.
    """
    folder = Path(tempfile.mkdtemp(prefix="starting-python-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    code = f"import sys; sys.path.append({str(HERE)!r}); import commands; commands.start()"
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(code)} "$@"\n')
    python.chmod(0o755)
    return python


def _ask(address, first):
    """What ``python`` of ``python_folder`` does; it needs nothing of this module."""
    import array
    import contextlib
    import os
    import pickle
    import signal
    import socket
    import sys

    streams, is_open = [], []
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            is_open.append(False)
        else:
            is_open.append(True)
            streams.append(number)
    wanted = {
        "program": (*first, *sys.argv[1:]),
        "folder": os.getcwd(),
        "environ": dict(os.environ),
        "group": None,
        "cpus": os.sched_getaffinity(0),
        "is_open": is_open,
        "ignored": [
            number
            for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
            if signal.getsignal(number) == signal.SIG_IGN
        ],
    }
    pids, early = [], []

    def pass_on(number, _):
        if not pids:
            early.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[0], number)

    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        if number not in wanted["ignored"]:
            signal.signal(number, pass_on)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(address)
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
    channel.sendmsg([pickle.dumps(wanted)], rights if streams else [])
    pids.append(int(channel.recv(100)))
    for number in early:
        pass_on(number, None)
    channel.settimeout(0.1)  # a signal just before the call does not interrupt it
    while True:
        try:
            code = int(channel.recv(100) or 255)
            break
        except TimeoutError:
            pass
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _program_of(call):
    """Arguments behind the name of Python; None for what only a real start does."""
    if call["shell"] or call["preexec_fn"] or call["pass_fds"] or call["executable"]:
        return None
    words = [os.fspath(word) for word in call["args"]]
    known = words[0] == sys.executable and len(words) > 1
    rest = words[1:]
    if rest[:1] == ["-u"]:
        rest = rest[1:]
    if not known or (rest[0].startswith("-") and rest[0] not in ("-m", "-c")):
        return None
    return tuple(words[1:])


def _server_for(program):
    if not IS_LINUX or program is None:
        return None
    words = ("wandb_follower", "wandb.init")
    is_of_wandb = program[:2] == ("-m", "wandb") or any(w in "".join(program[:2]) for w in words)
    return _start_server(WANDB if is_of_wandb and not _is_nested else TORCH)[0]


def _start_server(modules):
    """Channel to a server of this process, and the address at which others find it."""
    global _names
    if modules not in _servers:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if _names is None:
            _names = Path(tempfile.mkdtemp(prefix="forked-"))
            atexit.register(shutil.rmtree, _names, ignore_errors=True)
        address = f"{_names}/socket-{modules[1]}"
        code = (
            f"import sys; sys.path.append({str(HERE)!r}); import commands; commands.serve_forever()"
        )
        environ = dict(os.environ) | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-c", code, str(theirs.fileno()), address, *modules],
                env=environ,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        assert ours.recv(100) == b"ready"
        _servers[modules] = ours, address
        atexit.register(_stop_server, process, ours)
    return _servers[modules]


def _stop_server(process, channel):
    channel.close()
    process.wait()


def _fork(channel, streams, **wanted):
    """Have the server fork a command that becomes a child of this process; return its number."""
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        socket.send_fds(channel, [pickle.dumps(wanted)], streams)
        return int(channel.recv(100))
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


# What follows runs in the server, and in what it forks.


def serve_forever():
    """Serve the process that started this one; a forked command ends here."""
    global _names
    _names = Path(sys.argv[2]).parent
    _preload(sys.argv[3:])
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(sys.argv[2])
    listener.listen(100)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.send(b"ready")
    wanted, streams = _serve(channel, listener)
    _go_on(_become(streams, **wanted), wanted["program"])


def start():
    """What ``starting_python`` does: a command that forks what it starts."""
    program = tuple(sys.argv[1:])
    channel = None
    if _starts_others(program):
        environ = dict(os.environ)
        _preload(TORCH)
        os.environ.clear()
        os.environ.update(environ)
        channel = _start_nested()
    else:
        sys.path[:] = _own_path()
    _go_on(channel, program)


def _preload(modules):
    os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # as commands set it before they import torch
    for name in modules:
        __import__(name)
    sys.path[:] = _own_path()
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads cannot be forked"
    gc.collect()
    gc.freeze()


def _own_path():
    """Path of an interpreter without PYTHONPATH and the folder of a program."""
    added = ("", str(HERE), *os.environ.get("PYTHONPATH", "").split(":"))
    return [path for path in sys.path if path not in added]


def _go_on(channel, program):
    """Serve as long as this is a server; in a command run its program, and end."""
    while channel:
        wanted, streams = _serve(channel)
        channel, program = _become(streams, **wanted), wanted["program"]
    os._exit(_run_to_its_end(program))


def _starts_others(program):
    return any(starter in word for word in program for starter in STARTERS)


def _serve(channel, listener=None):
    """Fork for every request; returns in the forked processes only."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    sources = [channel, listener] if listener else [channel]
    while True:
        for source in select.select(sources, [], [], 1.0)[0]:
            asking = listener.accept()[0] if source is listener else channel
            data, streams, _, _ = socket.recv_fds(asking, _MAX_BYTES, len(_STREAMS))
            if not data and source is channel:
                os._exit(0)
            middle = os.fork()
            if middle == 0:
                middle = os.getpid()
                if source is listener:
                    _supervise(asking)
                elif os.fork():
                    os._exit(0)
                else:
                    _wait_for_parent(middle)
                    asking.send(str(os.getpid()).encode())
                for stale in {channel, listener, asking} - {None}:
                    stale.detach()  # ``_become`` closes the descriptors
                return pickle.loads(data), streams
            for stream in streams:
                os.close(stream)
            if source is listener:
                asking.close()
            else:
                os.waitpid(middle, 0)
        while listener:
            try:
                if os.waitpid(-1, os.WNOHANG)[0] == 0:
                    break
            except ChildProcessError:
                break


def _wait_for_parent(middle):
    while os.getppid() == middle:
        time.sleep(0.0005)


def _supervise(asking):
    """Fork the command, in which this returns; send its end, and end it with who asked for it."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        return
    has_ended = os.pidfd_open(pid)
    asking.send(str(pid).encode())
    if asking in select.select([asking, has_ended], [], [])[0]:
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    try:
        asking.send(str(code).encode())
    finally:
        os._exit(0)


def _become(
    streams,
    *,
    program,
    folder,
    environ,
    group,
    cpus,
    is_open=(True, True, True),
    ignored=(),
    blocked=(),
):
    """Turn this process into a command; returns a channel in the server of a command only."""
    if group is not None:
        os.setpgid(0, group)
    else:
        _own_session()
    _set_descriptors(streams, is_open)
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # as Python has them
        signal.signal(number, signal.SIG_IGN)
    if signal.SIGINT not in ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.sched_setaffinity(0, cpus)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    random.seed()
    sys.modules["numpy"].random.seed()
    sys.modules["ddp_sgd.distributed.environment"]._note_parent()
    _measure_if_asked(environ)
    if _starts_others(program):
        channel = _start_nested()
        if channel:
            return channel
    _set_name(_name_of(program, environ))
    return None


def _own_session():
    if os.getsid(0) != os.getpid():
        os.setsid()


def _set_descriptors(streams, is_open):
    """Make the given descriptors 0, 1 and 2, and close all others."""
    high = [os.dup2(stream, 1000 + stream, inheritable=False) for stream in streams]
    for number in (0, 1, 2):
        if is_open[number]:
            os.dup2(high.pop(0), number, inheritable=True)
        else:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
    os.closerange(3, 5000)


def _measure_if_asked(environ):
    """Go on with the measurement of coverage only where a real start would begin one."""
    coverage = sys.modules.get("coverage")
    measured = coverage and coverage.Coverage.current()
    if measured and not any(name.startswith("COVERAGE_PROCESS") for name in environ):
        measured.stop()
        atexit.unregister(measured._atexit)


def _start_nested():
    """Fork a server for what this command starts; returns its channel in the server only."""
    global _is_nested
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        _set_name(SERVER)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        os.close(null)
        return theirs
    theirs.close()
    _servers.clear()
    _servers[TORCH] = ours, ""
    _is_nested = True
    subprocess.Popen = Popen
    handler = sys.modules["torch.distributed.elastic.multiprocessing.subprocess_handler."
                          "subprocess_handler"]  # fmt: skip
    handler.Popen = Popen
    _leave_servers_out()
    return None


def _leave_servers_out():
    """The launcher looks for the workers of torchrun, beside which there is a server here."""
    from ddp_sgd import torchrun

    torchrun.find_workers = without_servers(torchrun.find_workers)


SERVER = "fork server"


def without_servers(find):
    """The same function, which gives numbers of processes, but for those of servers."""

    def find_others(pid):
        found = find(pid)
        return found and [each for each in found if name_of(each) != SERVER]

    return find_others


def _set_name(name):
    if _names:
        (_names / str(os.getpid())).write_text(name)


def name_of(pid):
    """Name of a forked process as ``_name_of`` has it; empty for others."""
    try:
        is_forked = "commands.serve_forever" in Path(f"/proc/{pid}/cmdline").read_text()
        return (_names / str(pid)).read_text() if _names and is_forked else ""
    except OSError:
        return ""


def _name_of(program, environ):
    if {"ddp_sgd.torchrun", "torch.distributed.run"} & {*program[:2]}:
        return "torchrun"
    return f"rank {environ['RANK']}" if environ.get("RANK") else "python"


def _run_to_its_end(program):
    """Run a program and what Python does at the end of one; return the exit code.

    Modules are not taken apart: that would copy the memory that is shared with the server.
    """
    code = 0
    try:
        _run(program)
    except SystemExit as end:
        code = end.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    return code & 0xFF


def _run(program):
    """Run a program as the interpreter does."""
    sys.excepthook = _show_error
    for stream in filter(None, (sys.stdout, sys.stderr)):
        unbuffered = program[0] == "-u" or bool(os.environ.get("PYTHONUNBUFFERED"))
        is_line = stream is sys.stderr or stream.isatty()
        stream.reconfigure(line_buffering=is_line, write_through=unbuffered)
    flag, *rest = program[program[0] == "-u" :]
    sys.orig_argv = [sys.executable, *program]
    sys.argv = rest if flag in ("-m", "-c") else [flag, *rest]
    start = {"-m": os.getcwd(), "-c": ""}.get(flag) if flag in ("-m", "-c") else None
    start = str(Path(flag).resolve().parent) if start is None else start
    sys.path[:0] = [start, *filter(None, os.environ.get("PYTHONPATH", "").split(":"))]
    main = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    sys.modules["__main__"] = main
    if flag == "-m":
        if not hasattr(sys.modules.get(rest[0]), "__path__"):
            sys.modules.pop(rest[0], None)
        runpy._run_module_as_main(rest[0])
        return
    if flag == "-c":
        sys.argv = ["-c", *rest[1:]]
        code = compile(rest[0], "<string>", "exec")
    else:
        main.__file__ = flag
        code = compile(io.open_code(flag).read(), flag, "exec")
    exec(code, main.__dict__)


def _show_error(kind, error, trace):
    """Show an error without the calls of this module, as after a real start."""
    while trace and trace.tb_frame.f_globals is globals():
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)
