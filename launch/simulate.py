"""What a step costs on N GPUs: arithmetic, memory traffic, collectives, stragglers, failures.

A roofline with a few constants a cluster (`Rates`), fitted by benchmarks/estimator.py to published
rows of FSDP and tested on rows that no fit saw. `tuneloom plan` takes what failures cost from here
(`plan.storage_gb_s`) and no speed: it reports given and measured ones. This answers what many nodes
make of one.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tuneloom.launch.traffic import zero_elements


@dataclass(frozen=True)
class Cluster:
    """Per GPU: bytes a second inside a node and between nodes, FLOP/s of the data sheet."""

    peak: float
    node: float
    network: float
    gpus_per_node: int = 8

    def link(self, ranks: int) -> float:
        """Bytes a second of a ring over `ranks`: it enters a node once, over all its adapters."""
        if ranks <= self.gpus_per_node:
            return self.node
        return min(self.node, self.gpus_per_node * self.network)


# Data sheets: dense bf16; NVLink one way, rings reach 0.8 of it; 400 or 200 Gb/s of network a GPU.
CLUSTERS = {
    "h100-80": Cluster(peak=989e12, node=360e9, network=50e9),
    "a100-80": Cluster(peak=312e12, node=240e9, network=25e9),
    "a100-40": Cluster(peak=312e12, node=240e9, network=25e9),
}


@dataclass(frozen=True)
class Rates:
    """What a code base reaches, as a fit finds it."""

    matmul: float
    """Share of peak in matrix products."""
    attention: float
    """Share of peak in attention."""
    elementwise: float
    """Seconds a token, layer and unit of width spend in norms, activations, residuals; one pass."""
    weights: float
    """Seconds waited a second of ideal traffic: collectives that are not hidden, and all else that
    a micro-batch does once a weight (casts from fp32, fp32 reductions), so it may be above 1."""
    noise: float = 0.0
    """Standard deviation of one rank's step time over its mean: what the slowest rank adds."""


@dataclass(frozen=True)
class Work:
    """One rank's micro-batch of a model that is trained whole, or frozen under adapters."""

    layers: int
    width: int
    linear: int
    """Parameters in matrix products, the head included."""
    parameters: int
    """All parameters: what ZeRO-3 gathers."""
    length: int
    tokens: int
    """Of one micro-batch on one rank."""
    accumulation: int
    recompute: bool
    frozen: bool = False
    adapters: int = 0
    stage: int = 3
    software: Literal["deepspeed", "fsdp"] = "deepspeed"
    """Whose collectives: DeepSpeed's as train/zero.py sets it, or FSDP's, of the published rows."""


@dataclass(frozen=True)
class Step:
    """Seconds of one optimizer step."""

    compute: float
    exposed: float
    """Traffic that computation does not hide: all of it at the rates of published rows (weights of
    1.18). Rates fitted with all of it hidden are 9.1 % off on many nodes, these 1.6 %."""
    waiting: float
    """For the slowest rank."""

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.waiting


def step(work: Work, cluster: Cluster, rates: Rates, *, ranks: int) -> Step:
    """One optimizer step of `ranks` GPUs."""
    micro = compute_seconds(work, cluster, rates)
    traffic = traffic_bytes(work, ranks=ranks) / cluster.link(ranks)
    exposed = max(rates.weights * traffic, traffic - micro)
    waiting = slowest(rates.noise, ranks) * micro
    return Step(*(work.accumulation * part for part in (micro, exposed, waiting)))


def tokens_per_second(work: Work, cluster: Cluster, rates: Rates, *, ranks: int) -> float:
    """Of one GPU."""
    seconds = step(work, cluster, rates, ranks=ranks).seconds
    return work.accumulation * work.tokens / seconds


def compute_seconds(work: Work, cluster: Cluster, rates: Rates) -> float:
    """Forward, backward and recomputation of a micro-batch."""
    known = [1 / rates.matmul, 1 / rates.attention, rates.elementwise]
    return float(np.dot(terms(work, cluster), known))


