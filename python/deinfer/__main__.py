"""`python -m deinfer`: the same as the `deinfer` command."""

from deinfer.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
