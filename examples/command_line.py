"""What the training examples share on the command line."""

import argparse
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm


def integer(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(
                f"expected an integer from {low} to {high}; got {text!r}"
            )
        return int(text)

    return parse


def progress_bar(total: int, num_done: int, *, disable: bool = False) -> tqdm:
    """It fits a terminal of 80 columns, and writes little to a log."""
    # Left to itself tqdm shows no bar in a terminal that does not know its size.
    num_columns, num_rows = shutil.get_terminal_size()
    return tqdm(
        total=total,
        initial=num_done,
        desc="compiling",
        ncols=num_columns - 1,
        nrows=num_rows,
        mininterval=0.1 if sys.stderr.isatty() else 2,
        bar_format="{desc} |{bar}| {remaining}",
        disable=disable,
    )


def run_resumable(
    run: Callable[[argparse.Namespace], None], args: argparse.Namespace
) -> None:
    """Run to the end or to an error of one line; if interrupted say how to go on."""
    try:
        run(args)
    except KeyboardInterrupt:
        print(
            "\nInterrupted; --resume goes on from the last checkpoint.", file=sys.stderr
        )
        sys.exit(128 + signal.SIGINT)  # As a shell reports it.
    except OSError as error:  # A full disk, a folder that cannot be written to.
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")
