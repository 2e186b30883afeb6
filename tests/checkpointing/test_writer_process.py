"""The process by itself; how a run uses it is tested in tests/engine/test_writers.py."""

import errno
import os
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing import Pipe

import pytest
from saving import header, names, tensors

from ddp_sgd.checkpointing import writer_process
from ddp_sgd.checkpointing.folder import CheckpointFolder
from ddp_sgd.checkpointing.packing import pack
from ddp_sgd.checkpointing.reading import read_tensors
from ddp_sgd.checkpointing.writer_process import Destination, Packed, main


def serve(messages, monkeypatch):
    """What the process answers to messages; whoever stops in between is gone."""
    said, say = Pipe(duplex=False)
    hear, told = Pipe(duplex=False)
    descriptors = os.dup(said.fileno()), os.dup(told.fileno())
    monkeypatch.setattr(writer_process, "serve_the_rank", lambda: descriptors)
    with said, told:
        for message in messages:
            say.send(message)
        say.close()
        main()
    answers = []
    with hear, suppress(EOFError):
        while True:
            answers.append(hear.recv())
    return answers


@pytest.mark.parametrize("ending", [[None], []])
def test_each_checkpoint_is_written_and_answered_in_order(ending, tmp_path, monkeypatch):
    packed = [Packed(header(step), pack(header(step), tensors(step))) for step in (1, 2, 3)]
    start = time.perf_counter()
    answers = serve([Destination(tmp_path, 2), *packed, *ending], monkeypatch)
    assert [answer.file for answer in answers] == [f"step-{step:08d}.pt" for step in (1, 2, 3)]
    moments = [start, *(answer.end for answer in answers), time.perf_counter()]
    assert moments == sorted(moments)
    folder = CheckpointFolder(tmp_path)
    assert [entry.header.step for entry in folder.manifests()] == [2, 3]
    assert read_tensors(tmp_path / answers[2].file)["model"]["weight"][0] == 3
    assert answers[2].num_bytes == (tmp_path / answers[2].file).stat().st_size


def test_what_fails_is_answered_and_the_next_one_is_written(tmp_path, monkeypatch):
    write = writer_process.write_content

    def fail_once(folder, header, content, *, keep):
        if header.step == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(folder, header, content, keep=keep)

    monkeypatch.setattr(writer_process, "write_content", fail_once)
    packed = [Packed(header(step), pack(header(step), tensors(step))) for step in (1, 2)]
    failed, written = serve([Destination(tmp_path, 2), *packed, None], monkeypatch)
    assert (type(failed), failed.errno) == (OSError, errno.ENOSPC)
    assert written.file == "step-00000002.pt"
    assert names(tmp_path) == {"step-00000002.pt", "step-00000002.json", "last"}


def test_it_needs_no_torch():
    look = "import sys, ddp_sgd.checkpointing.writer_process as _; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
