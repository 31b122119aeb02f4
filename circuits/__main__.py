"""`python -m circuits` is the `circuits` command."""

import os
import sys

from circuits.cli.main import main

status = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    # Without the interpreter's teardown, in which a rank was once seen to abort (SIGABRT,
    # "terminate called without an active exception", as
    # in pytorch issue 190489) when its work was done: torchrun then ends the others too, and the
    # first may still be judging.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
