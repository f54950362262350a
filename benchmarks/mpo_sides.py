"""The two sides of `benchmarks.mpo_against_trl`, each in a process of its own.

Both train the same model from the same files on the same pairs, some pairs a step, in the same order, by AdamW with clipping.
A round is one pass over the pairs. A side says {"ready"}, waits for a line, trains a round, says how long that took, and waits.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

BETA = 0.1
LR = 1e-6
IMAGE, EOS, PAD, FIRST_WORD = 0, 1, 2, 3
"""Ids of the image placeholder, the end of a reply and padding; all others are words."""
TILE = 448
TOKENS_PER_TILE = 256
VOCABULARY = 11_264


@dataclass(frozen=True, kw_only=True)
class Job:
    """One side's task."""

    model: str
    pairs: int
    pairs_a_step: int
    rounds: int
    precision: Literal["bf16", "fp32"] = "bf16"
    weights: tuple[float, float, float] = (0.8, 0.2, 1.0)
    """Of the sigmoid (DPO), BCO and generation terms."""
    copy: bool = False
    """Whether the reference model runs along as a frozen copy; else its log-probabilities are computed before training."""
    attention: str = "sdpa"
    """Of transformers."""
    group: bool = False
    """Whether pairs of similar length make a step, which spares padding."""


@dataclass(frozen=True)
class Pair:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    tile_SSC: np.ndarray

    @property
    def num_tokens(self) -> int:
        """Tokens of both sequences, vision tokens included."""
        return 2 * len(self.prompt) + len(self.chosen) + len(self.rejected)


def make_pairs(job: Job) -> list[Pair]:
    """One tile, 20 to 200 words of a prompt behind it and replies of 10 to 150 tokens, uniform and at random."""
    rng = np.random.default_rng(0)

    def words(low: int, high: int) -> list[int]:
        return rng.integers(FIRST_WORD, VOCABULARY, int(rng.integers(low, high + 1))).tolist()

    pairs = [
        Pair(
            [IMAGE] * TOKENS_PER_TILE + words(20, 200), [*words(9, 149), EOS], [*words(9, 149), EOS],
            rng.integers(0, 256, (TILE, TILE, 3), dtype=np.uint8),
        )
        for _ in range(job.pairs)
    ]  # fmt: skip
    if job.group:
        pairs.sort(key=lambda pair: len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)))
    return pairs


class Turns:
    """Says what a round took and waits for the next; after the last, how much memory the process ever held."""

    def __init__(self, job: Job) -> None:
        self.left, self.started = job.rounds, 0.0

    def begin(self) -> None:
        say(ready=True)
        self._wait()

    def end_round(self, **figures: float) -> None:
        say(seconds=time.perf_counter() - self.started, peak_bytes=peak_bytes(), **figures)
        self.left -= 1
        if self.left:
            self._wait()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit("the benchmark has gone")
        self.started = time.perf_counter()


def say(**values: object) -> None:
    print(json.dumps(values), flush=True)


