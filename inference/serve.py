"""Serve a LLaDA checkpoint: OpenAI's API for programs, and a page for people.

    /v1/chat/completions, /v1/completions (with `suffix`: infill), /v1/models    as OpenAI's, `stream` too
    /                     chat, infill, replay, comparison
    /health, /metrics     for whoever watches the server

Sampler settings may stand in a request's body beside OpenAI's fields. With LLADA_API_KEY in the environment,
requests need it as their API key. The server listens on this machine only, unless --host says otherwise.
After SIGTERM accepted requests are answered. More: docs/serving.md.

Run:
    python inference/serve.py --model_name_or_path runs/quickstart/sft --gen_length 64 --block_length 32
    python inference/serve.py --model_name_or_path models/LLaDA-8B-Instruct --gen_length 256 \\
        --block_length 32 --parallel_decoding factor --cache dual --port 8000
"""

import os
from dataclasses import dataclass

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.inference.sampler_flags import ModelFlags, SamplerFlags, sampler_settings


@dataclass(kw_only=True)
class Config(ModelFlags, SamplerFlags):
    """The server. The sampler's flags are the defaults of every request."""

    served_model_name: str | None = flag(None, "Name in the API; default the checkpoint's path.")
    host: str = flag("127.0.0.1", "Address to listen on; 0.0.0.0: every network of this machine.")
    port: int = flag(8000, "Port to listen on; 0: any free one.", at_least=0, at_most=65535)
    max_batch_size: int | None = flag(
        None, "Answers generated together; default 32, on a CPU 16, whose caches hold no more.", at_least=1
    )
    max_queue: int = flag(256, "Requests that may wait; more are refused with status 429.", at_least=1)
    shutdown_timeout: int = flag(60, "Seconds that accepted requests have after SIGTERM.", at_least=0)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import uvicorn

from llada.models.building import load_for_inference
from llada.run import start_run
from llada.serving.app import Service


def make_service(config: Config) -> Service:
    """The model and the tokenizer of the flags behind OpenAI's API."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "serve.py is one process; start one server for each GPU (CUDA_VISIBLE_DEVICES, --port)"
        )
    run = start_run(config.device)
    settings = sampler_settings(config)
    model, tokenizer = load_for_inference(**config.to_load(), chat=False, device=run.device)
    return Service(
        model,
        tokenizer,
        settings,
        name=config.served_model_name or config.model_name_or_path,
        max_batch_size=config.max_batch_size or (16 if run.device.type == "cpu" else 32),
        max_queue=config.max_queue,
        api_key=os.environ.get(
            "LLADA_API_KEY"
        ),  # not a flag: a command line can be read by every user of the machine
    )


def main(argv: list[str] | None = None) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    config = parse(Config, argv, description=__doc__)
    service = make_service(config)
    uvicorn.run(
        service.app(),
        host=config.host,
        port=config.port,
        log_level="info",
        timeout_graceful_shutdown=config.shutdown_timeout,
    )


if __name__ == "__main__":
    run_main(main)
