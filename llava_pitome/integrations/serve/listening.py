"""Where a server listens."""

import socket


def port(text: str) -> int:
    """Reads the number of a port."""
    if not 0 <= int(text) <= 65535:
        raise ValueError(text)
    return int(text)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ValueError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ValueError(f"cannot listen at {host} port {port}: {error.strerror or error}") from error


def address(listening: socket.socket) -> str:
    """Where a socket listens, as it stands in a URL."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
