"""The model of engines, links and requests: every figure that a run stands on, with its source.

The same with and without lending. Model, lengths, rates and the cap were chosen while the
simulator was built, by trying what makes memory and not arithmetic the limit of an instance:
lending gains only there. With requests that all instances share evenly, or that leave memory
free, it gains little or nothing, as `uniform` shows.

| what | value | source |
|---|---|---|
| model | LLaMA2-70B, fp16: 69e9 weights, 80 layers, 8 KV heads of 128 | arXiv 2307.09288 |
| KV of a token | 2 x 80 x 8 x 128 x 2 bytes = 327,680 | from the line above |
| instance | 4 A100 of 80 GB: each 2039 GB/s, 312 TFLOPS | NVIDIA's data sheet |
| of these in use | 0.8 of the bandwidth, 0.6 of the TFLOPS | assumed |
| memory for KV | 0.9 x 320 GB - 138 GB of weights - 8 GB | vLLM's default of 0.9; 8 GB assumed |
| a step | layers x (W(b)/f(b) + sum S_r/g(S)) | Infinite-LLM, arXiv 2401.02669 |
| links | same host 32 GB/s, 5 us; rack 25 GB/s, 10 us; far 12.5 GB/s, 50 us | PCIe 4.0 x16; HDR |
| | | InfiniBand; 100 GbE; latencies assumed |
| a card | one payload at a time; the one that has waited longest among those | ours; real ones |
| | whose other end is free, too | share |
| prefill | on instances of its own, 6,000 tokens/s for what was preempted; KV | Splitwise, arXiv |
| | comes at 25 GB/s | 2311.18677; the rate is assumed |
| short requests | prompt log-normal, median 100, mean 161; output log-normal, | ShareGPT's means: |
| | median 250, mean 338, at most 2,048 | arXiv 2309.06180; medians assumed |
| long requests | 8 in 1,000: prompt log-uniform, 220k to 300k: fits an | Infinite-LLM: up to |
| | instance, but not twice; output as of the short ones | 2000k tokens; the range is ours |
| uniform lengths | all: prompt 3,500, output 338, which fills most of the memory | ours |
| longest requests | 1 in 100,000: prompt 500k to 1M, more than an instance holds | likewise |
| where they arrive | short ones at all instances, long ones at every second: some have | assumed |
| | the clients with long documents, and engines keep to their clients | |
| arrivals | Poisson, 9 a second and instance: two thirds of what it could decode | assumed |
| lent at most | 0.7 of a node's memory | short requests leave more than that free |
| counted | after a quarter of the time, in which the instances fill | |

Attention over lent KV is computed where the KV lies (DistAttention), so a creditor pays for
it with its own steps, and a debtor waits for the slowest of its parts and for the links.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kvfabric.simulation.network import LinkClass, Links

LINKS = Links(
    host=LinkClass("host", 5e-6, 32e9),
    rack=LinkClass("rack", 10e-6, 25e9),
    far=LinkClass("far", 50e-6, 12.5e9),
)


@dataclass(frozen=True, slots=True)
class Engine:
    """A serving instance: model, device, and how it is filled."""

    weights: float = 69.0e9
    layers: int = 80
    kv_values: int = 8 * 128  # of K, and as many of V, per layer and token
    bytes_per_value: int = 2
    device_bytes: float = 4 * 80e9
    memory_used: float = 0.9
    spared_bytes: float = 8e9
    bytes_per_s: float = 4 * 2039e9 * 0.8
    flops: float = 4 * 312e12 * 0.6
    most_running: int = 256  # vLLM's default limit of sequences in a batch
    prefill_tokens_per_s: float = 6000.0
    fill_bytes_per_s: float = 25e9

    @property
    def token_bytes(self) -> int:
        """KV of one token."""
        return 2 * self.layers * self.kv_values * self.bytes_per_value

    @property
    def weight_bytes(self) -> float:
        return self.weights * self.bytes_per_value

    @property
    def kv_bytes(self) -> int:
        """Memory for KV."""
        return int(self.device_bytes * self.memory_used - self.weight_bytes - self.spared_bytes)

    @property
    def seconds_per_batched(self) -> float:
        """What each further sequence costs a step once arithmetic, not memory, is the limit."""
        return 2 * self.weights / self.flops

    @property
    def least_step_s(self) -> float:
        """Reading the weights once."""
        return self.weight_bytes / self.bytes_per_s

    @property
    def seconds_per_token(self) -> float:
        """What each token of KV attended costs a step."""
        return self.token_bytes / self.bytes_per_s

    def step_s(self, batch: float, tokens: float) -> float:
        """One decode step, all layers: layers x (W(b)/f(b) + sum S_r/g(S))."""
        linear_s = max(self.least_step_s, batch * self.seconds_per_batched)
        return linear_s + tokens * self.seconds_per_token


@dataclass(frozen=True, slots=True)
class Lengths:
    """A distribution of token counts: constant, log-normal or log-uniform."""

    kind: str
    low: float  # constant, median, or the lower end
    high: float = 0.0  # nothing, mean, or the upper end
    most: int = 1 << 40  # longer ones are cut

    @property
    def mean(self) -> float:
        if self.kind == "log-normal":
            return self.high
        if self.kind == "log-uniform":
            return (self.high - self.low) / math.log(self.high / self.low)
        return self.low

    def at(self, uniform: float, normal: float) -> int:
        """The length for one draw of a uniform (0 to 1) and of a normal variable."""
        if self.kind == "log-normal":
            sigma = math.sqrt(2 * math.log(self.high / self.low))
            return min(self.most, max(1, round(self.low * math.exp(sigma * normal))))
        if self.kind == "log-uniform":
            return int(self.low * math.exp(uniform * math.log(self.high / self.low)))
        return round(self.low)


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of one kind, and their share of all; the last kind is all that is left."""

    name: str
    share: float
    prompt: Lengths
    output: Lengths
    instances: float = 1.0  # the share of instances at which they arrive


