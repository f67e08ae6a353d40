"""A server on a port of its own, for the tests of the API and of the page."""

import threading
import time

import uvicorn

from llada.models.tokens import load_tokenizer
from llada.serving.app import Service
from modelling_final import LLaDAGenerationConfig

LENGTH, BLOCK = 16, 8


class Server:
    """A service in a thread."""

    def __init__(self, service):
        self.service = service
        self.server = uvicorn.Server(uvicorn.Config(service.app(), port=0, log_level="error", lifespan="on"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self):
        self.server.should_exit = True
        self.thread.join()


def serve(model, model_dir, **options):
    """A running server of `model` named "tiny"."""
    settings = LLaDAGenerationConfig(gen_length=LENGTH, block_length=BLOCK)
    tokenizer = load_tokenizer(str(model_dir), chat=True)
    return Server(Service(model, tokenizer, settings, **{"name": "tiny"} | options))


def wait_for(condition, seconds=20):
    """Waits until something is so; fails if it is not after a while."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)
