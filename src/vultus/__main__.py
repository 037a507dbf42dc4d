"""`python -m vultus` runs the command line."""

import sys

from vultus.cli.main import main

sys.exit(main())
