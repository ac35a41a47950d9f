"""``python -m retrainscope`` is the ``retrainscope`` command."""

import sys

from retrainscope.cli import main

if __name__ == "__main__":
    sys.exit(main())
