"""Fetching images from http and https URLs, never from a private network.

HTTP libraries cannot pin a host to the address that was checked, nor bound the time of a whole request that
comes byte by byte: so this goes through http.client on a socket of its own.
"""

import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, urljoin, urlsplit

MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
PORTS = {"http": 80, "https": 443}
HEADERS = {"Accept": "image/*", "User-Agent": "llava_pitome", "Connection": "close"}
SPECIAL = [  # of single networks and clouds, though (older versions of) ipaddress call them global
    ipaddress.ip_network(net) for net in ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16", "3fff::/20")
]
UNICAST = ipaddress.ip_network("2000::/3")  # all of IPv6 that is routed on the internet


def is_public(address: str) -> bool:
    """Whether an IP address is reachable from the internet: not private, local or reserved."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if not ip.is_global or ip.is_multicast or any(ip in net for net in SPECIAL):
        return False
    if ip.version == 4:
        return True
    embedded = ip.ipv4_mapped or ip.sixtofour
    return ip in UNICAST and (embedded is None or is_public(str(embedded)))


def fetch(url: str, max_bytes: int, seconds: float, is_allowed: Callable[[str], bool] = is_public) -> bytes:
    """Returns what a URL holds.

    The host is resolved once and every address of it is checked. The connection goes to a checked address, so
    that a host that later resolves to another one gains nothing. Redirects are checked alike.

    Args:
        url: http or https.
        max_bytes: of the body.
        seconds: for everything together.
        is_allowed: whether an IP address may be connected to.

    Raises:
        ValueError: another scheme, an address that is not allowed, a status other than 200, a body that is
            too long, or no answer in time.
    """
    deadline = time.monotonic() + seconds
    for _ in range(MAX_REDIRECTS + 1):
        parts = _split(url)
        try:
            body, location = _get(parts, max_bytes, deadline, is_allowed)
        except (OSError, HTTPException) as error:  # a timeout is an OSError
            raise ValueError(f"{url[:200]} cannot be fetched: {error or type(error).__name__}") from error
        if location is None:
            return body
        url = urljoin(url, location)
    raise ValueError(f"{url[:200]} cannot be fetched: more than {MAX_REDIRECTS} redirects")


def _split(url: str) -> SplitResult:
    """Returns the parts of a URL.

    Raises:
        ValueError: it is not http or https, or has a user name or password.
    """
    parts = urlsplit(url)
    if parts.scheme not in PORTS or not parts.hostname:
        raise ValueError(f"{url[:200]!r} is not an http or https URL")
    if parts.username is not None or parts.password is not None:
        raise ValueError("a URL with a user name or password is not fetched")
    return parts


def _get(
    parts: SplitResult, max_bytes: int, deadline: float, is_allowed: Callable[[str], bool]
) -> tuple[bytes, str | None]:
    """Returns the body, and the URL of a redirect."""
    port = parts.port or PORTS[parts.scheme]
    address = _resolve(parts.hostname, port, is_allowed)
    sock = socket.create_connection((address, port), _remaining(deadline))
    current = [sock]
    timer = threading.Timer(_remaining(deadline), _shut_down, [current])  # socket timeouts are per read
    timer.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            sock = context.wrap_socket(sock, server_hostname=parts.hostname, do_handshake_on_connect=False)
            current[0] = sock  # wrapping detaches the plain socket
            sock.do_handshake()
        connection = HTTPConnection(parts.hostname, port)
        connection.default_port = PORTS[parts.scheme]  # so that the Host header leaves it out
        connection.sock = sock
        path = parts.path or "/"
        connection.request("GET", path + (f"?{parts.query}" if parts.query else ""), headers=HEADERS)
        result = _read(parts.hostname, connection.getresponse(), max_bytes)
        _remaining(deadline)
        return result
    finally:
        timer.cancel()
        sock.close()


def _shut_down(current: list[socket.socket]) -> None:
    """Ends the connection that another thread reads from."""
    with suppress(OSError):  # it has ended
        socket.socket.shutdown(current[0], socket.SHUT_RDWR)


def _resolve(host: str, port: int, is_allowed: Callable[[str], bool]) -> str:
    """Returns an IP address of a host. All of the host's addresses must be allowed."""
    addresses = [info[4][0] for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(map(is_allowed, addresses)):
        raise ValueError(
            f"{host} is, or resolves to, an address that is not public; only public ones are fetched"
        )
    return addresses[0]


def _read(host: str, response: HTTPResponse, max_bytes: int) -> tuple[bytes, str | None]:
    """Returns the body, and the URL of a redirect."""
    if response.status in REDIRECTS and response.headers["Location"]:
        return b"", response.headers["Location"]
    if response.status != 200:
        raise ValueError(f"{host} answered {response.status} {response.reason}")
    body = response.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise ValueError(f"{host} sends more than {max_bytes} bytes, which is the limit")
    return body, None


def _remaining(deadline: float) -> float:
    """Returns the seconds until a deadline; raises TimeoutError after it."""
    if (seconds := deadline - time.monotonic()) <= 0:
        raise TimeoutError("it took too long")
    return seconds
