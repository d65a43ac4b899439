"""Pictures from http and https addresses, never from inside the network that the server stands in."""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, urljoin, urlsplit

REDIRECTS = 3
WITHIN = [  # of single networks and clouds, though ipaddress (or an older one) has them as global
    ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16", "3fff::/20")
]
UNICAST = ipaddress.ip_network("2000::/3")  # of IPv6, all that is routed on the internet
PORTS = {"http": 80, "https": 443}
REDIRECTING = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether an IP address is one that anybody could reach: not private, local or reserved."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if not found.is_global or found.is_multicast or any(found in net for net in WITHIN):
        return False
    if found.version == 4:
        return True
    inside = found.ipv4_mapped or found.sixtofour
    return found in UNICAST and (inside is None or is_public(str(inside)))


def fetch(url: str, most: int, seconds: float, allowed: Callable[[str], bool] = is_public) -> bytes:
    """What an address holds.

    The name is resolved once, every address it has is checked, and the connection goes to the one that was
    checked: a name that later resolves to another address gains nothing. So does each redirect.

    Args:
        url: http or https.
        most: bytes that are read.
        seconds: for all of it.
        allowed: which IP addresses may be asked.

    Raises:
        ValueError: another scheme, an address that is not allowed, an answer that is no 200 or too long, or
            none in time.
    """
    until = time.monotonic() + seconds
    for _ in range(REDIRECTS + 1):
        parts = _split(url)
        try:
            found = _get(parts, most, until, allowed)
        except (OSError, HTTPException) as error:  # a time-out is an OSError
            raise ValueError(f"{url[:200]} cannot be fetched: {error or type(error).__name__}") from error
        if isinstance(found, bytes):
            return found
        url = urljoin(url, found)
    raise ValueError(f"{url[:200]} was reached by more than {REDIRECTS} redirects")


def _split(url: str) -> SplitResult:
    """The parts of an address.

    Raises:
        ValueError: it is no http or https address, or holds a user's name.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{url[:200]!r} is no http or https address")
    if parts.username is not None or parts.password is not None:
        raise ValueError("an address with a user's name or password in it is not fetched")
    return parts


def _get(parts: SplitResult, most: int, until: float, allowed: Callable[[str], bool]) -> bytes | str:
    """The body, or where a redirect points."""
    port = parts.port or PORTS[parts.scheme]
    address = _checked(parts.hostname, port, allowed)
    sock = socket.create_connection((address, port), _left(until))
    open_now = [sock]
    clock = threading.Timer(_left(until), _cut, [open_now])  # also ends an answer that comes byte by byte
    clock.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
            open_now[0] = sock  # wrapping takes the connection away from the plain one
            sock.do_handshake()
        connection = HTTPConnection(parts.hostname, port)
        connection.default_port = PORTS[parts.scheme]  # which is not said in the Host line
        connection.sock = sock
        path = parts.path or "/"
        connection.request("GET", path + (f"?{parts.query}" if parts.query else ""), headers=HEADERS)
        found = _read(parts.hostname, connection.getresponse(), most)
        _left(until)
        return found
    finally:
        clock.cancel()
        sock.close()


def _cut(open_now: list[socket.socket]) -> None:
    """Ends the connection that another thread waits for."""
    with suppress(OSError):  # it has ended by itself
        socket.socket.shutdown(open_now[0], socket.SHUT_RDWR)


HEADERS = {"Accept": "image/*", "User-Agent": "llava_pitome", "Connection": "close"}


def _checked(host: str, port: int, allowed: Callable[[str], bool]) -> str:
    """One of the IP addresses of a host, all of which are allowed."""
    addresses = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(allowed(address) for address in addresses):
        raise ValueError(f"{host} is, or resolves to, an address that is not public; such are never fetched")
    return addresses[0]


def _read(host: str, response: HTTPResponse, most: int) -> bytes | str:
    """The body of an answer, not more of it than is allowed."""
    if response.status in REDIRECTING and response.headers["Location"]:
        return response.headers["Location"]
    if response.status != 200:
        raise ValueError(f"{host} answered {response.status} {response.reason}")
    body = response.read(most + 1)
    if len(body) > most:
        raise ValueError(f"{host} sends more than {most} bytes, the most that is read")
    return body


def _left(until: float) -> float:
    """Seconds that are left.

    Raises:
        TimeoutError: none.
    """
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return left