def terms(work: Work, cluster: Cluster) -> np.ndarray:
    """Seconds at full peak of matrix products and attention, and elements of the elementwise part.

    Linear in 1 / rates, so that fitting is a least-squares problem. Causal attention takes 2 T s d
    a layer forward (half the square), 2.5 times that backward (it recomputes its scores).
    """
    passes = (2 if work.frozen else 3) + work.recompute
    matmul = 2 * passes * work.linear * work.tokens + 6 * work.adapters * work.tokens
    attention = (3.5 + work.recompute) * 2 * work.tokens * work.length * work.width * work.layers
    elements = (2 + work.recompute) * work.tokens * work.layers * work.width
    return np.array([matmul / cluster.peak, attention / cluster.peak, elements])


def traffic_bytes(work: Work, *, ranks: int, width: int = 2) -> float:
    """Bytes that a rank sends in a micro-batch, its share of what comes once a step.

    FSDP as the paper has ZeRO-3 (arXiv 1910.02054, section 7): weights gathered twice, gradients
    scattered once.
    """
    trained = work.adapters if work.frozen else work.parameters
    if work.software == "fsdp":
        assert work.stage == 3, work.stage
        elements: float = 2 * work.parameters + trained
    else:
        elements = zero_elements(
            work.stage, parameters=work.parameters, trained=trained,
            again=work.linear if work.frozen and work.recompute else 0,
            accumulation=work.accumulation,
        ) / work.accumulation  # fmt: skip
    return width * elements * (ranks - 1) / ranks


def hidden_from(cluster: Cluster, rates: Rates, *, ranks: int) -> float:
    """Tokens a GPU and micro-batch from which ZeRO-3 traffic could hide, whatever the model's size.

    Both sides grow with the parameters: 6 T P / F against 6 P / B gives T = F / B (FSDP; DeepSpeed
    gathers up to 1e9 elements once less). A bound, reached by perfect overlap (`rates.weights` of
    0): fitted to published rows, weights are above 1.
    """
    return cluster.peak * rates.matmul / cluster.link(ranks)


def slowest(noise: float, ranks: int) -> float:
    """Expected maximum over `ranks` of normal noise, in means: a collective waits for it.

    Blom's approximation of the largest order statistic (Statistical Estimates, 1958).
    """
    if ranks == 1 or noise == 0.0:
        return 0.0
    from statistics import NormalDist

    return noise * NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))


@dataclass(frozen=True)
class Faults:
    """How often a run is interrupted and what each interruption costs."""

    mtbf_hours: float
    """Mean time between failures of one GPU with its share of the node."""
    save_seconds: float
    restart_seconds: float
    """From the failure to the first new step: detection, rendezvous, loading."""


# Llama-3 405B: 466 interruptions in 54 days on 16,384 GPUs.
LLAMA3_MTBF_HOURS = 54 * 24 * 16384 / 466


def goodput(faults: Faults, *, ranks: int, interval_seconds: float) -> float:
    """Share of wall time that survives, in closed form (Daly 2006, exponential failures).

    An interval i and its save s take (1 / rate + restart) (exp(rate (i + s)) - 1) on average.
    """
    rate = ranks / (faults.mtbf_hours * 3600)
    segment = interval_seconds + faults.save_seconds
    return interval_seconds / ((1 / rate + faults.restart_seconds) * math.expm1(rate * segment))


def best_interval(faults: Faults, *, ranks: int) -> float:
    """Seconds between checkpoints that lose the least: sqrt(2 save / rate) (Young 1974)."""
    return math.sqrt(2 * faults.save_seconds * faults.mtbf_hours * 3600 / ranks)


def simulate_goodput(
    faults: Faults, *, ranks: int, interval_seconds: float, segments: int, seed: int
) -> float:
    """The same share by event simulation: each failure throws the segment away and restarts it."""
    random = np.random.default_rng(seed)
    mean = faults.mtbf_hours * 3600 / ranks
    segment = interval_seconds + faults.save_seconds
    wall = 0.0
    for _ in range(segments):
        failure = random.exponential(mean)
        while failure < segment:
            wall += failure + faults.restart_seconds
            failure = random.exponential(mean)
        wall += segment
    return segments * interval_seconds / wall
