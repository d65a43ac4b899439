"""How the server ends: at once for those who wait, with the next token for who is being answered."""

import socket
import sys

import uvicorn

from llava_pitome.integrations.serve.guard import Guard


class Server(uvicorn.Server):
    """Uvicorn's, which would first work off everything that waits."""

    def __init__(self, config: uvicorn.Config, guard: Guard):
        """Serves what stands behind a guard."""
        super().__init__(config)
        self._guard = guard

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Ends all answers, and then as uvicorn does."""
        if self._guard.answering:
            sys.stderr.write(f"ending; {self._guard.answering} requests get a 503 instead of an answer\n")
        self._guard.close()
        await super().shutdown(sockets)
