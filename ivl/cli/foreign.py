"""Options of other tools by what they are here: transformers, ms-swift, LLaMA-Factory, vLLM, LMDeploy, VLMEvalKit, lm-eval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ivl.errors import InputError

_BATCH = "--packs-per-step, the rows of a step over all processes and accumulated steps (2 rows x 4 processes x 8 steps is 64)"
_PARTS = "--stage.trainable, which names the parts that train: projector decoder vision"
_NEEDLESS = "not needed: "

TRAIN: Mapping[str, str] = {
    # data
    "dataset": "--data, files or folders of rows", "train-file": "--data", "train-dataset": "--data",
    "data-path": "--data", "dataset-dir": "--data, with the folder in each path",
    "meta-path": "--data, with the same meta JSON", "val-dataset": "--val-mixture", "eval-dataset": "--val-mixture",
    "validation-file": "--val-mixture", "split-dataset-ratio": "--val-share", "dataset-test-ratio": "--val-share",
    "val-size": "--val-share", "test-size": "--val-share", "max-length": "--data.max-tokens",
    "max-seq-length": "--data.max-tokens", "cutoff-len": "--data.max-tokens", "model-max-length": "--data.max-tokens",
    "truncation-strategy": "--data.over-budget",
    "packing": "--data.max-samples, the rows of a pack (None packs as many as fit)",
    "group-by-length": f"{_NEEDLESS}nothing is padded", "max-dynamic-patch": "--data.max-tiles-per-image",
    "max-pixels": "--data.max-tiles-per-image, in tiles of 448 px", "max-packed-tokens": "--data.max-tokens",
    "num-images-expected": "--data.max-tiles", "dataloader-num-workers": "--data.num-workers",
    "preprocessing-num-workers": "--data.num-workers", "dataset-num-proc": "--data.num-workers",
    "dataset-shuffle": "--data.shuffle", "use-data-resampling": "--data.weighting root",
    "interleave-probs": "repeat_time of each set in a meta JSON", "mix-strategy": "--data.weighting",
    "template": f"{_NEEDLESS}the model's own template is taken",
    "conv-style": f"{_NEEDLESS}the model's own template is taken", "loss-reduction": "--data.averaging",
    "loss-scale": "weights of turns in the rows",
    # length and batch
    "num-train-epochs": "--data.epochs", "num-epochs": "--data.epochs", "epochs": "--data.epochs",
    "max-steps": "--num-steps", "batch-size": _BATCH, "train-batch-size": _BATCH, "per-device-train-batch-size": _BATCH,
    "micro-batch-size": _BATCH, "global-batch-size": "--packs-per-step", "gradient-accumulation-steps": _BATCH,
    "per-device-eval-batch-size": f"{_NEEDLESS}validation reads pack by pack",
    # optimizer
    "lr": "--optim.lr", "learning-rate": "--optim.lr", "vit-lr": "--optim.lr-vision", "aligner-lr": "--optim.lr-projector",
    "vision-lr": "--optim.lr-vision", "optim": "--optim.name", "optimizer": "--optim.name",
    "weight-decay": "--optim.weight-decay", "adam-beta1": "--optim.betas", "adam-beta2": "--optim.betas",
    "adam-epsilon": "--optim.eps", "max-grad-norm": "--optim.clip", "lr-scheduler-type": "--optim.schedule",
    "warmup-ratio": "--optim.warmup-ratio", "warmup-steps": "--optim.warmup-steps",
    "min-lr": "--optim.min-lr-ratio, a share of the peak", "drop-path-rate": "--stage.drop-path",
    # what trains
    "model-name-or-path": "--model", "model-id-or-path": "--model", "model-type": f"{_NEEDLESS}the model says it",
    "train-type": "the first word: ivl train finetune|lora|mpo",
    "tuner-type": "the first word: ivl train finetune|lora|mpo", "sft-type": "the first word: ivl train finetune|lora|mpo",
    "finetuning-type": "the first word: ivl train finetune|lora|mpo",
    "rlhf-type": "ivl train mpo with --objective.sigmoid 1 --objective.bco 0 --objective.generation 0 for DPO alone",
    "lora-rank": "--lora.rank", "lora-r": "--lora.rank", "lora-alpha": "--lora.alpha", "lora-dropout": "--lora.dropout",
    "lora-dropout-p": "--lora.dropout", "lora-target": "--lora.targets", "lora-target-modules": "--lora.targets",
    "target-modules": "--lora.targets", "use-lora": "ivl train lora", "use-llm-lora": "--lora.rank",
    "use-backbone-lora": "--lora.targets vision.layers", "freeze-vit": _PARTS, "freeze-llm": _PARTS, "freeze-mlp": _PARTS,
    "freeze-backbone": _PARTS, "freeze-aligner": _PARTS, "freeze-vision-tower": _PARTS, "freeze-language-model": _PARTS,
    "freeze-multi-modal-projector": _PARTS, "unfreeze-vit-layers": "--stage.vision-from-layer", "beta": "--objective.beta",
    "pref-beta": "--objective.beta", "rpo-alpha": "--objective.generation", "sigmoid-loss-weight": "--objective.sigmoid",
    "bco-pair-loss-weight": "--objective.bco", "sft-loss-weight": "--objective.generation",
    # precision, memory, processes
    "bf16": "--precision bf16", "fp16": "--precision bf16; float16 is not trained in", "torch-dtype": "--precision",
    "dtype": "--precision", "pure-bf16": "--precision pure_bf16", "gradient-checkpointing": "--checkpointing",
    "grad-checkpoint": "--checkpointing", "disable-gradient-checkpointing": "--no-checkpointing",
    "torch-compile": "--compile", "deepspeed": "--shard", "fsdp": "--shard", "zero-stage": "--shard",
    "attn-impl": f"{_NEEDLESS}one attention for all", "flash-attn": f"{_NEEDLESS}one attention for all",
    "use-flash-attn": f"{_NEEDLESS}one attention for all", "quant-bits": "nothing: quantized models are not trained",
    "quantization-bit": "nothing: quantized models are not trained",
    "nproc-per-node": "an option of torchrun: torchrun --nproc-per-node N -m ivl train ...",
    # checkpoints and logs
    "output-dir": "--out-dir", "run-name": "--name", "logging-steps": "--log-every", "report-to": "--log-to",
    "logging-dir": "tensorboard/ of --out-dir", "save-steps": "--save-every", "save-total-limit": "--keep-last",
    "save-strategy": "--save-every", "eval-steps": "--val-every", "eval-strategy": "--val-every",
    "evaluation-strategy": "--val-every", "do-train": f"{_NEEDLESS}the command trains", "do-eval": "--val-share",
    "load-best-model-at-end": "best/ of --out-dir (--keep-best)",
    "metric-for-best-model": "the validation loss (--keep-best)", "early-stopping-patience": "--patience",
    "early-stop-interval": "--patience", "plot-loss": f"{_NEEDLESS}loss.png of --out-dir",
    "resume-from-checkpoint": "--resume", "overwrite-output-dir": "a new --out-dir: runs are not overwritten",
    "push-to-hub": "nothing: upload model/ of --out-dir", "use-swanlab": "--log-to wandb or trackio",
    "trust-remote-code": f"{_NEEDLESS}no code of a model is run",
}  # fmt: skip
SERVE: Mapping[str, str] = {
    "model": "the first argument: ivl serve MODEL", "model-path": "the first argument: ivl serve MODEL",
    "served-model-name": "--names", "model-name": "--names", "lora-modules": "--adapter NAME=DIR ...",
    "adapters": "--adapter NAME=DIR ...", "enable-lora": "--adapter NAME=DIR ...", "max-model-len": "--max-context",
    "session-len": "--max-context", "context-length": "--max-context", "max-num-seqs": "--max-running",
    "max-batch-size": "--max-running", "max-num-batched-tokens": "--max-batch-tokens",
    "max-prefill-token-num": "--max-batch-tokens", "gpu-memory-utilization": "--max-cache-tokens",
    "cache-max-entry-count": "--max-cache-tokens", "mem-fraction-static": "--max-cache-tokens", "server-name": "--host",
    "server-port": "--port", "api-key": "--key-file, or IVL_API_KEYS", "api-keys": "--key-file, or IVL_API_KEYS",
    "torch-dtype": "--dtype", "max-dynamic-patch": "--max-tiles", "limit-mm-per-prompt": "--max-images and --max-videos",
    "allowed-local-media-path": "nothing: no local file is read", "allowed-media-domains": "--media.allowed-domains",
    "allowed-origins": "--allow-origin", "allow-origins": "--allow-origin",
    "trust-remote-code": f"{_NEEDLESS}no code of a model is run",
    "enable-prefix-caching": f"{_NEEDLESS}common prefixes are always shared",
    "enable-auto-tool-choice": f"{_NEEDLESS}tools are read where a model knows them",
    "chat-template": f"{_NEEDLESS}the model's own template is taken",
}  # fmt: skip
ASK: Mapping[str, str] = {
    "model": "the first argument: MODEL", "model-path": "the first argument: MODEL",
    "model-name-or-path": "the first argument: MODEL", "image": "the second argument: MODEL picture.png -p QUESTION",
    "images": "the arguments behind MODEL", "video": "an argument behind MODEL", "question": "-p", "query": "-p",
    "max-tokens": "--max-new-tokens", "max-length": "--max-new-tokens", "lora": "--adapter", "peft": "--adapter",
    "torch-dtype": "--dtype", "max-dynamic-patch": "--max-tiles", "top-n-tiles": "--max-tiles", "num-segments": "--frames",
    "trust-remote-code": f"{_NEEDLESS}no code of a model is run",
}  # fmt: skip
SCORE: Mapping[str, str] = {
    "model": "an argument: ivl eval MODEL ...", "tasks": "--task", "datasets": "--task",
    "dataset": "--task, or --data for your own rows", "eval-dataset": "--task",
    "num-fewshot": "nothing: tasks ask as they were published", "output-path": "--out", "work-dir": "--out",
    "log-samples": "--export lmms-eval", "reuse": f"{_NEEDLESS}saved replies are used again",
    "max-tokens": "--max-new-tokens", "torch-dtype": "--dtype",
    "trust-remote-code": f"{_NEEDLESS}no code of a model is run",
}  # fmt: skip
OPTIONS = {"train": TRAIN, "serve": SERVE, "chat": ASK, "eval": SCORE}
"""By command: the name of an option elsewhere, with hyphens, and what it is here."""


def answer_foreign(command: str, args: Sequence[str]) -> None:
    """Name our options for those of other tools among the arguments.

    Raises:
        InputError: if there are any.
    """
    known, found = OPTIONS[command], dict[str, str]()
    for arg in args:
        name = arg.partition("=")[0]
        if name.startswith("--") and (ours := known.get(name[2:].lower().replace("_", "-"))):
            found[name] = ours
    if found:
        raise InputError("; ".join(f"{name} is {ours}" for name, ours in found.items()) + f" (`ivl {command} --help`)")
