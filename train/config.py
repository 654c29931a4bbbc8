"""Every knob of a training run, one frozen model a part, each checked before a process is started.

The rules that cross parts live in `train/rules.py`, from which docs/combinations.md is generated.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from tuneloom.config import Config
from tuneloom.data.records import Format

NAME = re.compile(r"[a-z0-9._-]{1,64}")
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
ADAPTER_BUCKET = 50_000_000
"""Elements of DeepSpeed's reduce buckets under LoRA: allocated whole, 2 x 1 GB by default."""
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]


class RunConfig(Config):
    root: str = "runs"
    """Folder that holds one folder a run; shared by all nodes of a cluster."""
    name: str = "run"
    """What the run is called in its id and in W&B."""
    id: str | None = None
    """The folder's name under `root`; None makes one from name, time and a random suffix, and is
    refused under torchrun.
    """
    parent: str | None = None
    """Run id that this run was started from, kept for lineage."""

    @field_validator("name", "id")
    @classmethod
    def safe(cls, value: str | None) -> str | None:
        # Names reach paths, sbatch headers and W&B (LLaMA-Factory CVE-2024-52803).
        if value is not None and (not NAME.fullmatch(value) or set(value) <= {"."}):
            raise ValueError("expected 1 to 64 of [a-z0-9._-]")
        return value


