"""Check the address of a server before a model is loaded for it."""

import socket

from mmcoconut.errors import UsageError


def check_can_listen(host: str, port: int | str, *, options: str) -> None:
    """Check that a server can listen at an address.

    Args:
        options: the options of the command that change it, for the message.

    Raises:
        UsageError: the port is in use or no port, or the machine has no such address.
    """
    try:
        with socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except (OSError, OverflowError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"No server at {host}, port {port} ({reason}). Set another {options}.") from error
