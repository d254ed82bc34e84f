"""`python -m isofusion.train`: one run of a locked study, on one process or under torchrun."""

import sys

from isofusion.train.launch import main

if __name__ == "__main__":
    sys.exit(main())
