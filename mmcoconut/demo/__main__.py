"""`python -m mmcoconut.demo`."""

from mmcoconut.errors import run_command


def main(argv: list[str] | None = None) -> None:
    from mmcoconut.demo import page  # here, because it imports gradio, an extra

    page.main(argv)


if __name__ == "__main__":
    run_command(main)
