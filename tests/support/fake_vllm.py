"""Stands in for vLLM's server where tests need faults: the few answers that a sampler needs, and faults on demand.

    python fake_vllm.py --host H --port P --fault NAME --times N --log TEXT

The fault happens N times over all starts in the same folder, and then no more.
"""

import argparse
import json
import os
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CHAT, LOAD, UNLOAD = "/v1/chat/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PROMPT, COMPLETION = [1, 2, 3], [7, 8, 9]


def happens(times: int) -> bool:
    """One more of the faults that are to happen. Requests come at once, and one may end the process while another
    asks: each fault is a file that exactly one of them creates."""
    for number in range(times):
        try:
            Path(f"fault-{number}").touch(exist_ok=False)
        except FileExistsError:
            continue
        return True
    return False


class Server(BaseHTTPRequestHandler):
    options: argparse.Namespace
    adapters: list[str] = []

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "base"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        fault = self.options.fault
        if self.headers["Authorization"] != f"Bearer {os.environ['VLLM_API_KEY']}":
            self.reply(401, {"error": "Unauthorized"})
        elif self.path == LOAD:
            if fault == "refuses the adapter" and happens(self.options.times):
                self.reply(400, {"error": {"message": "rank 99 is too large"}})
            elif not Path(body["lora_path"], "adapter").is_file():
                self.reply(404, {"error": {"message": "no adapter there"}})
            else:
                self.adapters.append(body["lora_name"])
                self.reply(200, "ok")
        elif self.path == UNLOAD:
            self.adapters.remove(body["lora_name"])
            self.reply(200, "ok")
        elif fault == "dies" and happens(self.options.times):
            print("RuntimeError: the engine broke", flush=True)
            os._exit(3)
        elif fault == "is killed" and happens(self.options.times):
            os.kill(os.getpid(), 9)
        elif fault == "hangs" and happens(self.options.times):
            time.sleep(30)
        elif fault == "breaks off" and happens(self.options.times):
            self.send_response(200)
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b"{")
            self.close_connection = True
        elif fault == "answers 500" and happens(self.options.times):
            self.reply(500, {"error": {"message": "EngineCore encountered\nan issue"}})
        else:
            answer = {
                "model": body["model"],
                "prompt_token_ids": PROMPT,
                "choices": list(map(choice, range(body["n"]))),
            }
            if body["model"] not in self.adapters:
                self.reply(404, {"error": {"message": f"no model {body['model']}"}})
            elif fault == "reads another prompt":
                self.reply(200, answer | {"prompt_token_ids": [1, 2, 4, 5]})
            elif fault == "answers for the base":
                self.reply(200, answer | {"model": "base"})
            elif fault == "samples a vision token":
                self.reply(200, answer | {"choices": [choice(0) | {"token_ids": [7, 99, 9]}] * body["n"]})
            elif fault == "loses a completion":
                self.reply(200, answer | {"choices": answer["choices"][1:]})
            else:
                self.reply(200, answer)

    def reply(self, code: int, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


def choice(index: int) -> dict:
    logprobs = [{"logprob": -0.5 - index} for _ in COMPLETION]
    return {"index": index, "token_ids": COMPLETION, "logprobs": {"content": logprobs}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("--host", "--port", "--fault", "--times", "--log"):
        parser.add_argument(name, type=int if name in ("--port", "--times") else str)
    Server.options = parser.parse_args()
    print(Server.options.log, flush=True)
    if Server.options.fault == "does not start":
        sys.exit("ValueError: the model is broken")
    if Server.options.fault == "starts slowly":
        time.sleep(30)
    ThreadingHTTPServer((Server.options.host, Server.options.port), Server).serve_forever()