def peak_bytes() -> int:
    """Most memory this process ever held resident. getrusage would count the parent's up to the exec."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


# Ours


def ours(job: Job) -> None:
    from ivl.checkpoint import load_model
    from ivl.cpu import accelerate
    from ivl.preference.config import PreferenceConfig
    from ivl.preference.objective import PreferenceObjective
    from ivl.preference.reference import FileReference, frozen
    from ivl.preference.replies import reply_log_probs
    from ivl.train.config import OptimConfig, Stage, TrainConfig
    from ivl.train.loop import train
    from ivl.train.precision import computing
    from ivl.train.stage import apply_stage
    from ivl.types import Batch

    batches = our_batches(job)
    sigmoid, bco, generation = job.weights
    optim = OptimConfig(lr=LR, weight_decay=0.0, schedule="constant")
    config = TrainConfig(precision=job.precision, optim=optim, num_steps=job.rounds * len(batches), tensorboard=False)
    terms = PreferenceConfig(beta=BETA, sigmoid=sigmoid, bco=bco, generation=generation)
    model = accelerate(load_model(job.model, dtype=torch.float32))  # as every training run does
    apply_stage(model, Stage(trainable=("vision", "projector", "decoder")))
    if job.copy:
        start = copy.deepcopy(model)
        reference = frozen(start.to(torch.bfloat16) if job.precision == "bf16" else start)
    else:
        model.eval()
        found = {}
        for batch in batches:
            with torch.no_grad(), computing(model, job.precision):
                sums = reply_log_probs(model, batch).log_probs_S.view(-1, 2).tolist()
            found |= {(d, s): (c, r) for d, s, (c, r) in zip(batch.datasets, batch.sources, sums, strict=True)}
        reference = FileReference(found)

    turns = Turns(job)

    class Rounds:
        def __iter__(self) -> Iterator[Batch]:
            turns.begin()
            for number in range(job.rounds):
                if number:
                    turns.end_round()
                yield from batches

        def state(self) -> dict:
            return {}

        def restore(self, state: list[dict]) -> None:
            raise NotImplementedError

    history = train(model, Rounds(), config, objective=PreferenceObjective(terms, reference))
    turns.end_round()  # the loop asks for no batch behind its last
    say(losses=[row["loss"] for row in history], chosen=[row["log_probs/chosen"] for row in history])


def our_batches(job: Job) -> list[Any]:
    from ivl.data.packing import collate
    from ivl.types import IGNORE, Sample

    samples = []
    for number, pair in enumerate(make_pairs(job)):
        sides = [(pair.prompt, reply) for reply in (pair.chosen, pair.rejected)]
        tokens = torch.tensor([token for prompt, reply in sides for token in prompt + reply])
        labels = [[IGNORE] * (len(prompt) - 1) + reply + [IGNORE] for prompt, reply in sides]
        labels_T = torch.tensor([label for side in labels for label in side])
        samples.append(
            Sample(
                tokens, labels_T, (labels_T != IGNORE).float(), tuple(len(p) + len(r) for p, r in sides),
                torch.from_numpy(pair.tile_SSC)[None], torch.zeros(2, dtype=torch.int64), f"{number}", f"pairs:{number}",
            )
        )  # fmt: skip
    return [collate(tuple(samples[at : at + job.pairs_a_step])) for at in range(0, len(samples), job.pairs_a_step)]


# TRL's


def trl(job: Job) -> None:
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import InternVLForConditionalGeneration, PreTrainedTokenizerFast, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DataCollatorForPreference, DPOTrainer

    from ivl.model.vlm import normalize

    disable_progress_bars()
    words = {"<image>": IMAGE, "<eos>": EOS, "<pad>": PAD} | {f"w{n}": n for n in range(FIRST_WORD, VOCABULARY)}
    inner = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<pad>")
    names = {number: word for word, number in words.items()}

    def text(tokens: list[int]) -> str:
        return "".join(f" {names[token]}" for token in tokens)

    @dataclass
    class WithTiles(DataCollatorForPreference):
        """TRL's own padding, and the tile of every pair once for each of its sides, as TRL's vision collator gives them."""

        def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
            tiles = np.stack([np.frombuffer(e["tile"], np.uint8).reshape(TILE, TILE, 3) for e in examples])
            pixels = normalize(torch.from_numpy(tiles), torch.float32)
            return super().torch_call(examples) | {"pixel_values": torch.cat([pixels, pixels])}

    pairs = make_pairs(job)
    data = Dataset.from_list(
        [
            {"prompt": text(p.prompt), "chosen": text(p.chosen), "rejected": text(p.rejected), "tile": p.tile_SSC.tobytes()}
            for p in pairs
        ]
    )
    steps_a_round = -(-job.pairs // job.pairs_a_step)
    terms = [(n, w) for n, w in zip(("sigmoid", "bco_pair", "sft"), job.weights, strict=True) if w]
    config = DPOConfig(
        output_dir=str(Path(job.model).parent / "trl"), loss_type=[n for n, _ in terms], loss_weights=[w for _, w in terms],
        beta=BETA, precompute_ref_log_probs=not job.copy, gradient_checkpointing=False, bf16=job.precision == "bf16",
        max_length=None, per_device_train_batch_size=job.pairs_a_step, max_steps=job.rounds * steps_a_round,
        learning_rate=LR, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
        train_sampling_strategy="sequential", remove_unused_columns=False, use_cpu=True, save_strategy="no", report_to="none",
        logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip

    def load() -> Any:
        return InternVLForConditionalGeneration.from_pretrained(
            job.model, dtype=torch.float32, attn_implementation=job.attention
        )

    turns = Turns(job)

    losses: list[float] = []
    chosen: list[float] = []

    class Gate(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.begin()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in (logs or {}):
                return
            losses.append(logs["loss"])
            chosen.append(logs["logps/chosen"])
            if state.global_step % steps_a_round == 0:
                turns.end_round()

    trainer: Any = DPOTrainer(
        model=load(), ref_model=load() if job.copy else None, args=config, train_dataset=data, processing_class=tokenizer,
        data_collator=WithTiles(pad_token_id=PAD), callbacks=[Gate()],
    )  # fmt: skip
    encoded: Any = trainer.train_dataset
    for pair, row in zip(pairs, encoded, strict=True):
        assert (pair.prompt, pair.chosen, pair.rejected) == (row["prompt_ids"], row["chosen_ids"], row["rejected_ids"])
    trainer.train()
    say(losses=losses, chosen=chosen)


def write_model(directory: str) -> None:
    """InternVL2.5-1B in small, in transformers' format: of the parameters of ViT, decoder layers and head together these have
    39%, 44% and 17% (the 1B's: 38%, 45% and 17%), so each part has its share of a step; a tile has the 1B's 256 tokens."""
    from ivl.checkpoint import save_model
    from ivl.config import DecoderConfig, ModelConfig, VisionConfig
    from ivl.model.vlm import VLM

    config = ModelConfig(
        vision=VisionConfig(width=512, num_layers=4, mlp_width=2048, num_heads=8),
        decoder=DecoderConfig(
            family="qwen2", vocab_size=VOCABULARY, width=512, num_layers=3, mlp_width=2816, num_heads=8, num_kv_heads=2,
            head_dim=64, qkv_bias=True,
        ),
        image_token_id=IMAGE, eos_token_ids=(EOS,), pad_token_id=PAD,
    )  # fmt: skip
    torch.manual_seed(0)
    model = VLM(config)
    model.init_weights()
    save_model(model, directory, dialect="transformers")
    parts = {"vision": model.vision, "layers": model.decoder.layers, "head": model.decoder.head, "all": model}
    say(**{name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()})


def main(side: str, threads: str, job: str) -> None:
    torch.set_num_threads(int(threads))
    if side == "model":
        write_model(job)
        return
    values = json.loads(job)
    {"ours": ours, "trl": trl}[side](Job(**{**values, "weights": tuple(values["weights"])}))


if __name__ == "__main__":
    main(*sys.argv[1:])
