"""`python -m vllm_dlm watch URL "prompt"` shows in a terminal how a canvas on a server is filled."""

import sys

from vllm_dlm.view.terminal import main

COMMANDS = {"watch": main}

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        sys.exit('usage: python -m vllm_dlm watch URL "prompt" [options]; --help lists the options')
    sys.exit(COMMANDS[sys.argv[1]](sys.argv[2:]))
