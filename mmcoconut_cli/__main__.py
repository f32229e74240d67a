"""Run `mmcoconut` as `python -m mmcoconut_cli`, if the console script is not on the path."""

from mmcoconut_cli.commands import main


if __name__ == "__main__":
    main()
