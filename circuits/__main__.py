"""`python -m circuits` is the `circuits` command."""

import sys

from circuits.cli import main

sys.exit(main())
