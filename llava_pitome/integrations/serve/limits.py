"""What one request, and all of them together, may ask of the server."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; every one that is crossed is answered with a 4xx that names it.

    Attributes:
        body: bytes of a request, pictures in base64 among them; also of all pictures fetched for it.
        picture: bytes of one picture, decoded or fetched.
        pixels: of all pictures of one request together.
        pictures: in one request.
        prompt: tokens of a prompt, image tokens among them; also texts and pictures in one request.
        answer: tokens that may be asked for.
        queue: requests that are answered or wait at one time.
        urls: whether pictures are fetched from http and https addresses; never from private ones.
        seconds: that sending a request, or fetching all of its pictures, may take.

    Raises:
        ValueError: a number below 1.
    """

    body: int = 32 * 2**20
    picture: int = 16 * 2**20
    pixels: int = 40_000_000
    pictures: int = 16
    prompt: int = 4096
    answer: int = 1024
    queue: int = 64
    urls: bool = False
    seconds: float = 30.0

    def __post_init__(self) -> None:
        """Checks every number where the value is made."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "urls" and not value >= 1:
                raise ValueError(f"{field.name}={value} is not allowed: it must be at least 1")
