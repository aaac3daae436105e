"""What the server costs: clients that send one text at a time, beside Model.encode of the same texts at once, in turns.

    python -m tests.bench.serving --model=FOLDER                # an exported folder or a workdir; needs the [serve] extra

Both sides and the clients share this machine's cores, and the clients' HTTP counts against the server. The bar: 0.8 of encode.
"""

import argparse
import base64
import concurrent.futures
import http.client
import json
import re
import statistics
import subprocess
import sys
import urllib.request

import jax
import numpy as np

from moe_embed import load, verb
from tests.bench import ratios, workloads


def main(argv):
    parser = argparse.ArgumentParser(prog="python -m tests.bench.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args(argv)
    texts, model = workloads.mixed_texts(flags.texts), load(flags.model)
    command = [sys.executable, "-m", "moe_embed.serve", f"--model={flags.model}", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            lines = []
            while not (lines and lines[-1].startswith("serving")):
                if not (line := process.stdout.readline()):
                    raise RuntimeError("the server ended before it served")
                lines.append(line)
                ratios.say(line.strip())
            where = lines[-1].split()[-1].removeprefix("http://")
            sides = {"encode": lambda: model.encode(texts), "server": lambda: served(where, texts, flags.clients)}
            direct_ND, over_http_ND = sides["encode"](), sides["server"]()  # compiles
            print(f"the two differ by {np.abs(direct_ND - over_http_ND).max():.1e} at most")
            before = counters(where)
            seconds = ratios.interleaved(sides, rounds=flags.rounds)
            calls, encoding = np.subtract(counters(where), before)
        finally:
            process.terminate()
    for name, values in seconds.items():
        print(
            f"{name}: {', '.join(f'{value:.2f}' for value in values)} s; {len(texts) / statistics.median(values):.1f} texts/s"
        )
    print(
        f"{len(texts) * flags.rounds / calls:.1f} texts a call of encode, in it {encoding / sum(seconds['server']):.2f} of the time"
    )
    print(
        f"server / encode: {ratios.ratio(seconds['encode'], seconds['server']):.2f} ({flags.clients} clients; bar 0.8)"
    )
    for name, fact in ratios.machine(f"jax {jax.__version__}").items():
        print(f"- {name}: {fact}")


def served(where: str, texts, num_clients: int) -> np.ndarray:
    """Vectors of `texts`, each sent alone by one of `num_clients` clients, which keep their connections."""
    found: list[np.ndarray | None] = [None] * len(texts)

    def client(which: int) -> None:
        connection = http.client.HTTPConnection(where)
        for i in range(which, len(texts), num_clients):
            body = json.dumps({"input": texts[i], "encoding_format": "base64"})
            connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
            answer = json.load(connection.getresponse())
            found[i] = np.frombuffer(base64.b64decode(answer["data"][0]["embedding"]), "<f4")
        connection.close()

    with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        list(pool.map(client, range(num_clients)))
    return np.stack(found)


def counters(where: str) -> tuple[float, float]:
    """Calls of encode so far, and seconds in them."""
    text = urllib.request.urlopen(f"http://{where}/metrics", timeout=60).read().decode()
    read = lambda name: float(re.search(rf"^moe_embed_{name} (\S+)$", text, re.MULTILINE)[1])  # noqa: E731
    return read("encode_texts_count"), read("encode_seconds_total")


if __name__ == "__main__":
    verb.run(main)
