"""Memory of each rank of a sharded run at its start, while it saves and when it resumes, on gloo.

    python -m benchmarks.sharded_memory
    python -m benchmarks.sharded_memory --package ../before  # also another checkout of the package

A model of 250 M parameters trains two steps from a model directory in float32. Figures are the largest anonymous memory
(RssAnon of /proc/self/status) above that before the run; pages of mapped files do not count. A rank's share is that of the
weights alone: gradients and two moments are three more, a copy to be written another three.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
PHASES = ("start", "steps", "save", "export", "resume")


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


class Peaks:
    """The largest memory in each phase, sampled by a thread."""

    def __init__(self) -> None:
        self.before, self.phase, self.peaks = anonymous(), "start", dict[str, int]()
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), anonymous() - self.before)
            time.sleep(0.005)


def make(folder: Path, layers: int) -> None:
    """Write a model with a tokenizer, and rows of text."""
    import torch

    from ivl.checkpoint import save_model, save_processor
    from ivl.config import DecoderConfig, ModelConfig, TilingConfig, VisionConfig
    from ivl.model.vlm import VLM
    from ivl.processing.processor import Processor
    from ivl.processing.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["what is this", "a red circle on white"] * 5, 300)
    vision = VisionConfig(width=64, num_layers=2, mlp_width=128, num_heads=4, patch_size=7, image_size=28)
    decoder = DecoderConfig(
        vocab_size=len(tokenizer),
        width=1024,
        num_layers=layers,
        mlp_width=4096,
        num_heads=16,
        num_kv_heads=16,
        head_dim=64,
        qkv_bias=True,
    )
    ids = {"image_token_id": tokenizer.id("<IMG_CONTEXT>"), "eos_token_ids": (tokenizer.id("<|im_end|>"),)}
    config = ModelConfig(vision=vision, decoder=decoder, tiling=TilingConfig(tile_size=28), template="plain-chatml", **ids)
    torch.manual_seed(0)
    model = VLM(config)
    model.init_weights()
    save_model(model, folder / "model")
    save_processor(Processor(config, tokenizer), folder / "model")
    turns = [{"from": "human", "value": "what is this"}, {"from": "gpt", "value": "a red circle on white"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"id": n, "conversations": turns}) + "\n" for n in range(64)))
    print(sum(p.numel() for p in model.parameters()))


def on_rank(folder: Path, *, resume: bool) -> None:
    """Train two steps as the rank that the environment names, and print the peaks."""
    import torch
    import torch.distributed.fsdp  # what imports take is not counted

    from ivl.data.config import DataConfig
    from ivl.runs import run as runs
    from ivl.runs.config import RunConfig
    from ivl.train.config import Stage, TrainConfig
    from ivl.train.loop import Evaluator

    torch.set_num_threads(1)
    ranks, peaks, train, write = int(os.environ["WORLD_SIZE"]), Peaks(), runs.train, runs.write_final_model

    def entering(phase, function):
        def call(*args, **kwargs):
            peaks.phase = phase
            return function(*args, **kwargs)

        return call

    runs.train = entering("resume" if resume else "steps", train)
    runs.write_final_model = entering("export", write)
    config = RunConfig(
        name="memory", model=str(folder / "model"), out_dir=str(folder / f"run-{ranks}"), shard=True, device="cpu",
        stage=Stage(trainable=("vision", "projector", "decoder")),
        data=DataConfig(mixture=str(folder / "rows.jsonl"), max_tokens=60, max_tiles=8, num_workers=0),
        train=TrainConfig(
            num_steps=2, packs_per_step=ranks, precision="fp32", save_every=2, checkpointing=True, tensorboard=False
        ),
    )  # fmt: skip
    mark = Evaluator("mark", 2, entering("save", lambda model: {}))
    runs.run(config, resume=resume, evaluators=lambda processor: (mark,))
    found = peaks.peaks if not resume else {"resume": max(peaks.peaks.values())}
    (folder / f"peaks-{os.environ['RANK']}.json").write_text(json.dumps(found))


def measure(package: Path, folder: Path, ranks: int) -> list[dict[str, int]]:
    """Return the peaks of every rank of a run and of its resumption."""
    found: list[dict[str, int]] = [{} for _ in range(ranks)]
    for step in ("run", "resume"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
        env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
        processes = [
            subprocess.Popen(command, env=env | {"RANK": str(rank)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for rank in range(ranks)
        ]
        for process in processes:
            words = process.communicate()[1].decode()
            if process.returncode:
                raise SystemExit(words[-2000:])
        for rank, peaks in enumerate(found):
            peaks |= json.loads((folder / f"peaks-{rank}.json").read_text())
    return found


def main() -> None:
    """Measure the packages one after another, and print a table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--layers", type=int, default=15, help="of the decoder; 15 are 250 M parameters")
    parser.add_argument("--package", type=Path, action="append", default=[], help="another checkout to measure before this one")
    parser.add_argument("--step", choices=("make", "run", "resume"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step == "make":
        make(args.folder, args.layers)
        return
    if args.step:
        on_rank(args.folder, resume=args.step == "resume")
        return
    print(f"{'package':30} ranks rank {'share':>6}" + "".join(f"{phase:>8}" for phase in PHASES) + "   MB of anonymous memory")
    for ranks in args.ranks:
        for package in (*args.package, ROOT):
            with tempfile.TemporaryDirectory() as name:
                env = {**os.environ, "PYTHONPATH": str(package)}
                made = [sys.executable, __file__, "--step", "make", "--folder", name, "--layers", str(args.layers)]
                share = 4 * int(subprocess.run(made, env=env, check=True, capture_output=True).stdout) // ranks
                for rank, peaks in enumerate(measure(package.resolve(), Path(name), ranks)):
                    row = "".join(f"{peaks.get(phase, 0) / 1e6:8.0f}" for phase in PHASES)
                    print(f"{package.resolve().name:30} {ranks:5} {rank:4} {share / 1e6:6.0f}{row}", flush=True)


if __name__ == "__main__":
    main()
