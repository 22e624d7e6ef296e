"""The program: `prefopt` and `python -m prefopt`."""

from __future__ import annotations

from prefopt.process import collect_rarely, start_over_on_a_whole_heap


def program() -> int:
    """Run the command of this process, which begins anew here; within another program call `prefopt.cli.main`."""
    start_over_on_a_whole_heap()
    collect_rarely()
    from prefopt.cli import main

    return main()


if __name__ == "__main__":
    raise SystemExit(program())
