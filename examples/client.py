"""Asks `examples/serve.py`, or any OpenAI-compatible server, and prints the answer's tokens as they come.

`python examples/client.py "What is a page table?"`: a few seconds on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import time

from openai import OpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", nargs="?", default="What is a page table?")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--new-tokens", type=int, default=60, help="at most")
    arguments = parser.parse_args()

    client = OpenAI(base_url=arguments.url, api_key="none")
    begin = time.perf_counter()
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": arguments.question}],
        max_tokens=arguments.new_tokens,
        temperature=0,
        stream=True,
    )
    times = []
    for part in stream:
        if part.choices and part.choices[0].delta.content:
            times.append(time.perf_counter() - begin)
            print(part.choices[0].delta.content, end="", flush=True)
    print()
    if not times:
        sys.exit("the server sent no text")
    print(json.dumps({"pieces": len(times), "first_token_s": round(times[0], 3), "last_token_s": round(times[-1], 3)}))


if __name__ == "__main__":
    main()
