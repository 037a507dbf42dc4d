"""`python -m vultus` is `vultus`."""

import sys

from vultus.cli.main import main

sys.exit(main())