@dataclass(frozen=True, slots=True)
class Workload:
    """What arrives: kinds of requests, so many a second at every instance."""

    name: str
    kinds: tuple[Kind, ...]
    per_second: float


SHORT_PROMPT = Lengths("log-normal", 100, 161)
OUTPUT = Lengths("log-normal", 250, 338, most=2048)

MIXED = Workload(
    "mixed",
    (
        Kind("longest", 0.00001, Lengths("log-uniform", 500_000, 1_000_000), OUTPUT, 0.5),
        Kind("long", 0.008, Lengths("log-uniform", 220_000, 300_000), OUTPUT, 0.5),
        Kind("short", 1.0, SHORT_PROMPT, OUTPUT),
    ),
    per_second=9.0,
)
UNIFORM = Workload(
    "uniform",
    (Kind("equal", 1.0, Lengths("constant", 3_500), Lengths("constant", 338)),),
    per_second=7.0,
)
WORKLOADS = {each.name: each for each in (MIXED, UNIFORM)}


@dataclass(frozen=True, slots=True)
class Setup:
    """One run's choices."""

    nodes: int = 16
    sequences: int = 8000  # over the run
    seed: int = 1
    workload: Workload = MIXED
    lending: bool = True
    engine: Engine = field(default_factory=Engine)
    block_tokens: int = 512
    quantum_s: float = 0.25  # engines are looked at so often
    heartbeat_s: float = 0.5
    silence_s: float = 5.0
    cap_share: float = 0.7  # of its memory, which a node lends at most
    patience_s: float = 4.0  # how long room is sought at other nodes before somebody has to go
    nodes_per_host: int = 2
    hosts_per_rack: int = 8

    @property
    def block_bytes(self) -> int:
        return self.block_tokens * self.engine.token_bytes

    @property
    def window_s(self) -> float:
        """How long requests arrive."""
        return self.sequences / (self.nodes * self.workload.per_second)

    @property
    def warm_s(self) -> float:
        """From when on tokens are counted."""
        return self.window_s / 4
