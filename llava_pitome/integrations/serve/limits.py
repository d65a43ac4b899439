"""The limits of the server, for one request and for all of them together."""

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds on requests. A request that exceeds one gets a 4xx whose message names it.

    Attributes:
        request_bytes: of a request, base64 images included; also of all images fetched for it.
        image_bytes: of one image, decoded or fetched.
        pixels: of all images of a request together.
        images: in a request.
        prompt_tokens: of a prompt, image tokens included; also text and image parts in a request.
        new_tokens: that an answer may have.
        queue: requests that are answered or wait at a time.
        fetch_urls: whether images are fetched from http and https URLs; private addresses never are.
        seconds: for receiving a request, and for fetching all of its images.

    Raises:
        ValueError: a number below 1.
    """

    request_bytes: int = 32 * 2**20
    image_bytes: int = 16 * 2**20
    pixels: int = 40_000_000
    images: int = 16
    prompt_tokens: int = 4096
    new_tokens: int = 1024
    queue: int = 64
    fetch_urls: bool = False
    seconds: float = 30.0

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "fetch_urls" and not value >= 1:
                raise ValueError(f"{field.name}={value} is not allowed: it must be at least 1")