class ModelConfig(Config):
    path: str
    """A folder or hub id with config.json, safetensors, tokenizer; or, for a new model, its
    config.
    """
    revision: str | None = None
    """Commit of a hub id; None takes the newest and records which it was."""
    init: Literal["pretrained", "random"] = "pretrained"
    """`random` builds the architecture in `path`/config.json from the seed, with no weights
    read.
    """
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of weights and activations; masters and optimizer state are fp32 whatever this says."""
    attention: Literal["auto", "flash", "varlen", "sdpa", "eager"] = "auto"
    """`auto` takes the fastest that the device and the model allow, and says which."""
    checkpointing: Literal["off", "on", "selective"] = "off"
    """Recompute activations in backward: of no layer, of every layer, of every n-th layer."""
    checkpoint_every_layers: Positive = 2
    """The n of `checkpointing=selective`."""
    checkpoint_offload: bool = False
    """Keep the inputs of recomputed layers in host memory until backward: for long sequences."""
    tile_tokens: Positive | None = None
    """Compute MLPs this many tokens at a time, again in backward, and the loss without ever holding
    all logits: for long sequences. None: all at once.
    """
    kernels: bool = False
    """Put the fused ops of kernels/ into the model; what was patched stands in effects.json."""
    compile: bool = False
    """Decoder layers through torch.compile, each by itself; seconds and graphs of the cold start
    stand in effects.json.
    """
    cuda_graphs: bool = False
    """Decoder layers as CUDA graphs, for models so small that launches take the time: every pack is
    padded to batch.tokens. Captured before the first step; the seconds stand in effects.json.
    """
    fp8: bool = False
    """Multiply in FP8 (e4m3, a scale a row and a token). LoRA: the frozen linears are held in it.
    Full: their weights stay bf16, and so do their gradients. The loss of the first batch must stay
    within 1 % of that in bf16, or the run is refused.
    """


class MethodConfig(Config):
    kind: Literal["full", "lora", "qlora"]
    rank: Positive = 16
    alpha: Positive = 32
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """LoRA dropout. 0 by default: it costs a mask a linear and seldom helps."""
    targets: Literal["all-linear"] | list[str] = "all-linear"
    """Linear modules that get an adapter: all but the head, or names such as [q_proj, v_proj]."""
    extra_modules: list[str] = []
    """Modules trained whole beside the adapter, such as [embed_tokens, lm_head]."""
    dora: bool = False
    """Weight-decomposed LoRA (arXiv 2402.09353)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) in place of alpha / rank (arXiv 2312.03732)."""
    double_quantisation: bool = True
    """QLoRA: quantise the NF4 block constants too, 0.37 bits a parameter less (arXiv
    2305.14314).
    """
    prefetch: bool = False
    """QLoRA with model.kernels: unpack the next NF4 weight while this one is multiplied by, on a
    stream of its own on a GPU; two matrices of the largest weight in memory.
    """

    @field_validator("targets", mode="before")
    @classmethod
    def a_list_of_names(cls, value: object) -> object:
        if isinstance(value, str) and value != "all-linear":
            raise ValueError("expected all-linear, or a list such as [q_proj, v_proj]")
        return value


class ObjectiveConfig(Config):
    kind: Literal["sft", "pretrain"]


class DataConfig(Config):
    path: str
    """A dataset folder made by `tuneloom ingest`, or a raw JSONL file."""
    format: Format = "auto"
    """Payload of a raw JSONL; `auto` looks at the keys of each row."""
    validation: str | None = "validation"
    """For validation loss: a split of the dataset folder, else a JSONL file or another dataset's
    folder; None for none.
    """
    split: str = "train"
    """Split of the dataset folder that is trained on."""
    golden: list[str] = ["golden/*/golden.jsonl"]
    """Golden sets, as files or globs, whose rows are never trained on; checked before step 1."""


class BatchConfig(Config):
    max_length: Annotated[int, Field(ge=2)] = 2048
    """Longest example in tokens; longer ones follow `over_length`."""
    packing: bool = True
    tokens: Positive = 8192
    """Packed: token budget of one micro-batch on one rank."""
    documents: Positive | None = None
    """Packed: most examples of one pack. None: as many as fit, but batch.tokens / 32 under
    model.cuda_graphs, where each place costs, used or not.
    """
    sequences: Positive = 8
    """Not packed: examples of one micro-batch on one rank, padded to the longest."""
    accumulation: Positive = 1
    """Micro-batches a rank sums before one optimizer step. A run that goes on keeps its sum over
    all ranks, whatever this says; under another run.id it counts.
    """
    sequence_parallel: Positive = 1
    """Neighbouring ranks that share each micro-batch, a part of its tokens each (Ulysses); it
    divides the ranks and the model's attention heads.
    """
    shuffle: bool = True
    window: Positive | None = None
    """Examples that are packed and balanced together, so how far ahead the tokeniser must be; None:
    two steps' worth first, then doubling up to 64."""
    balance: bool = True
    """Packed and shuffled: packs of like cost share a step where ranks would else wait for the
    slowest by more than 2 %; false keeps steps random, and the wait."""
    over_length: Literal["drop", "truncate", "error"] = "drop"
    max_lost_answer_tokens: Fraction = 0.005
    """Share of target tokens that over-length rows may lose before the run is refused."""

    @property
    def rank_tokens(self) -> int:
        """Positions that one rank holds of the fullest micro-batch."""
        whole = self.tokens if self.packing else self.sequences * self.max_length
        return -(-whole // self.sequence_parallel)

    def tiles(self, tokens: int) -> int:
        """Tiles of at most `tokens` of every micro-batch, full or not: under ZeRO-3 each tile
        gathers weights, so all ranks must make as many.
        """
        return -(-self.rank_tokens // tokens)

    @model_validator(mode="after")
    def pack_holds_an_example(self) -> "BatchConfig":
        if self.packing and self.tokens < self.max_length:
            raise ValueError(
                f"batch.tokens: expected at least batch.max_length ({self.max_length}), "
                f"got {self.tokens}; raise batch.tokens or lower batch.max_length"
            )
        return self


LORA_LR, FULL_LR = 2e-4, 1e-5


class OptimConfig(Config):
    model_config = ConfigDict(allow_inf_nan=False)

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    lr: Annotated[float, Field(gt=0)] = LORA_LR
    """null in a file or on the command line: 2e-4, or 1e-5 under method=full."""
    muon_lr: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate of the matrices under `name=muon`; `lr` stays that of everything else."""
    schedule: Literal["constant", "linear", "cosine", "wsd"] = "cosine"
    warmup_steps: NotNegative = 10
    min_lr_ratio: Fraction = 0.1
    """Where linear, cosine and wsd end, as a share of lr."""
    decay_fraction: Fraction = 0.2
    """wsd: last share of the run over which lr falls."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Applied to matrices only; norms, biases and embeddings are never decayed."""
    beta1: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    beta2: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.999
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest gradient norm; 0 clips nothing."""


class ZeroConfig(Config):
    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu", "nvme"] = "none"
    """Where optimizer state lives."""
    offload_parameters: Literal["none", "cpu", "nvme"] = "none"
    """Where ZeRO-3 keeps parameter shards between uses."""
    nvme_path: str | None = None


class CheckpointConfig(Config):
    every: NotNegative = 100
    """Steps between checkpoints; 0 saves only at the end and on a signal."""
    keep: Positive = 2
    asynchronous: bool = False
    """A step waits for a copy of the state in host memory (as large as the rank's part of a
    checkpoint), and the files are written beside the steps that follow.
    """
    memory_every: NotNegative = 0
    """Steps between copies of the state in /dev/shm of each rank's host and of another host: what
    a lost rank or host costs. A node holds up to six times its ranks' part of a checkpoint, half of
    it on one host alone; 0 keeps none.
    """


class TrainLoopConfig(Config):
    hang_seconds: Positive = 1800
    """A rank without progress for this long ends the run with all stacks and the rank at fault;
    above the longest validation or save. Parts of start-up have longer (`train/watchdog.py`).
    """
    max_bad_steps: NotNegative = 5
    """Non-finite steps refused in a row before the run ends with exit 5."""
    spike_z: Annotated[float, Field(ge=0)] = 6.0
    """A step whose loss stands this many robust standard deviations above the last 32 is named; 0
    names none.
    """
    validate_every: NotNegative = 0
    """Steps between validation losses; 0 is only at the end."""
    validation_rows: Positive = 512
    """At most this many rows of the validation split are scored each time."""
    patience: NotNegative = 0
    """Validations without a better loss before an early stop, which leaves the weights of the best
    one; 0 never stops early, and leaves those of the last step.
    """
    sample_every: NotNegative = 0
    """Steps between sample generations; 0 is only at the end."""
    samples: NotNegative = 3
    """Validation prompts that are answered each time."""
    sample_tokens: Positive = 64
    probe: bool = True
    """Before step 1, prove on the real model that documents in a pack do not see each other."""
    drill: bool = True
    """Open the first checkpoint's weights in a fresh process and compare logits."""
    effects_step: Positive = 2
    """Steps after which effects.json is written, or after the last: 2, because B is 0 at LoRA's
    first. Counted anew where another run's checkpoint is taken up, or a resume changes `zero`.
    """


class TrackerConfig(Config):
    mode: Literal["auto", "online", "offline", "off"] = "auto"
    project: str = "tuneloom"


class TrainConfig(Config):
    """One training run, the same whatever launches it."""

    seed: NotNegative = 0
    steps: Positive | None = None
    """Counted from the start of training, also where a checkpoint is taken up."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    resume: str = "auto"
    """`auto` continues run.id if its folder holds a checkpoint, `never` refuses, else a checkpoint
    path. Restarts, jobs that are queued again, and the same command with the same path go on from
    what the run saved since.
    """
    debug: bool = False
    """Anomaly detection, at most 20 steps, and a verdict whether it is safe to scale."""
    run: RunConfig = RunConfig()
    model: ModelConfig
    method: MethodConfig
    objective: ObjectiveConfig
    data: DataConfig
    batch: BatchConfig = BatchConfig()
    optim: OptimConfig = OptimConfig()
    zero: ZeroConfig = ZeroConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    train: TrainLoopConfig = TrainLoopConfig()
    tracker: TrackerConfig = TrackerConfig()

    @model_validator(mode="before")
    @classmethod
    def rate_of_the_method(cls, given: Any) -> Any:
        """A rate that nobody chose is that of the method."""
        if not isinstance(given, dict) or not isinstance(given.get("optim", {}), dict):
            return given
        optim = given.get("optim", {})
        if optim.get("lr") is not None:
            return given
        method = given.get("method")
        kind = method.get("kind") if isinstance(method, dict) else None
        return given | {"optim": optim | {"lr": FULL_LR if kind == "full" else LORA_LR}}

    @model_validator(mode="after")
    def runs(self) -> "TrainConfig":
        from tuneloom.train.rules import violations

        if self.steps is None and self.epochs is None:
            raise ValueError(
                "steps, epochs: at least one must be set, both are null; set steps=1000"
            )
        for message in violations(self):
            raise ValueError(message)
        return self
