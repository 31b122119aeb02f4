"""`python -m circuits` is the `circuits` command."""

import os
import sys

from circuits.cli.main import main

status = main()
if "TORCHELASTIC_RUN_ID" in os.environ:
    # Skip the interpreter's teardown. A rank was once seen to abort in it (SIGABRT, "terminate
    # called without an active exception", as in pytorch issue 190489) when its work was done, and
    # torchrun then ends the other ranks, although the first may still be evaluating.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
sys.exit(status)
