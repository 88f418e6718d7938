"""See `sanitize`."""

import sys

from workbench.kernels.native.sanitize import main

sys.exit(main())
