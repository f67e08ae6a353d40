"""A running server under load: the same answers as one by one, how much faster, and what memory does.

Prompts cut to ragged lengths are asked one after the other, then all at once; the answers must be equal. Then
--num_requests more go out, --concurrency at a time, and the server's memory is read from /metrics on the way.

Run:
    python inference/serve.py --model_name_or_path runs/quickstart/sft --gen_length 32 --block_length 32 &
    python scripts/benchmarks/bench_serving.py --prompts_file runs/quickstart/data/heldout.jsonl
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of this script."""

    base_url: str = flag("http://127.0.0.1:8000", help="Where the server listens.")
    prompts_file: str = flag(help="JSONL of records with a `prompt`.", reads="path")
    concurrency: int = flag(64, help="Requests at once.", at_least=1)
    num_requests: int = flag(2000, help="Requests of the memory trial.", at_least=1)
    max_tokens: int = flag(
        32, help="Longest answer asked for; a third of the requests asks for half of it.", at_least=1
    )


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import httpx

from llada.data.records import read_records


async def ask(client: httpx.AsyncClient, prompt: str, max_tokens: int) -> str:
    """One answer; raises for any status but 200."""
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": max_tokens}
    reply = await client.post("/v1/chat/completions", json=body)
    reply.raise_for_status()
    return reply.json()["choices"][0]["message"]["content"]


async def memory(client: httpx.AsyncClient) -> float:
    """Resident memory of the server in MB."""
    text = (await client.get("/metrics")).text
    return float(re.search(r"^process_resident_memory_bytes (\S+)", text, re.MULTILINE)[1]) / 1e6


async def measure(config: Config) -> dict[str, object]:
    """Seconds one by one and at once, whether the answers agree, and memory every tenth of the requests."""
    prompts = [record["prompt"] for _, record in read_records(config.prompts_file)]
    jobs = []
    for i in range(max(config.concurrency, config.num_requests)):
        prompt = prompts[i % len(prompts)]
        ragged = prompt[: len(prompt) * (4 - i % 4) // 4]  # the quickstart's are all of one length
        jobs.append((ragged, config.max_tokens // 2 if i % 3 == 0 else config.max_tokens))
    limits = httpx.Limits(max_connections=config.concurrency)
    async with httpx.AsyncClient(base_url=config.base_url, timeout=600, limits=limits) as client:
        first = jobs[: config.concurrency]
        await ask(client, *first[0])  # the first forward of a process is slower
        started = time.perf_counter()
        alone = [await ask(client, *job) for job in first]
        one_by_one = time.perf_counter() - started
        started = time.perf_counter()
        together = await asyncio.gather(*(ask(client, *job) for job in first))
        at_once = time.perf_counter() - started
        room = asyncio.Semaphore(config.concurrency)

        async def guarded(job: tuple[str, int]) -> str:
            async with room:
                return await ask(client, *job)

        levels = [await memory(client)]
        size = max(1, config.num_requests // 10)
        for start in range(0, config.num_requests, size):
            await asyncio.gather(*map(guarded, jobs[start : start + size]))
            levels.append(await memory(client))
    return {
        "requests": len(first),
        "equal": sum(a == b for a, b in zip(alone, together, strict=True)),
        "one_by_one_s": round(one_by_one, 2),
        "at_once_s": round(at_once, 2),
        "speed_up": round(one_by_one / at_once, 2),
        "memory_mb": [round(level) for level in levels],
    }


def main(argv: list[str] | None = None) -> None:
    """Prints one JSON object."""
    print(json.dumps(asyncio.run(measure(parse(Config, argv, description=__doc__)))))


if __name__ == "__main__":
    run_main(main)
