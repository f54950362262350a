"""Run the studies and write their page: `make claims`, or `python -m studies.claims [--only NAME ...]`.

Arms and seeds run side by side, each in a process with one thread. What has its file of figures already is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing as mp
import os
import shutil
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace

from studies.claims import STUDIES, report
from studies.claims.study import QUICK, Lab, Study, forget


def main() -> None:
    parser = argparse.ArgumentParser(prog="make claims", description=(__doc__ or "").split("\n\n")[-1])
    parser.add_argument("--only", nargs="+", choices=list(STUDIES), help="studies to run; by default all but the costly ones")
    parser.add_argument("--fresh", action="store_true", help="delete their figures and runs first")
    parser.add_argument("--quick", action="store_true", help="tiny budgets, in a folder of their own")
    parser.add_argument("--real", action="store_true", help="the demonstration on real parts too, which takes hours")
    parser.add_argument("--seeds", type=int, help="other than 3")
    options = parser.parse_args()
    lab = QUICK if options.quick else Lab()
    lab = replace(lab, seeds=options.seeds) if options.seeds else lab
    chosen = [s for s in STUDIES.values() if (s.name in options.only if options.only else options.real or not s.costly)]
    if options.fresh:
        for study in chosen:
            forget(study, lab)
        if not options.only:
            shutil.rmtree(lab.runs, ignore_errors=True)
    began = time.monotonic()
    failed = [failure for study in chosen for failure in run_study(study, lab)]
    for path in report.write(lab):
        print(path)
    print(f"{(time.monotonic() - began) / 60:.0f} minutes")
    if failed:
        raise SystemExit(f"{len(failed)} failed: {', '.join(failed)}; their logs are under {lab.runs}")


def run_study(study: Study, lab: Lab) -> list[str]:
    """Run the arms that have no figures yet; returns those that failed."""
    todo = [(arm, seed) for arm, seed in study.tasks(lab) if not study.file(lab, arm, seed).exists()]
    if not todo:
        print(f"{study.name}: every arm has its figures in {lab.results / study.name}", flush=True)
        return []
    failed: list[str] = []
    began = time.monotonic()
    with ProcessPoolExecutor(min(num_cores(), len(todo)), mp.get_context("spawn"), initializer=one_thread) as pool:
        waiting = {pool.submit(run_arm, study.name, lab, arm, seed): f"{study.name}/{arm}-{seed}" for arm, seed in todo}
        for number, future in enumerate(as_completed(waiting), 1):
            name, error = waiting[future], future.exception()
            failed += [name] if error else []
            minutes = (time.monotonic() - began) / 60
            print(f"{number} of {len(todo)}, {minutes:.1f} min: {name}{f' failed: {error}' if error else ''}", flush=True)
    return failed


def run_arm(name: str, lab: Lab, arm: str, seed: int) -> None:
    """Measure an arm of a seed; what it prints goes into its log."""
    log = lab.runs / name / f"{arm}-{seed}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            STUDIES[name].run(lab, arm, seed)
        except BaseException:
            traceback.print_exc()
            raise


def num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)
