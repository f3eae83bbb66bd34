"""`python -m cbd_hf` is `cbd`."""

from cbd_hf.cli import run


if __name__ == "__main__":
    run()
