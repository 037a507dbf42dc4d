"""`python -m vultus` is `vultus`."""

import sys

from vultus.cli import main

sys.exit(main())
