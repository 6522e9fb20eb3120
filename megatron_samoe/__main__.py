"""`python -m megatron_samoe COMMAND ...`, also under torchrun."""

import sys

from megatron_samoe.cli.command import main

if __name__ == "__main__":
    sys.exit(main())
