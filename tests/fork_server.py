"""Forks processes that have torch and the package already; see the fixture `processes`.

Reads jobs from its input, one JSON object a line: `words` (what would follow `python`: a file or
`-m` and a module, and arguments), `count`, `cwd`, and `log`, a folder for their output. Answers
each with one line, the list of their exit codes.
"""

import json
import os
import runpy
import signal
import socket
import sys
import traceback

import torch

import ddim_schedulers.pipelines
import ddim_schedulers.training.likelihood.calibration
import ddim_schedulers.training.trainer.trainer  # noqa: F401  # forked processes have them ready

torch.set_num_threads(1)


def free_port():
    with socket.socket() as open_socket:
        open_socket.bind(("127.0.0.1", 0))
        return open_socket.getsockname()[1]


def work(job, rank, port):
    """Becomes process `rank` of a job; never returns."""
    signal.alarm(600)  # ends a process that waits for another for ever
    code = 1
    try:
        os.chdir(job["cwd"])
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "out"), (2, "err")):
            path = os.path.join(job["log"], f"{rank}.{name}")
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
        if job["count"] > 1:  # the variables that torchrun sets
            size = str(job["count"])
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size}
            os.environ |= {"LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(port)
        words = job["words"]
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


for line in sys.stdin:
    job, port = json.loads(line), free_port()
    pids = []
    for rank in range(job["count"]):
        pids.append(os.fork())
        if pids[-1] == 0:
            work(job, rank, port)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    print(json.dumps(codes), flush=True)
