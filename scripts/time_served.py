#!/usr/bin/env python3
"""Times a server that speaks OpenAI's completions, with one client: first token, tokens per second, and a prefix that is kept.

    scripts/time_served.py PORT [--words 80] [--tokens 96] [--requests 4] [--prefix WORDS] -- COMMAND…

Starts COMMAND, which is to listen on PORT, waits for /health, asks once to warm up, and stops it at the end. Texts are common words in an order
that differs from request to request.
"""
import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

WORDS = """time year people way day man thing woman life child world school state family student group country problem hand
part place case week company system program question work""".split()


def text(n, seed):
    return " ".join(WORDS[(i * 7 + seed * 13 + i // 5) % len(WORDS)] for i in range(n))


class Server:
    def __init__(self, port, command):
        self.base = f"http://127.0.0.1:{port}"
        self.log = open(f"/tmp/time-served-{port}.log", "wb")
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self.model = None

    def wait(self, seconds):
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.process.poll() is None:
            try:
                if urllib.request.urlopen(self.base + "/health", timeout=2).status == 200:
                    models = json.load(urllib.request.urlopen(self.base + "/v1/models", timeout=10))
                    self.model = models["data"][0]["id"]
                    return
            except OSError:
                pass
            time.sleep(0.2)
        sys.exit(f"the server did not start; its output is in {self.log.name}")

    def ask(self, prompt, tokens):
        """Seconds to the first text, tokens per second after it, tokens of the prompt."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
        body["stream_options"] = {"include_usage": True}
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + "/v1/completions", json.dumps(body).encode(), headers)
        start, first, last, usage = time.monotonic(), None, None, {}
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                for line in answer:
                    if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if event.get("choices") and event["choices"][0].get("text"):
                        last = time.monotonic()
                        first = first or last
                    usage = event.get("usage") or usage
        except urllib.error.HTTPError as e:
            sys.exit(f"refused: {e.read()[:500].decode(errors='replace')}")
        if first is None:
            sys.exit("an answer without text")
        made = usage.get("completion_tokens", 0)
        rate = (made - 1) / (last - first) if made > 1 and last > first else 0.0
        return first - start, rate, usage.get("prompt_tokens")

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("port", type=int)
    a.add_argument("--words", type=int, default=80, help="of each prompt")
    a.add_argument("--tokens", type=int, default=96, help="of each answer")
    a.add_argument("--requests", type=int, default=4)
    a.add_argument("--prefix", type=int, default=0, help="words of a beginning that three more prompts share")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, command = a.parse_args(sys.argv[1:at]), sys.argv[at + 1:]
    if not command:
        a.error("no command to start the server with")
    server = Server(args.port, command)
    try:
        server.wait(180)
        server.ask(text(20, 1), 8)
        runs = [server.ask(text(args.words, 10 + i), args.tokens) for i in range(args.requests)]
        middle = len(runs) // 2
        first, rate = (sorted(run[k] for run in runs)[middle] for k in (0, 1))
        print(f"first token {first * 1e3:.0f} ms (about {runs[0][2]} tokens), {rate:.1f} tokens/s, medians of {len(runs)}")
        if args.prefix:
            shared = text(args.prefix, 3)
            runs = [server.ask(shared + end, 4) for end in (" and so", " and then it was", " but never again")]
            times = ", ".join(f"{run[0] * 1e3:.0f}" for run in runs)
            print(f"prefix of {runs[0][2]} tokens: first token {times} ms, the first time new")
    finally:
        server.stop()


main()
