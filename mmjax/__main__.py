"""`python -m mmjax COMMAND ...` is `mmjax COMMAND ...`, also where that is not on PATH."""

from mmjax import cli

if __name__ == "__main__":
    cli.main()
