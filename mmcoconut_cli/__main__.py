"""`python -m mmcoconut_cli`, where the console script `mmcoconut` is not on the path."""

from mmcoconut_cli.commands import main


if __name__ == "__main__":
    main()
